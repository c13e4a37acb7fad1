"""Reads the addresses that a manifest may hold, and says clearly what is wrong with the others.

Pure: nothing here opens, resolves or checks that anything exists.

    s3://BUCKET/KEY   file:///DIR   hf://ORG/NAME[@REVISION][/PATH]   hf://datasets/ORG/NAME[@REVISION]/PATH
    pvc://CLAIM/PATH   https://HOST/PATH   http://LOOPBACK/PATH   and, where the caller allows, plain paths
"""

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal
from urllib.parse import unquote, urlsplit

from kubepeft.errors import UserError

Scheme = Literal["s3", "file", "hf", "pvc", "https", "http"]
Bad = Callable[[str, str], UserError]
"""Makes the error from what is wrong with the address and what to write instead."""

SCHEMES: tuple[Scheme, ...] = ("s3", "file", "hf", "pvc", "https", "http")
FORMS = "s3://BUCKET/KEY, hf://ORG/NAME[@REVISION], pvc://CLAIM/PATH, file:///DIR or https://…"

BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,61}[A-Za-z0-9]\Z")
CLAIM = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?\Z")
HUB_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,95}\Z")
REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._/+-]{0,254}\Z")
LOOPBACK = re.compile(r"(localhost|127(\.\d{1,3}){3}|::1)\Z")


@dataclass(frozen=True)
class Location:
    """An address taken apart.

    `root` is the bucket, the claim, "ORG/NAME" or "HOST[:PORT]", and "" for files. `path` has no slash at either
    end; for files it is the absolute path without its first slash. `str()` gives the address back, for messages:
    a query string may hold a signature and is left out.
    """

    scheme: Scheme
    root: str
    path: str
    revision: str | None = None
    dataset: bool = False
    query: str = ""

    def __str__(self) -> str:
        if self.scheme == "file":
            return f"file:///{self.path}"
        root = f"datasets/{self.root}" if self.dataset else self.root
        at = f"@{self.revision}" if self.revision else ""
        return f"{self.scheme}://{root}{at}" + (f"/{self.path}" if self.path else "")

    def __repr__(self) -> str:
        return f"Location({self})"

    def at(self, revision: str) -> "Location":
        """The same place in the hub at this revision."""
        return replace(self, revision=revision)


