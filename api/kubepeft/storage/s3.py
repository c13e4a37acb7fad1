"""Storage in a bucket of any S3 server. Credentials, region, endpoint and CA come from boto3's own settings
(AWS_ENDPOINT_URL or AWS_ENDPOINT_URL_S3, AWS_REGION, AWS_CA_BUNDLE, profiles, workload identity, …).

All requests of kubepeft to S3 are made here. No message from here holds a key id, a secret or a signature: servers
send those back in error documents, so only their error code and message are passed on.
"""

import mimetypes
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import boto3
import urllib3.exceptions
from boto3.exceptions import Boto3Error
from boto3.s3.transfer import TransferConfig, create_transfer_manager
from botocore import exceptions as boto_errors
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from kubepeft.errors import KubepeftError, TransientError, UserError
from kubepeft.storage.local import file_errors, write_beside
from kubepeft.storage.store import Entry, attempts
from kubepeft.storage.stream import ResumingStream, buffered

PARALLEL = 10
PART_SIZE = 16 << 20
DELETE_AT_ONCE = 1000

CUT = (
    boto_errors.HTTPClientError,
    boto_errors.IncompleteReadError,
    boto_errors.FlexibleChecksumError,
    urllib3.exceptions.HTTPError,
    OSError,
)
"""What reading a body raises when the connection breaks or the bytes are damaged on the way."""


