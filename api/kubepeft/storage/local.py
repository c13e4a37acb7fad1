"""Storage on a file system: file:///DIR, plain paths, and the mounts of pvc:// claims.

Every write goes to a temporary name beside its target, is flushed to the disk and then renamed or linked, so a
kill at any time leaves the old content or the new, never a part.
"""

import errno
import fcntl
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TypeVar

from kubepeft.errors import KubepeftError, TransientError, UserError
from kubepeft.storage.store import Entry, join

TEMPORARY = ".kubepeft-part-"
"""Files of this prefix are writes that are under way or were killed; listings leave them out."""
THREADS = 4
Item = TypeVar("Item")


class LocalStore:
    """Keys are paths below `root`; `base` is how messages name that root ("file://", "pvc://CLAIM")."""

    def __init__(self, root: Path, base: str) -> None:
        self._root = root
        self._base = base

    def uri(self, key: str) -> str:
        return f"{self._base}/{key}"

    def stat(self, key: str) -> Entry | None:
        with file_errors(self.uri(key)):
            try:
                status = self._path(key).stat()
            except (FileNotFoundError, NotADirectoryError):
                return None
            return _entry(key, status) if stat.S_ISREG(status.st_mode) else None

    def entries(self, folder: str) -> Iterator[Entry]:
        with file_errors(self.uri(folder)):
            yield from sorted(self._walk(folder))

    def open(self, key: str) -> BinaryIO:
        with file_errors(self.uri(key)):
            return open(self._path(key), "rb")

    def read(self, key: str) -> bytes | None:
        with file_errors(self.uri(key)):
            try:
                return self._path(key).read_bytes()
            except (FileNotFoundError, NotADirectoryError):
                return None

    def create(self, key: str, data: bytes) -> bool:
        def link(part: Path, target: Path) -> None:
            try:
                os.link(part, target)
            except OSError as error:
                if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
                    raise
                # A file system without hard links: still exactly one creator, but a kill may leave a part.
                with open(target, "xb") as file:
                    _write_all(file, data)

        try:
            self._write(key, lambda file: _write_all(file, data), link)
        except FileExistsError:
            return False
        return True

    def replace(self, key: str, data: bytes, *, expected: bytes) -> bool:
        path = self._path(key)
        while True:
            try:
                with (
                    file_errors(self.uri(key), passing=(FileNotFoundError, NotADirectoryError)),
                    open(path, "rb") as current,
                ):
                    # The lock is on the file itself, and a rename puts another file in its place: whoever waited
                    # for the old one must look again.
                    fcntl.flock(current, fcntl.LOCK_EX)
                    if not os.path.samestat(os.fstat(current.fileno()), path.stat()):
                        continue
                    if current.read() != expected:
                        return False
                    self._write(key, lambda file: _write_all(file, data), os.replace)
                    return True
            except (FileNotFoundError, NotADirectoryError):
                return False

    def upload(self, files: Mapping[str, Path]) -> None:
        _in_parallel(lambda key, source: self._put(source, self.uri(key), key), files)

    def download(self, files: Mapping[str, Path]) -> None:
        def fetch(key: str, target: Path) -> None:
            with file_errors(self.uri(key)), open(self._path(key), "rb") as source:
                write_beside(target, lambda file: shutil.copyfileobj(source, file, 1 << 20), os.replace)

        _in_parallel(fetch, files)

    def copy(self, keys: Mapping[str, str]) -> None:
        _in_parallel(self._copy, keys)

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            with file_errors(self.uri(key)):
                path = self._path(key)
                try:
                    path.unlink()
                except (FileNotFoundError, NotADirectoryError):
                    continue
                _remove_empty(path.parent, self._root)

    def _copy(self, source: str, target: str) -> None:
        path = self._path(source)
        with file_errors(self.uri(source)), open(path, "rb") as opened:

            def publish(part: Path, place: Path) -> None:
                # Whoever overrules an attempt removes its files first. A copy of them that is still on its way must not
                # land on what has been published since; a server's own copy has no such gap between reading and naming.
                if not os.path.samestat(path.stat(), os.fstat(opened.fileno())):
                    raise FileNotFoundError(errno.ENOENT, "replaced while it was copied")
                part.replace(place)

            self._write(target, lambda file: shutil.copyfileobj(opened, file, 1 << 20), publish)

    def _put(self, source: Path, source_name: str, key: str) -> None:
        with file_errors(source_name), open(source, "rb") as opened:
            self._write(key, lambda file: shutil.copyfileobj(opened, file, 1 << 20), os.replace)

    def _write(self, key: str, fill: Callable[[BinaryIO], None], publish: Callable[[Path, Path], None]) -> None:
        with file_errors(self.uri(key), passing=(FileExistsError,)):
            write_beside(self._path(key), fill, publish)

    def _path(self, key: str) -> Path:
        if any(part in ("", ".", "..") for part in key.split("/")) and key:
            raise ValueError(f"not a key: {key!r}")
        return self._root / key

    def _walk(self, folder: str) -> Iterator[Entry]:
        top = self._path(folder)
        for parent, _, names in os.walk(top, onerror=_raise_unless_missing):
            below = Path(parent).relative_to(top).as_posix()
            for name in names:
                if name.startswith(TEMPORARY):
                    continue
                try:
                    status = (Path(parent) / name).stat()
                except FileNotFoundError:  # removed meanwhile, or a link to nothing
                    continue
                if stat.S_ISREG(status.st_mode):
                    yield _entry(join(folder, "" if below == "." else below, name), status)


