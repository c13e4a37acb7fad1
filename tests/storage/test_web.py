"""Files behind https:// (here http:// on this machine): reading, ranges, faults, and what users are told."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from kubepeft.errors import TransientError, UserError
from kubepeft.storage import Reader, find, open_reader, parse_uri
from tests.servers import FaultProxy, WebServer

DATA = os.urandom(3_000_000)


@pytest.fixture
def web() -> Iterator[WebServer]:
    server = WebServer({"/data/x.jsonl": DATA, "/empty": b""})
    yield server
    server.stop()


@pytest.fixture
def web_proxy(web: WebServer) -> Iterator[FaultProxy]:
    proxy = FaultProxy("127.0.0.1", web.port)
    yield proxy
    proxy.stop()


def opened(url: str) -> tuple[Reader, str]:
    location = parse_uri(url)
    return open_reader(location), location.path


def test_a_file_is_found_read_and_downloaded(web: WebServer, tmp_path: Path) -> None:
    reader, key = opened(f"{web.endpoint}/data/x.jsonl")
    assert [(e.key, e.size) for e in find(reader, key)] == [("data/x.jsonl", len(DATA))]
    assert reader.read(key) == DATA
    reader.download({key: tmp_path / "new" / "x"})
    assert (tmp_path / "new" / "x").read_bytes() == DATA


def test_an_empty_file_is_a_file(web: WebServer) -> None:
    reader, key = opened(f"{web.endpoint}/empty")
    assert reader.read(key) == b""
    assert [e.size for e in find(reader, key)] == [0]


@pytest.mark.parametrize("ranges", [True, False])
def test_a_connection_cut_in_the_middle_is_taken_up_where_it_broke(
    web: WebServer, web_proxy: FaultProxy, ranges: bool
) -> None:
    web.ranges = ranges
    reader, key = opened(f"{web_proxy.endpoint}/data/x.jsonl")
    web_proxy.cut_after(1_000_000, 2_500_000)
    assert reader.read(key) == DATA
    asked = [headers.get("range") for _, _, headers in web.requests]
    assert len(asked) == 3 - ranges
    assert asked[0] is None
    assert all(later and later.startswith("bytes=") for later in asked[1:])


def test_an_answer_cut_within_its_headers_is_not_taken_for_a_short_file(web_proxy: FaultProxy) -> None:
    reader, key = opened(f"{web_proxy.endpoint}/data/x.jsonl")
    web_proxy.cut_after(40, 1_000_000, 40)
    assert reader.read(key) == DATA
    assert web_proxy.connections_cut == 3


def test_a_stream_never_goes_on_with_another_version(web: WebServer, web_proxy: FaultProxy) -> None:
    reader, key = opened(f"{web_proxy.endpoint}/data/x.jsonl")
    web_proxy.cut_after(2_000_000)
    with reader.open(key) as stream:
        stream.read(10)
        web.files["/data/x.jsonl"] = b"2" * len(DATA)
        with pytest.raises(TransientError) as caught:
            stream.read()
    assert caught.value.reason == "ChangedWhileRead"


def test_a_server_that_answers_503_for_a_while_is_waited_for(web: WebServer, web_proxy: FaultProxy) -> None:
    reader, key = opened(f"{web_proxy.endpoint}/data/x.jsonl")
    web_proxy.answer_503(0.6)
    assert reader.read(key) == DATA
    assert web_proxy.requests_refused > 0


def test_a_server_that_answers_503_for_ever_is_a_passing_trouble(
    web_proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBEPEFT_STORAGE_ATTEMPTS", "2")
    reader, key = opened(f"{web_proxy.endpoint}/data/x.jsonl?sig=hunter2")
    web_proxy.answer_503(float("inf"))
    with pytest.raises(TransientError, match="503") as caught:
        reader.read(key)
    assert "hunter2" not in str(caught.value)
    assert web_proxy.requests_refused == 2


@pytest.mark.parametrize(("status", "reason"), [(403, "AccessDenied"), (401, "AccessDenied"), (400, "Http400")])
def test_a_refusal_is_told_without_the_signature(web: WebServer, status: int, reason: str) -> None:
    web.answers["/data/x.jsonl"] = (status, {})
    reader, key = opened(f"{web.endpoint}/data/x.jsonl?X-Amz-Signature=hunter2")
    with pytest.raises(UserError) as caught:
        find(reader, key)
    assert caught.value.reason == reason
    assert "hunter2" not in str(caught.value)
    assert "?X-Amz-Signature=hunter2" in web.requests[0][1]


def test_a_missing_file_is_told(web: WebServer) -> None:
    reader, key = opened(f"{web.endpoint}/data/nothing.jsonl")
    assert reader.read(key) is None
    with pytest.raises(UserError, match=r"nothing\.jsonl") as caught:
        find(reader, key)
    assert caught.value.reason == "NothingFound"
    with pytest.raises(UserError) as caught:
        reader.open(key)
    assert caught.value.reason == "NoSuchKey"


def test_a_redirect_is_followed_but_not_to_plain_http_elsewhere(
    web: WebServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    web.answers["/moved"] = (302, {"Location": "/data/x.jsonl"})
    reader, key = opened(f"{web.endpoint}/moved")
    assert reader.read(key) == DATA
    # A proxy setting stands in for the outer world: what is asked of another host arrives at this server.
    monkeypatch.setenv("http_proxy", web.endpoint)
    monkeypatch.setenv("no_proxy", "")
    web.answers["/away"] = (302, {"Location": "http://elsewhere.example/data/x.jsonl"})
    web.files["http://elsewhere.example/data/x.jsonl"] = DATA
    web.answers[f"{web.endpoint}/away"] = web.answers["/away"]
    reader, key = opened(f"{web.endpoint}/away")
    with pytest.raises(UserError, match="plain http"):
        reader.read(key)


def test_a_failed_download_leaves_no_file(web: WebServer, web_proxy: FaultProxy, tmp_path: Path,
                                          monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setenv("KUBEPEFT_STORAGE_ATTEMPTS", "2")
    reader, key = opened(f"{web_proxy.endpoint}/data/x.jsonl")
    web_proxy.cut_after(*[1_000] * 50)
    with pytest.raises(TransientError):
        reader.download({key: tmp_path / "x"})
    assert list(tmp_path.iterdir()) == []
