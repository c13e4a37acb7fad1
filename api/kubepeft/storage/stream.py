"""A byte stream that outlives cut connections: it opens the source again where it broke, and never mixes versions.

Knows no protocol; the storage says how to open at an offset, and which exceptions mean a broken connection.
"""

import io
import time
from collections.abc import Callable
from typing import BinaryIO, Protocol

from kubepeft.errors import TransientError
from kubepeft.storage.store import attempts

BUFFER_SIZE = 1 << 20


class Body(Protocol):
    """The part of a response that is read."""

    def read(self, amt: int, /) -> bytes: ...

    def close(self) -> None: ...


class ResumingStream(io.RawIOBase):
    """Reads `size` bytes (None: unknown) from `open_at(offset)`, opening again after any of `broken`.

    Only attempts that bring no byte count towards the limit. Raises TransientError when that is reached, or when
    the source ends early.
    """

    def __init__(
        self,
        open_at: Callable[[int], Body],
        *,
        first: Body,
        size: int | None,
        where: str,
        broken: tuple[type[Exception], ...],
    ) -> None:
        self._open_at = open_at
        self._body: Body | None = first
        self._size = size
        self._where = where
        self._broken: tuple[type[Exception], ...] = (*broken, EOFError)
        self._offset = 0
        self._fruitless = 0

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._offset

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        view = memoryview(buffer).cast("B")
        while True:
            if self._offset == self._size or not view:
                return self._finish() if self._offset == self._size else 0
            try:
                if self._body is None:
                    self._body = self._open_at(self._offset)
                data = self._body.read(len(view))
                if not data and self._size is not None:
                    raise EOFError
            except self._broken as error:
                self._reopen_later(error)
                continue
            view[: len(data)] = data
            self._offset += len(data)
            self._fruitless = 0
            return len(data)

    def close(self) -> None:
        if self._body is not None:
            self._body.close()
            self._body = None
        super().close()

    def _finish(self) -> int:
        """Reads past the last byte once, so that the client checks the transfer's checksum."""
        if self._body is not None:
            body, self._body = self._body, None
            try:
                body.read(1)
            except self._broken as error:
                raise TransientError(
                    "CorruptTransfer", f"the content arrived damaged ({type(error).__name__})", where=self._where
                ) from error
            finally:
                body.close()
        return 0

    def _reopen_later(self, error: Exception) -> None:
        if self._body is not None:
            self._body.close()
            self._body = None
        self._fruitless += 1
        if self._fruitless >= attempts():
            of = "" if self._size is None else f" of {self._size}"
            raise TransientError(
                "ConnectionCut",
                f"the connection broke {self._fruitless} times at byte {self._offset}{of} ({type(error).__name__})",
                where=self._where,
                mend="try again; if it stays so, look at the network and the storage server",
            ) from error
        time.sleep(0.25 * 2 ** (self._fruitless - 1))


def buffered(stream: ResumingStream) -> BinaryIO:
    return io.BufferedReader(stream, BUFFER_SIZE)
