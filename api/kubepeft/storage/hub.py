"""Repositories of the Hugging Face Hub, read only, always at one commit.

Token, cache folder, endpoint and offline mode are huggingface_hub's own settings (HF_TOKEN, HF_HOME, HF_ENDPOINT,
HF_HUB_OFFLINE). Weights are taken as safetensors only: the other formats are pickles, which run code when loaded.
"""

import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from kubepeft.errors import KubepeftError, TransientError, UserError
from kubepeft.storage.local import LocalStore, file_errors
from kubepeft.storage.store import Entry, attempts, relative
from kubepeft.storage.uri import Location

if TYPE_CHECKING:
    from huggingface_hub import HfApi

COMMIT = re.compile(r"[0-9a-f]{40}\Z")
WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors\Z")
PICKLES = re.compile(r".*\.(bin|pt|pth|ckpt|pkl|msgpack|h5|gguf)\Z")
TEXTS = re.compile(r"[^/]*\.(json|txt|model|jinja|tiktoken|spm|bpe)\Z|additional_chat_templates/[^/]*\.jinja\Z")
CODE = re.compile(r"(.*/)?[^/]*\.py\Z")
LICENCE = re.compile(r"(?i)(licen[cs]e|notice)[^/]*\Z")


def select_model_files(paths: Iterable[str], *, where: str, code: bool = False) -> list[str]:
    """Of a model folder's files, those that loading it needs: safetensors weights, configuration, tokenizer.

    `code` adds Python files, for trustRemoteCode. Raises UserError with reason NoSafetensors if the weights are in
    other formats only, or missing.
    """
    paths = sorted(paths)
    top = [path for path in paths if "/" not in path and path.endswith(".safetensors")]
    weights = [path for path in top if WEIGHTS.match(path)] or [
        path
        for path in top
        if not path.startswith("consolidated")  # a second copy in the maker's own layout
    ]
    if not weights:
        pickles = [path for path in paths if PICKLES.match(path)]
        raise UserError(
            "NoSafetensors",
            f"the weights are in {pickles[0]}, not in safetensors"
            if pickles
            else "there are no weights (*.safetensors)",
            where=where,
            mend="use a model or a revision with safetensors (on the hub, https://huggingface.co/spaces/safetensors/convert "
            "makes one, often found at @refs/pr/N), or save it again with save_pretrained",
        )
    others = [path for path in paths if TEXTS.match(path) or LICENCE.match(path) or (code and CODE.match(path))]
    return sorted({*weights, *others})


class HubStore:
    """A Reader of the repository at `location`; keys are paths in it. Files pass through huggingface_hub's cache."""

    def __init__(self, location: Location, *, cache_dir: Path | None = None) -> None:
        self._location = location
        self._api = _api()
        self._cache_dir = cache_dir
        self._entries: dict[str, Entry] | None = None
        self._commit = ""

    @property
    def commit(self) -> str:
        """The commit that is read: 40 hex digits."""
        if not self._commit:
            self._commit = resolve_revision(self._location, cache_dir=self._cache_dir)
        return self._commit

    def uri(self, key: str) -> str:
        at = Location("hf", self._location.root, key, revision=self._location.revision, dataset=self._location.dataset)
        return str(at)

    def stat(self, key: str) -> Entry | None:
        return self._tree().get(key)

    def entries(self, folder: str) -> Iterator[Entry]:
        prefix = f"{folder.strip('/')}/" if folder.strip("/") else ""
        return (entry for key, entry in sorted(self._tree().items()) if key.startswith(prefix))

    def open(self, key: str) -> BinaryIO:
        path = self._local(key)
        return open(path, "rb")

    def read(self, key: str) -> bytes | None:
        return self._local(key).read_bytes() if self.stat(key) else None

    def download(self, files: Mapping[str, Path]) -> None:
        cached = {str(self._local(key)).lstrip("/"): target for key, target in files.items()}
        LocalStore(Path("/"), "file://").download(cached)

    def snapshot(self, *, code: bool = False) -> Path:
        """The local folder of the model's files at this commit (see `select_model_files`), below `location.path`."""
        from huggingface_hub import snapshot_download

        folder = self._location.path
        where = self.uri(folder)
        names = select_model_files(
            (relative(folder, entry.key) for entry in self.entries(folder)), where=where, code=code
        )
        wanted = [f"{folder}/{name}" if folder else name for name in names]
        with file_errors(where), hub_errors(where):
            root = snapshot_download(
                self._location.root,
                repo_type=self._kind,
                revision=self.commit,
                allow_patterns=[_literal(name) for name in wanted],
                cache_dir=self._cache_dir,
                endpoint=_endpoint(),
            )
        return Path(root) / folder

    @property
    def _kind(self) -> str:
        return "dataset" if self._location.dataset else "model"

    def _local(self, key: str) -> Path:
        from huggingface_hub import hf_hub_download

        where = self.uri(key)
        with file_errors(where), hub_errors(where):
            path = hf_hub_download(
                self._location.root,
                key,
                repo_type=self._kind,
                revision=self.commit,
                cache_dir=self._cache_dir,
                endpoint=_endpoint(),
            )
        return Path(path)

    def _tree(self) -> dict[str, Entry]:
        if self._entries is None:
            self._entries = {entry.key: entry for entry in self._list_tree()}
        return self._entries

    def _list_tree(self) -> list[Entry]:
        from huggingface_hub import constants, get_cached_repo_tree
        from huggingface_hub.hf_api import RepoFile

        with hub_errors(self.uri("")):
            files: Iterable[object]
            if constants.HF_HUB_OFFLINE:
                files = get_cached_repo_tree(
                    self._location.root, repo_type=self._kind, revision=self.commit, cache_dir=self._cache_dir
                )
            else:
                files = list(
                    self._api.list_repo_tree(
                        self._location.root, repo_type=self._kind, revision=self.commit, recursive=True
                    )
                )
        return [
            Entry(file.path, file.size, file.lfs.sha256 if file.lfs else file.blob_id)
            for file in files
            if isinstance(file, RepoFile)
        ]


