"""Files behind one https:// address (http:// on this machine only). Read only, one key, nothing to list.

A query string may hold a signature: it is sent, and never shown.
"""

import shutil
import ssl
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

import urllib3
from urllib3.exceptions import HTTPError, MaxRetryError, ResponseError, SSLError

from kubepeft.errors import KubepeftError, TransientError, UserError
from kubepeft.storage.local import file_errors, write_beside
from kubepeft.storage.store import Entry, attempts
from kubepeft.storage.stream import ResumingStream, buffered
from kubepeft.storage.uri import LOOPBACK, Location

RETRIED = (408, 425, 429, 500, 502, 503, 504)


class WebStore:
    """A Reader with the one key `location.path`."""

    def __init__(self, location: Location) -> None:
        self._location = location
        self._url = f"{location.scheme}://{location.root}/{location.path}"
        if location.query:
            self._url += f"?{location.query}"
        self._pool = _pool(location)

    def uri(self, key: str) -> str:
        return f"{self._location.scheme}://{self._location.root}/{key}"

    def stat(self, key: str) -> Entry | None:
        if key != self._location.path:
            return None
        # Not HEAD: a URL signed for GET refuses it.
        try:
            response = self._get(0, ranged=True)
        except UserError as error:
            if error.reason == "NoSuchKey":
                return None
            raise
        response.close()
        return Entry(key, _total(response) or 0, _version(response))

    def entries(self, folder: str) -> Iterator[Entry]:
        return iter(())

    def open(self, key: str) -> BinaryIO:
        first = self._get(0)
        version, size = _version(first), _total(first)

        def open_at(offset: int) -> urllib3.BaseHTTPResponse:
            response = self._get(offset, version=version)
            if _version(response) != version or _total(response) != size:
                response.close()
                raise TransientError(
                    "ChangedWhileRead", "the file changed while it was read", where=self.uri(key), mend="try again"
                )
            if response.status == 200:  # the server knows no ranges
                _skip(response, offset)
            return response

        return buffered(
            ResumingStream(open_at, first=first, size=size, where=self.uri(key), broken=(HTTPError, OSError))
        )

    def read(self, key: str) -> bytes | None:
        try:
            with self.open(key) as stream:
                return stream.read()
        except UserError as error:
            if error.reason == "NoSuchKey":
                return None
            raise

    def download(self, files: Mapping[str, Path]) -> None:
        for key, target in files.items():
            with self.open(key) as source, file_errors(str(target)):
                write_beside(target, partial(shutil.copyfileobj, source, length=1 << 20))

    def _get(self, offset: int, *, ranged: bool = False, version: str = "") -> urllib3.BaseHTTPResponse:
        headers = {"Accept-Encoding": "identity", "User-Agent": "kubepeft"}
        if offset or ranged:
            headers["Range"] = f"bytes={offset}-" if offset else "bytes=0-0"
            if offset and version.startswith('"'):
                headers["If-Range"] = version
        where = self.uri(self._location.path)
        for attempt in range(attempts()):
            with web_errors(where):
                response = self._pool.request("GET", self._url, headers=headers, preload_content=False)
            # Where neither is said, the end of the file can't be told from a connection that is cut.
            if "Content-Length" in response.headers or "Transfer-Encoding" in response.headers:
                break
            response.close()
            time.sleep(0.25 * 2**attempt)
        else:
            raise TransientError(
                "ConnectionCut",
                "the answers break off in their headers, or say no length",
                where=where,
                mend="try again",
            )
        if response.status in (200, 206) or (response.status == 416 and not offset):  # 416: an empty file
            end = urlsplit(response.geturl() or "")
            if end.scheme == "http" and not LOOPBACK.match(end.hostname or ""):
                response.close()
                raise UserError(
                    "BadUri",
                    "the server redirects to plain http",
                    where=where,
                    mend="use the https:// address it should be",
                )
            return response
        response.close()
        raise _told(response.status, where)


def _pool(location: Location) -> urllib3.PoolManager:
    retries = urllib3.Retry(
        total=attempts() - 1, backoff_factor=0.25, backoff_max=20, status_forcelist=RETRIED, raise_on_status=True
    )
    timeout = urllib3.Timeout(connect=10, read=60)
    proxy = urllib.request.getproxies().get(location.scheme)
    if proxy and not urllib.request.proxy_bypass(location.root):
        return urllib3.ProxyManager(proxy, retries=retries, timeout=timeout)
    return urllib3.PoolManager(retries=retries, timeout=timeout)


@contextmanager
def web_errors(where: str) -> Iterator[None]:
    try:
        yield
    except KubepeftError:
        raise
    except MaxRetryError as error:
        if isinstance(error.reason, SSLError) and isinstance(error.reason.args[0], ssl.SSLCertVerificationError):
            raise UserError(
                "BadCertificate", "the server's certificate is not trusted here", where=where,
                mend="set SSL_CERT_FILE to a file with the CA's certificate",
            ) from error  # fmt: skip
        what = str(error.reason) if isinstance(error.reason, ResponseError) else type(error.reason).__name__
        raise TransientError(
            "NoConnection", f"every attempt failed ({what})", where=where, mend="try again later; check the address"
        ) from error
    except HTTPError as error:
        raise TransientError(
            "NoConnection", f"the request failed ({type(error).__name__})", where=where, mend="check the address"
        ) from error


def _told(status: int, where: str) -> KubepeftError:
    if status in (404, 410):
        return UserError("NoSuchKey", f"the server answered {status}", where=where, mend="check the address")
    if status in (401, 403):
        return UserError(
            "AccessDenied", f"the server answered {status}", where=where,
            mend="a signed URL may have run out; make a new one, or use s3:// or hf:// with a Secret",
        )  # fmt: skip
    if status == 416:
        return TransientError("ChangedWhileRead", "the file became shorter while it was read", where=where)
    if status >= 500:
        return TransientError(f"Http{status}", f"the server answered {status}", where=where, mend="try again later")
    return UserError(f"Http{status}", f"the server answered {status}", where=where, mend="check the address")


def _total(response: urllib3.BaseHTTPResponse) -> int | None:
    """The size of the whole file in bytes, or None when the server does not say."""
    if "Content-Range" in response.headers:
        total = response.headers["Content-Range"].rpartition("/")[2]
        return int(total) if total.isdigit() else None
    length = response.headers.get("Content-Length", "")
    return int(length) if length.isdigit() else None


def _version(response: urllib3.BaseHTTPResponse) -> str:
    return response.headers.get("ETag") or response.headers.get("Last-Modified") or ""


def _skip(response: urllib3.BaseHTTPResponse, count: int) -> None:
    while count:
        count -= len(response.read(min(count, 1 << 20))) or count