class S3Store:
    """Keys are object keys in `bucket`. One client, safe to use from many threads, not across fork()."""

    def __init__(self, bucket: str) -> None:
        self._bucket = bucket
        with s3_errors(f"s3://{bucket}"):
            self._client = _client()
        self._manager = create_transfer_manager(
            self._client,
            TransferConfig(
                multipart_threshold=PART_SIZE,
                multipart_chunksize=PART_SIZE,
                max_concurrency=PARALLEL,
                preferred_transfer_client="classic",
            ),
        )

    def uri(self, key: str) -> str:
        return f"s3://{self._bucket}/{key}"

    def stat(self, key: str) -> Entry | None:
        with s3_errors(self.uri(key)):
            try:
                head = self._client.head_object(Bucket=self._bucket, Key=key)
            except ClientError:
                head = None
            if head is None:
                # The answer to HEAD has no body, so it cannot say whether key, bucket or permission is missing.
                try:
                    head = self._client.get_object(Bucket=self._bucket, Key=key)
                except ClientError as error:
                    if _code(error) == "NoSuchKey":
                        return None
                    raise
                head["Body"].close()
        return Entry(key, head["ContentLength"], _version(head))

    def entries(self, folder: str) -> Iterator[Entry]:
        prefix = f"{folder.strip('/')}/" if folder.strip("/") else ""
        more: dict[str, str] = {}
        while True:
            with s3_errors(self.uri(folder)):
                page = self._client.list_objects_v2(Bucket=self._bucket, Prefix=prefix, **more)
            for item in page.get("Contents", []):
                if not item["Key"].endswith("/"):  # an empty object that a console made to show a folder
                    yield Entry(item["Key"], item["Size"], _version(item))
            if not page.get("IsTruncated"):
                return
            more = {"ContinuationToken": page["NextContinuationToken"]}

    def open(self, key: str) -> BinaryIO:
        return self._stream(key, self._get(key))

    def _stream(self, key: str, first: dict[str, Any], start: int = 0, end: int | None = None) -> BinaryIO:
        """Reads on from the answer `first`; start and end (exclusive) are the range that was asked for."""
        where = self.uri(key)

        def open_at(offset: int) -> Any:
            return self._get_same(key, first, start + offset, end)["Body"]

        return buffered(
            ResumingStream(open_at, first=first["Body"], size=first["ContentLength"], where=where, broken=CUT)
        )

    def _get_same(self, key: str, first: dict[str, Any], start: int, end: int | None) -> dict[str, Any]:
        """A range of the very version that `first` was an answer about."""
        again = self._get(key, Range=f"bytes={start}-" + ("" if end is None else str(end - 1)))
        if any(again.get(name) != first.get(name) for name in ("ETag", "LastModified")):
            again["Body"].close()
            raise TransientError(
                "ChangedWhileRead", "the object changed while it was read", where=self.uri(key), mend="try again"
            )
        return again

    def _get(self, key: str, **more: str) -> dict[str, Any]:
        for attempt in range(attempts()):
            with s3_errors(self.uri(key)):
                response: dict[str, Any] = self._client.get_object(Bucket=self._bucket, Key=key, **more)
            # A connection that is cut within the headers looks like a short answer of unknown length.
            if "ContentLength" in response and "LastModified" in response:
                return response
            response["Body"].close()
            time.sleep(0.25 * 2**attempt)
        raise TransientError(
            "ConnectionCut", "the answers break off in their headers", where=self.uri(key), mend="try again"
        )

    def read(self, key: str) -> bytes | None:
        for attempt in range(attempts()):
            try:
                with self.open(key) as stream:
                    return stream.read()
            except UserError as error:
                if error.reason == "NoSuchKey":
                    return None
                raise
            except TransientError as error:
                # A document that changed, or whose first answer broke off within its etag, is simply read anew.
                if error.reason != "ChangedWhileRead" or attempt + 1 == attempts():
                    raise
        return None

    def create(self, key: str, data: bytes) -> bool:
        return self._put_if(key, data, IfNoneMatch="*")

    def replace(self, key: str, data: bytes, *, expected: bytes) -> bool:
        with s3_errors(self.uri(key)):
            try:
                response = self._client.get_object(Bucket=self._bucket, Key=key)
            except ClientError as error:
                if _code(error) == "NoSuchKey":
                    return False
                raise
            body = response["Body"]
            try:
                if body.read() != expected:
                    return False
            finally:
                body.close()
        return self._put_if(key, data, IfMatch=response["ETag"])

    def upload(self, files: Mapping[str, Path]) -> None:
        def submit(key: str) -> Any:
            kind = mimetypes.guess_type(key)[0]
            return self._manager.upload(
                str(files[key]), self._bucket, key, extra_args={"ContentType": kind} if kind else {}
            )

        self._transfer(submit, files)

    def download(self, files: Mapping[str, Path]) -> None:
        # Not by s3transfer: when an answer breaks off in its headers, it leaves a hole of zeros and reports success.
        with ThreadPoolExecutor(PARALLEL) as parts, ThreadPoolExecutor(PARALLEL) as whole:
            running = [whole.submit(self._download, key, target, parts) for key, target in files.items()]
            try:
                for future in running:
                    future.result()
            except BaseException:
                whole.shutdown(wait=False, cancel_futures=True)
                parts.shutdown(wait=False, cancel_futures=True)
                raise

    def _download(self, key: str, target: Path, parts: ThreadPoolExecutor) -> None:
        first = self._get(key)
        size = first["ContentLength"]
        with file_errors(str(target)):
            if size <= 2 * PART_SIZE:
                with self._stream(key, first) as stream:
                    write_beside(target, partial(shutil.copyfileobj, stream, length=1 << 20))
                return
            first["Body"].close()

            def fill(file: BinaryIO) -> None:
                starts = range(0, size, PART_SIZE)
                list(
                    parts.map(
                        lambda start: self._fetch_part(key, first, start, min(start + PART_SIZE, size), file), starts
                    )
                )

            write_beside(target, fill)

    def _fetch_part(self, key: str, first: dict[str, Any], start: int, end: int, file: BinaryIO) -> None:
        with self._stream(key, self._get_same(key, first, start, end), start, end) as stream:
            at = start
            while data := stream.read(1 << 20):
                at += os.pwrite(file.fileno(), data, at)
        if at != end:
            raise TransientError("ConnectionCut", f"the range ends at byte {at}, not {end}", where=self.uri(key))

    def copy(self, keys: Mapping[str, str]) -> None:
        def submit(source: str) -> Any:
            return self._manager.copy({"Bucket": self._bucket, "Key": source}, self._bucket, keys[source])

        self._transfer(submit, keys)

    def delete(self, keys: Iterable[str]) -> None:
        remaining = list(keys)
        while remaining:
            batch, remaining = remaining[:DELETE_AT_ONCE], remaining[DELETE_AT_ONCE:]
            with s3_errors(self.uri(batch[0])):
                response = self._client.delete_objects(
                    Bucket=self._bucket, Delete={"Objects": [{"Key": key} for key in batch], "Quiet": True}
                )
            # A gateway over files says NoSuchKey when another deletes the same key at the same moment; S3 does not.
            for failed in (error for error in response.get("Errors", []) if error.get("Code") != "NoSuchKey"):
                raise _told(failed.get("Code", ""), failed.get("Message", ""), 400, self.uri(failed["Key"]))

    def _put_if(self, key: str, data: bytes, **condition: str) -> bool:
        with s3_errors(self.uri(key)):
            for attempt in range(attempts()):
                try:
                    self._client.put_object(Bucket=self._bucket, Key=key, Body=data, **condition)
                    return True
                except ClientError as error:
                    match _code(error):
                        case "PreconditionFailed" | "412":
                            # The first try may have been carried out and its answer lost.
                            retried = error.response["ResponseMetadata"].get("RetryAttempts", 0) or attempt
                            return bool(retried) and self.read(key) == data
                        case "NoSuchKey" if "IfMatch" in condition:
                            return False
                        case "ConditionalRequestConflict" | "409":
                            # Another writer is at it, and the server cannot say yet who wins.
                            time.sleep(0.1 * 2**attempt)
                        case _:
                            raise
        raise TransientError(
            "ConditionalRequestConflict", "another writer kept the object busy", where=self.uri(key), mend="try again"
        )

    def _transfer(self, submit: Callable[[str], Any], keys: Iterable[str]) -> None:
        """Hands every key to the transfer threads; after the first failure, the rest is cancelled."""
        futures = {key: submit(key) for key in keys}
        try:
            for key, future in futures.items():
                with s3_errors(self.uri(key)):
                    try:
                        future.result()
                    except ClientError as error:
                        if _code(error).isdigit():
                            self.stat(key)  # an answer without a body names no reason; this one does
                        raise
        except BaseException:
            for future in futures.values():
                future.cancel()
            raise


