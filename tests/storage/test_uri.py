"""Addresses: what each form means, and what is said about the ones that can't be used."""

from pathlib import Path

import pytest

from kubepeft.errors import UserError
from kubepeft.storage.store import glob_pattern
from kubepeft.storage.uri import Location, parse_uri

COMMIT = "607a30d783dfa663caf39e06633721c8d4cfcd7e"


@pytest.mark.parametrize(
    ("text", "location"),
    [
        ("s3://datasets/support/*.jsonl", Location("s3", "datasets", "support/*.jsonl")),
        ("s3://datasets", Location("s3", "datasets", "")),
        ("s3://datasets/support/", Location("s3", "datasets", "support")),
        ("s3://my.bucket-1/a b/ü.jsonl", Location("s3", "my.bucket-1", "a b/ü.jsonl")),
        ("file:///data/a%20b.jsonl", Location("file", "", "data/a b.jsonl")),
        ("pvc://model-cache/base/qwen", Location("pvc", "model-cache", "base/qwen")),
        ("hf://Qwen/Qwen2.5-0.5B-Instruct", Location("hf", "Qwen/Qwen2.5-0.5B-Instruct", "")),
        (f"hf://Qwen/Q@{COMMIT}", Location("hf", "Qwen/Q", "", revision=COMMIT)),
        ("hf://Qwen/Q@v1.0/sub/dir", Location("hf", "Qwen/Q", "sub/dir", revision="v1.0")),
        ("hf://Qwen/Q@refs/pr/3/sub", Location("hf", "Qwen/Q", "sub", revision="refs/pr/3")),
        ("hf://Qwen/Q@a%2Fb/sub", Location("hf", "Qwen/Q", "sub", revision="a/b")),
        ("hf://Qwen/Q/sub@1", Location("hf", "Qwen/Q", "sub@1")),
        ("hf://datasets/org/d@main/x/*.parquet", Location("hf", "org/d", "x/*.parquet", revision="main", dataset=True)),
        ("https://example.com:8443/a/b%20c?X-Sig=1", Location("https", "example.com:8443", "a/b%20c", query="X-Sig=1")),
        ("http://127.0.0.1:9/x", Location("http", "127.0.0.1:9", "x")),
        ("http://[::1]:9/x", Location("http", "[::1]:9", "x")),
    ],
)  # fmt: skip
def test_each_form_is_taken_apart(text: str, location: Location) -> None:
    assert parse_uri(text) == location


def test_plain_paths_start_from_the_given_folder() -> None:
    assert str(parse_uri("data/x.jsonl", base_dir=Path("/work/run"))) == "file:///work/run/data/x.jsonl"
    assert str(parse_uri("../x.jsonl", base_dir=Path("/work/run"))) == "file:///work/x.jsonl"
    assert str(parse_uri("/abs/x.jsonl", base_dir=Path("/work/run"))) == "file:///abs/x.jsonl"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "empty"),
        ("data/train.jsonl", "did you mean hf://data/train.jsonl?"),
        ("/data/train.jsonl", "which pods do not see"),
        ("Qwen/Qwen2.5-0.5B", "did you mean hf://Qwen/Qwen2.5-0.5B?"),
        ("s3:/bucket/key", "did you mean s3://bucket/key?"),
        ("S3://bucket/key", "did you mean s3://bucket/key?"),
        ("htps://example.com/x", "did you mean https://example.com/x?"),
        ("huggingface://org/name", "did you mean hf://org/name?"),
        ("gs://bucket/key", "AWS_ENDPOINT_URL"),
        ("abfs://x/y", "mount it as a volume"),
        ("ftp://host/x", "s3://BUCKET/KEY"),
        ("s3:///key", "no usable bucket name"),
        ("s3://ab/key", "3 to 63"),
        ("s3://bucket/../x", "'..'"),
        ("s3://bucket//x", "empty part"),
        ("s3://key:secret@bucket/x", "holds credentials"),
        ("file://data/x", "three slashes"),
        ("pvc://Model_Cache/x", "no usable claim name"),
        ("hf://gpt2", "hf://openai-community/gpt2"),
        ("hf://org/name@", "no usable revision"),
        ("hf://spaces/org/name", "neither a model nor a data set"),
        ("https://user:pass@example.com/x", "user or password"),
        ("http://example.com/x", "not encrypted"),
        ("https://huggingface.co/org/name", "write hf://org/name"),
        ("https://huggingface.co/datasets/org/d/blob/main/x.csv", "write hf://datasets/org/d@main/x.csv"),
        ("https:///x", "no host"),
        (" s3://bucket/x", "white space"),
        ("s3://bucket/a\nb", "control characters"),
    ],
)
def test_an_address_that_cannot_be_used_is_refused_with_what_to_write_instead(text: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_uri(text, where="spec.data.train")
    assert caught.value.reason == "BadUri"
    assert says in str(caught.value)
    assert str(caught.value).startswith("spec.data.train: ")


@pytest.mark.parametrize(
    "text",
    ["https://user:hunter2@example.com/x", "ftp://user:hunter2@host/x", "s3://key:hunter2@bucket/x",
     "http://example.com/x?X-Amz-Signature=hunter2", "htps://example.com/x?sig=hunter2"],
)  # fmt: skip
def test_a_secret_in_an_address_is_never_repeated(text: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_uri(text)
    assert "hunter2" not in str(caught.value)
    location = parse_uri("https://example.com/x?sig=hunter2")
    assert "hunter2" not in f"{location} {location!r}"


@pytest.mark.parametrize(
    ("pattern", "matches", "misses"),
    [
        ("a/*.jsonl", ["a/x.jsonl", "a/.jsonl"], ["a/b/x.jsonl", "a/x.json", "b/x.jsonl"]),
        ("a/**/*.jsonl", ["a/x.jsonl", "a/b/c/x.jsonl"], ["x.jsonl", "ab/x.jsonl"]),
        ("a/**", ["a/x", "a/b/c"], ["b/x"]),
        ("a/part-?.csv", ["a/part-1.csv"], ["a/part-12.csv", "a/part-/.csv"]),
        ("a/[0-2]x", ["a/0x", "a/2x"], ["a/3x"]),
        ("a/[!0]x", ["a/1x"], ["a/0x", "a//x"]),
        ("a+b(1).csv", ["a+b(1).csv"], ["aab1.csv"]),
    ],
)
def test_globs(pattern: str, matches: list[str], misses: list[str]) -> None:
    compiled = glob_pattern(pattern)
    assert [key for key in matches if not compiled.match(key)] == []
    assert [key for key in misses if compiled.match(key)] == []
