"""What every storage can do, whatever lies behind it: the two protocols, and what follows from them alone.

Nothing here knows a scheme, and nothing here imports a client library.

Keys are relative paths with "/" between the parts: the object key in a bucket, the path below a mount,
the path in a hub repository. A "folder" is a prefix that ends at a "/" (or "" for everything).
"""

import difflib
import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from kubepeft.errors import UserError

GLOB_CHARACTERS = re.compile(r"[*?\[]")


@dataclass(frozen=True, order=True)
class Entry:
    """One stored file: its key, its size in bytes, and what changes when its content does (an etag, a blob id)."""

    key: str
    size: int
    version: str


class Reader(Protocol):
    """A place to read from. Every method raises UserError or TransientError (after its own retries)."""

    def uri(self, key: str) -> str:
        """How messages name this key; never holds a credential or a signature."""
        ...

    def stat(self, key: str) -> Entry | None:
        """The entry at exactly this key, or None."""
        ...

    def entries(self, folder: str) -> Iterator[Entry]:
        """All entries below the folder, at any depth, ordered by key; none when there is no such folder."""
        ...

    def open(self, key: str) -> BinaryIO:
        """A stream over one version of the content; a cut connection is taken up again where it broke."""
        ...

    def read(self, key: str) -> bytes | None:
        """The whole content, or None when there is no such key."""
        ...

    def download(self, files: Mapping[str, Path]) -> None:
        """Fetches many keys in parallel, each to its path; a file appears there only when it is whole."""
        ...


class Store(Reader, Protocol):
    """A place to write to as well."""

    def create(self, key: str, data: bytes) -> bool:
        """Writes `data` if there is nothing at `key`, in one atomic step; False if there is something."""
        ...

    def replace(self, key: str, data: bytes, *, expected: bytes) -> bool:
        """Writes `data` if `key` still holds `expected`, in one atomic step; False otherwise."""
        ...

    def upload(self, files: Mapping[str, Path]) -> None:
        """Writes many local files in parallel, each to its key; a key appears only when it is whole."""
        ...

    def copy(self, keys: Mapping[str, str]) -> None:
        """Copies source key → target key within the storage, in parallel, without passing through this machine
        where the storage can. Raises UserError with reason NoSuchKey if a source is missing."""
        ...

    def delete(self, keys: Iterable[str]) -> None:
        """Removes these keys; one that is not there is no error."""
        ...


def attempts() -> int:
    """How often a request is tried in all. Seven attempts with growing pauses wait about half a minute, one at most."""
    return int(os.environ.get("KUBEPEFT_STORAGE_ATTEMPTS", "7"))


def join(*parts: str) -> str:
    """Joins key parts, leaving out the empty ones."""
    return "/".join(part.strip("/") for part in parts if part.strip("/"))


def relative(folder: str, key: str) -> str:
    """The key as seen from the folder that holds it."""
    return key[len(folder.strip("/")) :].lstrip("/") if folder.strip("/") else key


def is_glob(path: str) -> bool:
    return GLOB_CHARACTERS.search(path) is not None


def glob_pattern(path: str) -> re.Pattern[str]:
    """A regular expression for a glob: `*` and `?` stay within one part, `**` spans parts, `[a-z]` is a class."""
    out: list[str] = []
    i = 0
    while i < len(path):
        if path.startswith("**/", i):
            out.append("(?:[^/]+/)*")
            i += 3
        elif path.startswith("**", i):
            out.append(".*")
            i += 2
        elif path[i] == "*":
            out.append("[^/]*")
            i += 1
        elif path[i] == "?":
            out.append("[^/]")
            i += 1
        elif path[i] == "[" and (end := path.find("]", i + 2)) > 0:
            body = path[i + 1 : end].replace("\\", "\\\\")
            out.append(f"[^/{body[1:]}]" if body[0] in "!^" else f"[{body}]")
            i = end + 1
        else:
            out.append(re.escape(path[i]))
            i += 1
    return re.compile("".join(out) + r"\Z")


def find(reader: Reader, path: str) -> list[Entry]:
    """The entries that a path names: the file itself, all files matching a glob, or all files below a folder.

    Raises UserError with reason NothingFound, saying what lies nearby, when there is none.
    """
    found: list[Entry] = []
    if path and (entry := reader.stat(path)):
        return [entry]
    if is_glob(path):
        folder = _fixed_folder(path)
        pattern = glob_pattern(path)
        found = [entry for entry in reader.entries(folder) if pattern.match(entry.key)]
    else:
        folder = path
        found = list(reader.entries(path))
    if not found:
        raise UserError(
            "NothingFound",
            "no file matches" if is_glob(path) else "there is no such file or folder",
            where=reader.uri(path),
            mend=_nearby(reader, path, folder),
        )
    return found


def fingerprint(entries: Iterable[Entry], folder: str = "") -> str:
    """A digest of what lies in a folder, from names, sizes and versions alone: 40 hex digits, as a commit has."""
    digest = hashlib.sha256()
    for entry in sorted(entries):
        digest.update(f"{relative(folder, entry.key)}\0{entry.size}\0{entry.version}\n".encode())
    return digest.hexdigest()[:40]


def _fixed_folder(path: str) -> str:
    fixed = path[: GLOB_CHARACTERS.search(path).start()]  # type: ignore[union-attr]
    return fixed.rpartition("/")[0]


def _nearby(reader: Reader, path: str, folder: str) -> str:
    around = folder if is_glob(path) else path.rpartition("/")[0]
    names: list[str] = []
    for entry in reader.entries(around):
        name = relative(around, entry.key).partition("/")[0]
        if name not in names:
            names.append(name)
        if len(names) == 200:  # enough to guess from; a bucket may hold millions
            break
    if not names:
        return f"nothing lies below {reader.uri(around)}; check the spelling"
    wanted = path.rpartition("/")[2]
    close = difflib.get_close_matches(wanted, names, n=3) or names[:5]
    return f"below {reader.uri(around)} there is: {', '.join(close)}"
