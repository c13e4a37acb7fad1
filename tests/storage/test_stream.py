"""The stream that outlives cut connections, on bodies that end too early without saying so."""

import io

import pytest

from kubepeft.errors import TransientError
from kubepeft.storage.stream import ResumingStream, buffered

DATA = bytes(range(256)) * 40


def test_a_body_that_ends_early_is_opened_again_at_the_next_byte() -> None:
    asked: list[int] = []

    def open_at(offset: int) -> io.BytesIO:
        asked.append(offset)
        return io.BytesIO(DATA[offset : offset + 3000])

    stream = buffered(ResumingStream(open_at, first=io.BytesIO(DATA[:3000]), size=len(DATA), where="x", broken=()))
    assert stream.read() == DATA
    assert asked == [3000, 6000, 9000]


def test_a_source_that_brings_nothing_more_is_given_up_with_the_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBEPEFT_STORAGE_ATTEMPTS", "2")
    stream = ResumingStream(lambda _: io.BytesIO(), first=io.BytesIO(b"abc"), size=10, where="s3://b/k", broken=())
    with pytest.raises(TransientError, match="at byte 3 of 10"), stream:
        stream.read()