def _client() -> Any:
    at_endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    settings: dict[str, Any] = {
        "connect_timeout": 10,
        "read_timeout": 60,
        "tcp_keepalive": True,
        "max_pool_connections": 2 * PARALLEL,
        "user_agent_extra": "kubepeft",
    }
    if at_endpoint:
        # Servers of one's own seldom have a name in DNS for every bucket.
        settings["s3"] = {"addressing_style": "path"}
    retries: dict[str, Any] = {}
    if "AWS_MAX_ATTEMPTS" not in os.environ:
        retries["total_max_attempts"] = attempts()
    if "AWS_RETRY_MODE" not in os.environ:
        # The other modes give all threads of a client one budget of 35 retries: ten parallel parts use it up
        # within a second of 503, and then nothing is tried again.
        retries["mode"] = "legacy"
    if retries:
        settings["retries"] = retries
    session = boto3.session.Session(region_name=os.environ.get("AWS_REGION"))
    client = session.client("s3", config=Config(**settings))
    client.meta.events.register("needs-retry.s3", _retry_unread)
    return client


def _retry_unread(response: tuple[Any, dict[str, Any]] | None, attempts: int, **_: Any) -> float | None:
    """Seconds until the next try of a request that the server could not even parse, or None.

    A gateway that refuses a PUT without reading its body takes the rest of it for the connection's next request.
    botocore tries a 400 once only. https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html (BadRequest)
    """
    if response is None or response[1].get("Error", {}).get("Code") != "BadRequest":
        return None
    return 0.1 if attempts < 4 else None


@contextmanager
def s3_errors(where: str) -> Iterator[None]:
    """Turns what boto3 and the server say into what the user can do."""
    try:
        yield
    except KubepeftError:
        raise
    except ClientError as error:
        message = error.response.get("Error", {}).get("Message", "")
        raise _told(_code(error), message, _status(error), where) from error
    except (BotoCoreError, Boto3Error, urllib3.exceptions.HTTPError, ValueError) as error:
        raise _told_by_client(error, where) from error
    except OSError as error:
        # A local file that is sent or written, or the CA bundle.
        if error.errno is None:
            raise _told_by_client(error, where) from error
        with file_errors(error.filename or where):
            raise