def parse_uri(text: str, *, base_dir: Path | None = None, where: str = "") -> Location:
    """Takes an address apart. Plain paths are allowed only with `base_dir`, which relative ones start from.

    Raises UserError with reason BadUri; `where` says which field of the manifest holds the address.
    """
    shown = _without_secrets(text)

    def bad(what: str, mend: str) -> UserError:
        return UserError("BadUri", f"{shown!r} {what}", where=where, mend=mend)

    if not text.strip():
        raise UserError("BadUri", "the address is empty", where=where, mend=f"give {FORMS}")
    if text != text.strip() or any(ord(character) < 32 or ord(character) == 127 for character in text):
        raise bad("holds white space or control characters at an end or inside", "write it without them")

    scheme, separator, rest = text.partition("://")
    if not separator:
        return _plain_path(text, base_dir, bad)
    if scheme not in SCHEMES:
        raise bad(f"has the unknown scheme {scheme}://", _scheme_mend(scheme, shown))
    if scheme in ("https", "http"):
        return _web(text, scheme, bad)

    if scheme == "file":
        if not rest.startswith("/"):
            raise bad("names a host or a relative path", f"write file:///{rest} with three slashes and a whole path")
        return Location("file", "", _clean_path(unquote(rest[1:]), bad))
    root, _, path = rest.partition("/")
    if scheme == "s3":
        if "@" in root:
            raise bad("holds credentials", "give them by a Secret or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
        if not BUCKET.match(root):
            raise bad(
                f"has no usable bucket name ({root!r})",
                "write s3://BUCKET/KEY; a bucket has 3 to 63 letters, digits, dots and hyphens",
            )
        return Location("s3", root, _clean_path(path, bad))
    if scheme == "pvc":
        if not CLAIM.match(root):
            raise bad(
                f"has no usable claim name ({root!r})", "write pvc://CLAIM/PATH, CLAIM as `kubectl get pvc` has it"
            )
        return Location("pvc", root, _clean_path(path, bad))
    return _hub(rest, bad)


def _hub(rest: str, bad: Bad) -> Location:
    dataset = rest.startswith("datasets/")
    form = "hf://datasets/ORG/NAME[@REVISION]/PATH" if dataset else "hf://ORG/NAME[@REVISION][/PATH]"
    rest = rest.removeprefix("datasets/").removeprefix("models/")
    if rest.startswith(("spaces/", "buckets/")):
        raise bad("is neither a model nor a data set", "write hf://ORG/NAME or hf://datasets/ORG/NAME/PATH")
    org, _, tail = rest.partition("/")
    name, at, tail_revision = tail.partition("@")
    if at and "/" not in name:
        # A revision may hold slashes (refs/pr/1); as in huggingface_hub, only that form, or %2F, is taken so.
        special = re.match(r"(refs/(?:pr|convert)/[^/]+)(?:/(.*))?\Z", tail_revision)
        revision, path = (special[1], special[2] or "") if special else tail_revision.partition("/")[::2]
        revision = unquote(revision)
        if not REVISION.match(revision) or ".." in revision:
            raise bad(
                f"has no usable revision ({revision!r})", f"write {form}; a revision is a branch, a tag or a commit"
            )
    else:
        name, _, path = tail.partition("/")
        revision = None
    if not HUB_NAME.match(org) or not HUB_NAME.match(name):
        mend = f"write {form}"
        if org and not tail:
            mend += "; the old short names have an ORG now, for example hf://openai-community/gpt2"
        raise bad("does not name a repository", mend)
    return Location("hf", f"{org}/{name}", _clean_path(path, bad), revision=revision, dataset=dataset)


def _web(text: str, scheme: Scheme, bad: Bad) -> Location:
    try:
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise bad("is no URL", "check host and port") from None
    if not host:
        raise bad("names no host", f"write {scheme}://HOST/PATH")
    if parts.username is not None or parts.password is not None:
        raise bad("holds a user or password", "use a signed URL, or s3:// or hf:// with a Secret")
    if scheme == "http" and not LOOPBACK.match(host):
        raise bad("is not encrypted", "use https://; http:// is for this machine only")
    path = parts.path.lstrip("/")
    if host in ("huggingface.co", "hf.co"):
        repo = re.match(r"(?:(datasets)/)?([^/]+)/([^/]+)(?:/(resolve|tree|blob)/([^/]+)(?:/(.*))?)?/?\Z", path)
        if repo and repo[4] != "resolve":
            kind = "datasets/" if repo[1] else ""
            at = f"@{repo[5]}" if repo[5] else ""
            rest = f"/{repo[6]}" if repo[6] else ""
            raise bad("is a web page of the hub", f"write hf://{kind}{repo[2]}/{repo[3]}{at}{rest}")
    authority = f"[{host}]" if ":" in host else host
    return Location(scheme, f"{authority}:{port}" if port else authority, path, query=parts.query)


def _plain_path(text: str, base_dir: Path | None, bad: Bad) -> Location:
    slip = re.match(r"(s3|hf|pvc|file|https?):/*(.*)", text)
    if slip:
        slashes = ":///" if slip[1] == "file" else "://"
        raise bad("has no scheme", f"did you mean {slip[1]}{slashes}{slip[2]}?")
    if base_dir is not None:
        path = (Path(base_dir) / Path(text).expanduser()).absolute()
        return Location("file", "", _clean_path(_resolve_dots(path.as_posix()), bad))
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", text):
        raise bad("has no scheme", f"did you mean hf://{text}?")
    raise bad("is a path on one machine, which pods do not see", f"give {FORMS}")


def _resolve_dots(path: str) -> str:
    parts: list[str] = []
    for part in path.split("/"):
        if part == "..":
            parts = parts[:-1]
        elif part not in ("", "."):
            parts.append(part)
    return "/".join(parts)


def _clean_path(path: str, bad: Bad) -> str:
    path = path.rstrip("/")
    parts = path.split("/") if path else []
    if any(part in ("", ".", "..") for part in parts) or "\\" in path:
        raise bad("has '.', '..', a backslash or an empty part in its path", "write the path straight")
    return "/".join(parts)


def _scheme_mend(scheme: str, shown: str) -> str:
    if scheme in ("gs", "gcs", "r2", "s3a", "s3n", "minio", "oss"):
        return "write s3://BUCKET/KEY and set AWS_ENDPOINT_URL to that storage's S3 endpoint"
    if scheme in ("azure", "az", "abfs", "abfss", "wasb", "wasbs", "adl"):
        return f"Azure's own protocol is not supported: mount it as a volume (pvc://CLAIM/PATH), or give {FORMS}"
    close = difflib.get_close_matches(scheme.lower(), [*SCHEMES, "huggingface"], n=1, cutoff=0.6)
    if close:
        right = "hf" if close[0] == "huggingface" else close[0]
        return f"did you mean {right}://{shown.partition('://')[2]}?"
    return f"give {FORMS}"


def _without_secrets(text: str) -> str:
    """For messages: what stands before an @ in a web address and after a ? may be secret."""
    head, separator, rest = text.partition("://")
    if separator and head.lower() != "hf":
        authority, slash, path = rest.partition("/")
        rest = (f"…@{authority.rpartition('@')[2]}" if "@" in authority else authority) + slash + path
    if separator and head not in ("s3", "hf", "pvc", "file"):  # in these, a ? is part of a glob
        rest = rest.partition("?")[0].partition("#")[0]
    return head + separator + rest
