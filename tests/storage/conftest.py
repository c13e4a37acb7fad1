"""One S3 server for all storage tests of a run, a bucket of its own for each test, and a proxy where one asks."""

import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from kubepeft.storage import Store, open_store, parse_uri
from tests.servers import FaultProxy, S3Server


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    server = S3Server(tmp_path_factory.mktemp("s3"))
    yield server
    server.stop()


@pytest.fixture
def s3_environment(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    return s3_server


@pytest.fixture
def bucket(s3_environment: S3Server) -> str:
    return s3_environment.make_bucket(f"b-{secrets.token_hex(6)}")


@pytest.fixture
def s3(bucket: str) -> Store:
    return open_store(parse_uri(f"s3://{bucket}"))


@pytest.fixture
def proxy(s3_environment: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """In front of the S3 server; stores opened after this fixture go through it."""
    proxy = FaultProxy("127.0.0.1", s3_environment.port)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    yield proxy
    proxy.stop()


@pytest.fixture(params=["file", "s3"])
def store_and_root(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Store, str]:
    """A writable store of each kind, and the prefix below which a test may write."""
    if request.param == "file":
        location = parse_uri(f"file://{tmp_path}/out")
    else:
        location = parse_uri(f"s3://{request.getfixturevalue('bucket')}/some/prefix")
    return open_store(location), location.path