def _version(item: Mapping[str, Any]) -> str:
    """The etag; a gateway over files that others put there may have none."""
    return str(item.get("ETag") or item["LastModified"].isoformat())


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _status(error: ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


BAD_CREDENTIALS = {
    "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "TokenRefreshRequired",
    "XAdminUserNotFound", "AuthFailure", "InvalidSecurity", "ExpiredTokenException", "401",
}  # fmt: skip
WRONG_REGION = {"AuthorizationHeaderMalformed", "PermanentRedirect", "IllegalLocationConstraintException", "301"}
PASSING = {
    "SlowDown", "RequestTimeout", "InternalError", "ServiceUnavailable", "Throttling", "ThrottlingException",
    "TooManyRequests", "RequestLimitExceeded", "OperationAborted", "BadDigest", "IncompleteBody", "429",
}  # fmt: skip


def _told(code: str, message: str, status: int, where: str) -> KubepeftError:
    if code == "NoSuchBucket":
        return UserError(
            code, "there is no such bucket", where=where, mend="check its name, the endpoint and the account"
        )
    if code in ("NoSuchKey", "404"):
        return UserError("NoSuchKey", "there is no such object", where=where, mend="check the key")
    if code in BAD_CREDENTIALS:
        return UserError(
            "BadCredentials", f"the server does not know these credentials ({code})", where=where,
            mend="check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (in a cluster: the Secret in spec.credentials.s3)",
        )  # fmt: skip
    if code in WRONG_REGION:
        return UserError(
            "WrongRegion",
            f"the bucket is in another region ({message})",
            where=where,
            mend="set AWS_REGION to the bucket's",
        )
    if code == "RequestTimeTooSkewed":
        return UserError(code, "this machine's clock differs from the server's", where=where, mend="set the clock")
    if code in ("PreconditionFailed", "412", "InvalidRange", "416"):
        return TransientError("ChangedWhileRead", "the object changed while it was read", where=where, mend="try again")
    if code in PASSING or status >= 500 or status == 429:
        return TransientError(
            code or f"Http{status}", f"the storage server answered {status} {code} to every attempt", where=where,
            mend="try again later; if it stays so, look at the storage server",
        )  # fmt: skip
    if code in ("AccessDenied", "403", "Forbidden", "AllAccessDisabled", "AccountProblem") or status == 403:
        return UserError(
            "AccessDenied", "the credentials may not do this here", where=where,
            mend="allow s3:GetObject, s3:PutObject, s3:DeleteObject and s3:ListBucket on it "
            "(without s3:ListBucket a missing object looks like this too)",
        )  # fmt: skip
    return UserError(
        code or f"Http{status}",
        message or f"the server answered {status}",
        where=where,
        mend="check the address and the server",
    )


def _told_by_client(error: Exception, where: str) -> KubepeftError:
    name = type(error).__name__
    match error:
        case (
            boto_errors.NoCredentialsError() | boto_errors.PartialCredentialsError() | boto_errors.TokenRetrievalError()
        ):
            return UserError(
                "NoCredentials", "no S3 credentials were found", where=where,
                mend="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or use workload identity "
                "(in a cluster: a Secret in spec.credentials.s3)",
            )  # fmt: skip
        case boto_errors.ProfileNotFound() | boto_errors.ConfigParseError() | boto_errors.ConfigNotFound():
            return UserError("BadAwsConfig", str(error), where=where, mend="check AWS_PROFILE and the AWS config file")
        case boto_errors.NoRegionError() | boto_errors.InvalidRegionError():
            return UserError("WrongRegion", "no usable region is set", where=where, mend="set AWS_REGION")
        case boto_errors.SSLError():
            return _certificate(error, where)
        case boto_errors.ParamValidationError():
            return UserError("BadUri", "boto3 refuses this bucket or key", where=where, mend="check the address")
        case (
            boto_errors.EndpointConnectionError()
            | boto_errors.ConnectTimeoutError()
            | boto_errors.ProxyConnectionError()
        ):
            return TransientError(
                "NoConnection", f"the storage server cannot be reached ({name})", where=where,
                mend="check AWS_ENDPOINT_URL, the network policy and the server",
            )  # fmt: skip
        case ValueError() if "endpoint" in str(error).lower():
            return UserError("BadEndpoint", "AWS_ENDPOINT_URL is no URL", where=where, mend="write https://HOST[:PORT]")
        case OSError() if "certificate" in str(error).lower():
            return _certificate(error, where)
        case boto_errors.CredentialRetrievalError() | boto_errors.MetadataRetrievalError():
            return TransientError("NoCredentials", f"the credentials could not be fetched ({name})", where=where)
    return TransientError("ConnectionCut", f"the transfer failed ({name})", where=where, mend="try again")


def _certificate(error: Exception, where: str) -> UserError:
    return UserError(
        "BadCertificate", "the storage server's certificate is not trusted here", where=where,
        mend="set AWS_CA_BUNDLE to a file with the CA's certificate, and use the name that the certificate is for",
    )  # fmt: skip
