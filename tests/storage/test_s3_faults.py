"""S3 in trouble: what users are told, what is tried again, and that no answer is lost or mixed."""

import os
import subprocess
import time
from pathlib import Path

import pytest

from kubepeft.errors import TransientError, UserError
from kubepeft.storage import Store, open_store, parse_uri
from kubepeft.storage.s3 import PART_SIZE, S3Store
from tests.cluster.pki import Authority
from tests.servers import ACCESS_KEY, SECRET_KEY, FaultProxy, S3Server


def opened(bucket: str) -> Store:
    return open_store(parse_uri(f"s3://{bucket}"))


@pytest.fixture
def few_attempts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBEPEFT_STORAGE_ATTEMPTS", "3")


def every_kind_of_request(store: Store, tmp_path: Path) -> list[tuple[str, object]]:
    (tmp_path / "source").write_bytes(b"1")
    return [
        ("read", lambda: store.read("k")),
        ("stat", lambda: store.stat("k")),
        ("open", lambda: store.open("k")),
        ("entries", lambda: list(store.entries("k"))),
        ("create", lambda: store.create("k", b"1")),
        ("replace", lambda: store.replace("k", b"1", expected=b"0")),
        ("upload", lambda: store.upload({"k": tmp_path / "source"})),
        ("download", lambda: store.download({"k": tmp_path / "k"})),
        ("delete", lambda: store.delete(["k"])),
    ]


def test_a_missing_bucket_is_named_by_every_request(s3_environment: S3Server, tmp_path: Path) -> None:
    for name, request in every_kind_of_request(opened("no-such-bucket"), tmp_path):
        with pytest.raises(UserError, match="no-such-bucket") as caught:
            request()  # type: ignore[operator]
        assert caught.value.reason == "NoSuchBucket", name