def resolve_revision(location: Location, *, cache_dir: Path | None = None) -> str:
    """The commit (40 hex digits) that an hf:// address means now; a branch without a name means the default branch.

    Raises UserError with reason RepositoryNotFound, RevisionNotFound, AccessDenied or NotCached (offline).
    """
    if location.revision and COMMIT.match(location.revision):
        return location.revision
    # Listings and downloads are tried again by huggingface_hub itself; this call is not.
    for attempt in range(attempts()):
        try:
            with hub_errors(str(location)):
                resolved = _api().resolve_revision(
                    location.root,
                    repo_type="dataset" if location.dataset else "model",
                    revision=location.revision,
                    cache_dir=cache_dir,
                )
            return resolved.resolved
        except TransientError:
            if attempt + 1 >= attempts():
                raise
            time.sleep(min(0.5 * 2**attempt, 20))
    raise ValueError("KUBEPEFT_STORAGE_ATTEMPTS must be at least 1")


def _endpoint() -> str | None:
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or None


def _api() -> "HfApi":
    from huggingface_hub import HfApi

    return HfApi(endpoint=_endpoint(), library_name="kubepeft")


def _literal(path: str) -> str:
    """A path as an fnmatch pattern that matches it alone."""
    return re.sub(r"([*?\[])", r"[\1]", path)


@contextmanager
def hub_errors(where: str) -> Iterator[None]:
    """Turns what huggingface_hub says into what the user can do. Its own messages hold URLs, so they are not passed on."""
    import httpx2
    from huggingface_hub import errors

    try:
        yield
    except KubepeftError:
        raise
    except errors.GatedRepoError as error:
        raise UserError(
            "AccessDenied", "the repository is gated", where=where,
            mend="accept its terms on its page, and set HF_TOKEN to a token of that account "
            "(in a cluster: the Secret in spec.credentials.huggingFace)",
        ) from error  # fmt: skip
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            "RepositoryNotFound", "there is no such repository, or it is private", where=where,
            mend="check ORG/NAME; for a private one set HF_TOKEN (in a cluster: the Secret in spec.credentials.huggingFace)",
        ) from error  # fmt: skip
    except errors.RevisionNotFoundError as error:
        raise UserError(
            "RevisionNotFound", "the repository has no such revision", where=where,
            mend="give a branch, tag or commit that it has, or none for its default branch",
        ) from error  # fmt: skip
    except errors.DisabledRepoError as error:
        raise UserError(
            "AccessDenied", "the repository was disabled by the hub", where=where, mend="use another one"
        ) from error
    except errors.HFValidationError as error:
        raise UserError("BadUri", "the hub allows no such name", where=where, mend="write hf://ORG/NAME") from error
    except errors.HfHubHTTPError as error:
        raise _told(error.response.status_code, where) from error
    except (
        errors.LocalEntryNotFoundError,
        errors.CachedRepoTreeNotFoundError,
        errors.RevisionResolutionError,
        errors.OfflineModeIsEnabled,
    ) as error:
        raise _told_unreachable(error, where) from error
    except httpx2.HTTPError as error:
        raise TransientError(
            "NoConnection", f"the hub cannot be reached ({type(error).__name__})", where=where,
            mend="check the network, HF_ENDPOINT and the proxy settings",
        ) from error  # fmt: skip


def _told(status: int, where: str) -> KubepeftError:
    if status in (401, 403):
        return UserError(
            "AccessDenied", f"the hub answered {status}", where=where,
            mend="check that HF_TOKEN is valid and may read this repository",
        )  # fmt: skip
    if status == 404:
        return UserError("NoSuchKey", "the repository has no such file", where=where, mend="check the path")
    if status == 429 or status >= 500:
        return TransientError(
            f"Http{status}", f"the hub answered {status} to every attempt", where=where, mend="try again later"
        )
    return UserError(f"Http{status}", f"the hub answered {status}", where=where, mend="check the address")


def _told_unreachable(error: Exception, where: str) -> KubepeftError:
    """huggingface_hub looks into its cache when the hub fails, and then says only that nothing was there."""
    from huggingface_hub import constants, errors

    cause = error.__cause__
    if isinstance(cause, errors.HfHubHTTPError):
        return _told(cause.response.status_code, where)
    if constants.HF_HUB_OFFLINE:
        return UserError(
            "NotCached", "HF_HUB_OFFLINE is set, and the cache does not hold this", where=where,
            mend="unset HF_HUB_OFFLINE, or fill the cache (HF_HOME) first",
        )  # fmt: skip
    name = type(cause or error).__name__
    return TransientError(
        "NoConnection", f"the hub cannot be reached ({name}), and the cache does not hold this", where=where,
        mend="check the network, HF_ENDPOINT and the proxy settings",
    )  # fmt: skip