def _in_parallel(work: Callable[[str, Item], None], items: Mapping[str, Item]) -> None:
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(work, items.keys(), items.values()))


@contextmanager
def file_errors(where: str, passing: tuple[type[OSError], ...] = ()) -> Iterator[None]:
    """Turns what the operating system says into what the user can do; `passing` go through as they are."""
    try:
        yield
    except KubepeftError:
        raise
    except passing:
        raise
    except OSError as error:
        raise _told(error, where) from error


def _told(error: OSError, where: str) -> KubepeftError:
    what = error.strerror or type(error).__name__
    match error.errno:
        case errno.ENOENT:
            return UserError("NoSuchKey", "there is no such file", where=where, mend="check the path")
        case errno.EACCES | errno.EPERM | errno.EROFS:
            return UserError(
                "AccessDenied",
                what,
                where=where,
                mend=f"let user {os.getuid()} read and write there, or use another place",
            )
        case errno.ENOSPC | errno.EDQUOT:
            return UserError("DiskFull", what, where=where, mend="free space there, or use a larger volume")
        case errno.ENOTDIR | errno.EISDIR | errno.ENAMETOOLONG | errno.EINVAL | errno.ELOOP | errno.EEXIST:
            return UserError(
                "BadPath", what, where=where, mend="a file and a folder may not share a name; check the path"
            )
    return TransientError("FileSystemError", what, where=where, mend="look at the volume and the node's log")


def _entry(key: str, status: os.stat_result) -> Entry:
    return Entry(key, status.st_size, f"{status.st_mtime_ns:x}-{status.st_size:x}")


def _write_all(file: BinaryIO, data: bytes) -> None:
    file.write(data)
    file.flush()
    os.fsync(file.fileno())


def write_beside(
    target: Path, fill: Callable[[BinaryIO], None], publish: Callable[[Path, Path], None] = os.replace
) -> None:
    """Fills a temporary file beside `target`, flushes it to the disk, and only then gives it the name."""
    part = target.with_name(f"{TEMPORARY}{secrets.token_hex(6)}")
    try:
        with _open_new(part) as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        publish(part, target)
        _sync_folder(target.parent)
    finally:
        part.unlink(missing_ok=True)


def _open_new(path: Path) -> BinaryIO:
    # Another attempt that deletes its files may remove the empty folder between mkdir and open.
    for _ in range(100):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            return open(path, "xb")
        except FileNotFoundError:
            continue
    return open(path, "xb")


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_empty(folder: Path, root: Path) -> None:
    """A bucket has no empty folders; so that both look the same, none stay here either."""
    while folder != root:
        try:
            folder.rmdir()
        except OSError:  # not empty, a mount point, or removed by another
            return
        folder = folder.parent


def _raise_unless_missing(error: OSError) -> None:
    if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
        raise error
