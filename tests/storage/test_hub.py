"""The Hugging Face Hub by a small server with its routes, read by the real huggingface_hub."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kubepeft.errors import TransientError, UserError
from kubepeft.storage import find, open_reader, parse_uri
from kubepeft.storage.hub import HubStore, resolve_revision, select_model_files
from tests.servers import FaultProxy, HubRepository, HubServer

OLD, NEW = "a" * 40, "b" * 40
MODEL = {
    "config.json": b"{}",
    "model.safetensors": b"weights",
    "pytorch_model.bin": b"pickle",
    "original/consolidated.00.pth": b"pickle",
    "onnx/model.onnx": b"onnx",
    "consolidated.safetensors": b"twice",
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"",
    "modeling_own.py": b"raise SystemExit",
    "README.md": b"",
    "LICENSE": b"terms",
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    server = HubServer(
        {
            "org/model": HubRepository(MODEL, NEW, branches={"v1": NEW, "refs/pr/1": NEW}),
            "org/pickled": HubRepository({"config.json": b"{}", "pytorch_model.bin": b""}, NEW),
            "org/gated": HubRepository(MODEL, NEW, gated=True, token="hf_right"),
            "datasets/org/data": HubRepository({"d/a.jsonl": b"1", "d/b.jsonl": b"2", "x.csv": b"3"}, NEW),
        }
    )
    monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
    monkeypatch.setenv("KUBEPEFT_STORAGE_ATTEMPTS", "2")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield server
    server.stop()


@pytest.mark.parametrize("revision", ["", "@v1", "@refs/pr/1", f"@{NEW}"])
def test_a_revision_is_resolved_to_its_commit(hub: HubServer, revision: str) -> None:
    assert resolve_revision(parse_uri(f"hf://org/model{revision}")) == NEW


def test_only_what_loading_needs_is_downloaded_and_no_pickle(hub: HubServer) -> None:
    folder = HubStore(parse_uri("hf://org/model")).snapshot()
    files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*"))
    assert files == ["LICENSE", "chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json"]
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert folder.name == NEW
    asked = [path for _, path, _ in hub.requests]
    assert not any(name in path for path in asked for name in (".bin", ".pth", "onnx", ".py"))


def test_code_is_downloaded_only_when_it_is_trusted(hub: HubServer) -> None:
    assert (HubStore(parse_uri("hf://org/model")).snapshot(code=True) / "modeling_own.py").exists()


def test_a_second_snapshot_of_a_commit_asks_for_no_file_again(hub: HubServer) -> None:
    location = parse_uri(f"hf://org/model@{NEW}")
    HubStore(location).snapshot()
    hub.requests.clear()
    HubStore(location).snapshot()
    assert [path for _, path, _ in hub.requests if "/resolve/" in path] == []


def test_sharded_weights_are_all_taken() -> None:
    names = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    chosen = select_model_files([*names, "model.safetensors.index.json", "model.fp16.safetensors"], where="x")
    assert chosen == [*names, "model.safetensors.index.json"]


def test_weights_of_another_name_are_taken_when_there_are_no_others() -> None:
    assert select_model_files(["adapter_model.safetensors", "config.json"], where="x")[0] == "adapter_model.safetensors"


@pytest.mark.parametrize(("uri", "says"), [("hf://org/pickled", "pytorch_model.bin")])
def test_a_model_without_safetensors_is_refused_with_the_mend(hub: HubServer, uri: str, says: str) -> None:
    with pytest.raises(UserError, match="safetensors/convert") as caught:
        HubStore(parse_uri(uri)).snapshot()
    assert caught.value.reason == "NoSafetensors"
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("uri", "reason", "says"),
    [
        ("hf://org/nothing", "RepositoryNotFound", "HF_TOKEN"),
        ("hf://org/model@v9", "RevisionNotFound", "default branch"),
        ("hf://org/gated", "AccessDenied", "accept its terms"),
    ],
)
def test_what_the_hub_refuses_is_told(hub: HubServer, uri: str, reason: str, says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        resolve_revision(parse_uri(uri))
    assert caught.value.reason == reason
    assert str(caught.value).startswith(uri)


def test_a_commit_that_does_not_exist_is_told(hub: HubServer) -> None:
    with pytest.raises(UserError) as caught:
        HubStore(parse_uri(f"hf://org/model@{OLD}")).snapshot()
    assert caught.value.reason == "RevisionNotFound"


def test_a_gated_model_opens_with_the_right_token_only(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(UserError) as caught:
        HubStore(parse_uri("hf://org/gated")).snapshot()
    assert caught.value.reason == "AccessDenied"
    assert "hf_wrong" not in str(caught.value)
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    assert (HubStore(parse_uri("hf://org/gated")).snapshot() / "model.safetensors").exists()


def test_data_sets_are_found_by_glob_and_read(hub: HubServer, tmp_path: Path) -> None:
    location = parse_uri("hf://datasets/org/data/d/*.jsonl")
    reader = open_reader(location)
    assert [e.key for e in find(reader, location.path)] == ["d/a.jsonl", "d/b.jsonl"]
    with reader.open("d/a.jsonl") as stream:
        assert stream.read() == b"1"
    assert reader.read("x.csv") == b"3"
    assert reader.read("nothing") is None
    reader.download({"d/b.jsonl": tmp_path / "b"})
    assert (tmp_path / "b").read_bytes() == b"2"
    with pytest.raises(UserError, match=r"x\.csv"):
        find(reader, "y.csv")


def test_a_hub_that_fails_for_a_while_is_asked_again(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = FaultProxy("127.0.0.1", hub.port)
    monkeypatch.setenv("HF_ENDPOINT", proxy.endpoint)
    try:
        proxy.answer_503(0.3)
        assert resolve_revision(parse_uri("hf://org/model")) == NEW
        assert proxy.requests_refused > 0
    finally:
        proxy.stop()


def test_a_hub_that_is_not_there_is_a_passing_trouble(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(TransientError, match="HF_ENDPOINT"):
        resolve_revision(parse_uri("hf://org/model"))


def test_a_hub_that_fails_while_files_are_fetched_is_a_passing_trouble(hub: HubServer) -> None:
    store = HubStore(parse_uri(f"hf://org/model@{NEW}"))
    hub.answers["/org/model/resolve/" + NEW + "/model.safetensors"] = (501, {})
    with pytest.raises(TransientError, match="501"):
        store.snapshot()


def test_offline_mode_reads_the_cache_and_says_what_is_missing(hub: HubServer, tmp_path: Path) -> None:
    cache = tmp_path / "filled"
    HubStore(parse_uri("hf://org/model"), cache_dir=cache).snapshot()
    hub.requests.clear()
    code = f"""
import json
from pathlib import Path
from kubepeft.errors import UserError
from kubepeft.storage import parse_uri
from kubepeft.storage.hub import HubStore
folder = HubStore(parse_uri("hf://org/model"), cache_dir=Path({str(cache)!r})).snapshot()
try:
    HubStore(parse_uri("hf://org/other"), cache_dir=Path({str(cache)!r})).snapshot()
except UserError as error:
    print(json.dumps([(folder / "model.safetensors").read_text(), error.reason]))
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == ["weights", "NotCached"]
    assert hub.requests == []