@pytest.mark.parametrize("setting", ["AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID"])
def test_wrong_credentials_are_told_without_repeating_them(
    setting: str, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(setting, "WrongValue123")
    for name, request in every_kind_of_request(opened(bucket), tmp_path):
        with pytest.raises(UserError) as caught:
            request()  # type: ignore[operator]
        assert caught.value.reason == "BadCredentials", name
        assert not any(secret in str(caught.value) for secret in ("WrongValue123", ACCESS_KEY, SECRET_KEY))


def test_no_credentials_are_told(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(UserError) as caught:
        opened(bucket).read("k")
    assert caught.value.reason == "NoCredentials"
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(UserError, match="AWS_PROFILE") as caught:
        opened(bucket).read("k")
    assert caught.value.reason == "NoCredentials"


def test_an_endpoint_that_is_no_url_is_told(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "storage.internal")
    with pytest.raises(UserError, match="AWS_ENDPOINT_URL"):
        opened(bucket)


@pytest.mark.usefixtures("few_attempts")
def test_a_server_that_is_not_there_is_a_passing_trouble(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(TransientError, match="AWS_ENDPOINT_URL") as caught:
        opened(bucket).read("k")
    assert caught.value.reason == "NoConnection"


def test_a_server_that_answers_503_for_a_while_is_waited_for(proxy: FaultProxy, bucket: str, tmp_path: Path) -> None:
    store = opened(bucket)
    files = {f"k{n}": tmp_path / f"source{n}" for n in range(30)}
    for path in files.values():
        path.write_bytes(os.urandom(1000))
    # Not SlowDown, of which clients expect more: 35 retries in all must not be the end of it.
    proxy.answer_503(1.5, code="ServiceUnavailable")
    store.upload(files)
    assert proxy.requests_refused >= 10
    proxy.answer_503(0.7)
    store.download({key: tmp_path / "back" / key for key in files})
    assert all((tmp_path / "back" / key).read_bytes() == path.read_bytes() for key, path in files.items())
    proxy.answer_503(0.5)
    assert store.create("claim", b"mine")


@pytest.mark.usefixtures("few_attempts")
def test_a_server_that_answers_503_for_ever_is_a_passing_trouble_after_the_attempts(
    proxy: FaultProxy, bucket: str, tmp_path: Path
) -> None:
    store = opened(bucket)
    proxy.answer_503(float("inf"))
    for name, request in every_kind_of_request(store, tmp_path)[:7:3]:
        before = proxy.requests_refused
        with pytest.raises(TransientError, match="503") as caught:
            request()  # type: ignore[operator]
        assert caught.value.reason == "SlowDown", name
        assert proxy.requests_refused - before == 3, name


@pytest.mark.parametrize("etag", [True, False])
def test_a_connection_cut_in_the_middle_is_taken_up_where_it_broke(
    etag: bool, proxy: FaultProxy, bucket: str, s3_environment: S3Server, tmp_path: Path
) -> None:
    data = os.urandom(3 * PART_SIZE + 1)
    store = opened(bucket)
    if etag:
        assert store.create("large", data)
    else:
        (s3_environment.root / bucket / "large").write_bytes(data)
    proxy.cut_after(1_000_000, 5_000_000, 100)
    with store.open("large") as stream:
        assert stream.read() == data
    assert proxy.connections_cut == 3
    proxy.cut_after(1_000_000, 5_000_000, 100)
    store.download({"large": tmp_path / "large"})
    assert (tmp_path / "large").read_bytes() == data
    assert proxy.connections_cut >= 5
    assert [p.name for p in tmp_path.iterdir()] == ["large"]


@pytest.mark.usefixtures("few_attempts")
def test_a_connection_that_is_always_cut_is_a_passing_trouble_and_leaves_no_file(
    proxy: FaultProxy, bucket: str, tmp_path: Path
) -> None:
    store = opened(bucket)
    assert store.create("large", os.urandom(5_000_000))
    proxy.cut_after(1000, *[100] * 100)
    with pytest.raises(TransientError, match="break off") as caught, store.open("large") as stream:
        stream.read()
    proxy.cut_after(1000, *[0] * 100)
    with pytest.raises(TransientError) as caught, store.open("large") as stream:
        stream.read()
    assert caught.value.reason == "ConnectionCut"
    proxy.cut_after(1000, *[0] * 100)
    with pytest.raises(TransientError):
        store.download({"large": tmp_path / "large"})
    assert list(tmp_path.iterdir()) == []


def test_a_stream_never_goes_on_with_another_version(proxy: FaultProxy, bucket: str) -> None:
    store = opened(bucket)
    first, second = b"1" * 8_000_000, b"2" * 8_000_000
    assert store.create("k", first)
    proxy.cut_after(3_000_000)
    with store.open("k") as stream:
        assert stream.read(10) == b"1" * 10
        assert store.replace("k", second, expected=first)
        with pytest.raises(TransientError) as caught:
            stream.read()
    assert caught.value.reason == "ChangedWhileRead"


def test_a_conditional_write_whose_answer_was_lost_is_known_to_have_won(proxy: FaultProxy, bucket: str) -> None:
    store = opened(bucket)
    proxy.drop_answer_to(b"PUT ")
    assert store.create("claim", b"mine")
    assert proxy.connections_cut == 1
    proxy.drop_answer_to(b"PUT ")
    assert store.replace("claim", b"mine again", expected=b"mine")
    assert proxy.connections_cut == 2
    assert store.read("claim") == b"mine again"
    assert not store.create("claim", b"theirs")


def test_an_object_damaged_in_storage_is_noticed_by_its_checksum(bucket: str, s3_environment: S3Server, tmp_path: Path,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setenv("KUBEPEFT_STORAGE_ATTEMPTS", "2")
    store = opened(bucket)
    assert store.create("k", b"x" * 1000)
    with open(s3_environment.root / bucket / "k", "r+b") as file:
        file.write(b"y")
    with pytest.raises(TransientError, match="damaged") as caught:
        store.read("k")
    assert caught.value.reason == "CorruptTransfer"


def test_certificates_are_checked_against_aws_ca_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1",
         "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", tmp_path / "key.pem", "-out", tmp_path / "cert.pem"],
        check=True, capture_output=True,
    )  # fmt: skip
    server = S3Server(tmp_path / "s3", cert=tmp_path / "cert.pem", key=tmp_path / "key.pem")
    try:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("AWS_CA_BUNDLE", raising=False)
        monkeypatch.setenv("KUBEPEFT_STORAGE_ATTEMPTS", "2")
        bucket = server.make_bucket("tls-bucket")
        with pytest.raises(UserError, match="AWS_CA_BUNDLE") as caught:
            opened(bucket).read("k")
        assert caught.value.reason == "BadCertificate"
        monkeypatch.setenv("AWS_CA_BUNDLE", str(tmp_path / "nothing.pem"))
        with pytest.raises(UserError, match="AWS_CA_BUNDLE"):
            opened(bucket).read("k")
        monkeypatch.setenv("AWS_CA_BUNDLE", str(tmp_path / "cert.pem"))
        assert opened(bucket).create("k", b"1")
    finally:
        server.stop()


def test_a_silent_server_is_given_up_after_the_attempts(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The wait before the first retry is short, so a fault that stays costs seconds, not the whole minute."""
    monkeypatch.setenv("KUBEPEFT_STORAGE_ATTEMPTS", "2")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    begun = time.monotonic()
    with pytest.raises(TransientError):
        opened(bucket).read("k")
    assert time.monotonic() - begun < 5


def test_a_put_that_is_refused_unread_does_not_spoil_the_next_request_on_its_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority = Authority(tmp_path / "pki")
    certificate, key = authority.issue("s3", "s3", hosts=["127.0.0.1"])
    server = S3Server(tmp_path / "s3", cert=certificate, key=key)
    try:
        for name, value in (server.environment() | {"AWS_CA_BUNDLE": str(authority.ca)}).items():
            monkeypatch.setenv(name, value)
        store = S3Store("b")  # too short a name: this server refuses it before it reads the body
        for _ in range(3):
            with pytest.raises(UserError, match="bucket is not valid"):
                store.create("key", b"x" * 100_000)
            with pytest.raises(UserError, match="bucket is not valid"):
                list(store.entries("folder"))
    finally:
        server.stop()
