"""A publisher is killed with SIGKILL before its first write, and in the middle of and after each; another then finishes.

Whatever the moment, the end must be one manifest, the files of one attempt, and nothing of the dead one left.
"""

import multiprocessing
import os
import signal
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

import pytest

from kubepeft.storage import Entry, Store, join, open_store, parse_uri, relative
from kubepeft.storage.publish import Attempt, claim_and_finish, fetch, publish_in_place, read_manifest, recover, stage
from tests.servers import S3Server

MOMENTS = ("before", "in the middle of", "after")
FILES = ("config.json", "sub/weights.safetensors", "tokenizer.json")
# The writes of each way to publish, in order. Files: upload, copy, delete; documents: create, replace.
STABLE = ("upload", "create claim", "delete what was before", "copy", "create manifest", "delete staged")
IN_PLACE = ("upload", "create manifest", "delete what was before")
OVERWRITE = (
    "upload",
    "replace claim",
    "replace manifest by note",
    "delete what was before",
    "copy",
    "replace note by manifest",
    "delete staged",
)
MANY_FILES = ("upload", "copy", "delete what was before", "delete staged")


class DyingStore:
    """A real store whose process is killed at one of its writes."""

    def __init__(self, store: Store, write: int, moment: str) -> None:
        self._store, self._left, self._moment = store, write, moment

    def _die(self, moment: str) -> None:
        if self._left == 0 and self._moment == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    def _document(self, method: str, *args: object, **more: object) -> bool:
        self._die("before")
        done: bool = getattr(self._store, method)(*args, **more)
        self._die("after")
        self._left -= 1
        return done

    def _files(self, method: str, files: Mapping[str, object] | list[str]) -> None:
        self._die("before")
        if self._left == 0 and self._moment == "in the middle of":
            half = list(files)[: len(files) // 2]
            getattr(self._store, method)({key: files[key] for key in half} if isinstance(files, Mapping) else half)
            self._die("in the middle of")
        getattr(self._store, method)(files)
        self._die("after")
        self._left -= 1

    def create(self, key: str, data: bytes) -> bool:
        return self._document("create", key, data)

    def replace(self, key: str, data: bytes, *, expected: bytes) -> bool:
        return self._document("replace", key, data, expected=expected)

    def upload(self, files: Mapping[str, Path]) -> None:
        self._files("upload", files)

    def copy(self, keys: Mapping[str, str]) -> None:
        self._files("copy", keys)

    def delete(self, keys: Iterable[str]) -> None:
        self._files("delete", list(keys))

    def uri(self, key: str) -> str:
        return self._store.uri(key)

    def stat(self, key: str) -> Entry | None:
        return self._store.stat(key)

    def entries(self, folder: str) -> Iterable[Entry]:
        return self._store.entries(folder)

    def open(self, key: str) -> BinaryIO:
        return self._store.open(key)

    def read(self, key: str) -> bytes | None:
        return self._store.read(key)

    def download(self, files: Mapping[str, Path]) -> None:
        self._store.download(files)


def local_folder(tmp_path: Path, content: str) -> Path:
    folder = tmp_path / f"local-{content}"
    for name in FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return folder


def attempt(name: str, digest: str) -> Attempt:
    return Attempt(name, digest, datetime.now(UTC))


def publish(store: Store, way: str, folder: str, local: Path, who: Attempt, overwrite: bool) -> None:
    if way == "in place":
        publish_in_place(store, folder, local, who, overwrite=overwrite)
    elif recover(store, folder, who.digest, overwrite=overwrite) is None:
        claim_and_finish(store, folder, stage(store, folder, local, who), overwrite=overwrite)


def publish_and_die(
    environment: dict[str, str], uri: str, way: str, local: Path, digest: str, overwrite: bool, write: int, moment: str
) -> None:
    os.environ.update(environment)  # the server that forks keeps the one it was started with
    location = parse_uri(uri)
    store = DyingStore(open_store(location), write, moment)
    publish(store, way, location.path, local, attempt("dies", digest), overwrite)  # type: ignore[arg-type]


CASES = [
    pytest.param(way, digest, write, moment, id=f"{way}{', overwriting' * (digest == 'new')}: {moment} {step}")
    for way, digest, steps in (
        ("stable", "same", STABLE),
        ("in place", "same", IN_PLACE),
        ("stable", "new", OVERWRITE),
        ("in place", "new", ("upload", "replace manifest", "delete what was before")),
    )
    for write, step in enumerate(steps)
    for moment in MOMENTS
    # Before a write is after the last one, and a document, written by one request, has no middle.
    if (moment != "before" or write == 0) and (moment != "in the middle of" or step in MANY_FILES)
]


@pytest.fixture(scope="module")
def context() -> multiprocessing.context.ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["kubepeft.storage.s3", "kubepeft.storage.local", "kubepeft.storage.publish"])
    return context


@pytest.fixture(params=["file", "s3"])
def root_uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "file":
        return f"file://{tmp_path}/out"
    server: S3Server = request.getfixturevalue("s3_environment")
    return f"s3://{server.make_bucket(f'kill-{os.urandom(6).hex()}')}/out"


@pytest.mark.parametrize(("way", "digest", "write", "moment"), CASES)
def test_a_killed_publisher_is_finished_by_the_next_one(
    way: str,
    digest: str,
    write: int,
    moment: str,
    root_uri: str,
    context: multiprocessing.context.ForkServerContext,
    tmp_path: Path,
) -> None:
    location = parse_uri(f"{root_uri}/adapter")
    store, folder = open_store(location), location.path
    overwrite = digest == "new"
    if overwrite:
        publish(store, way, folder, local_folder(tmp_path, "old"), attempt("old", "old"), False)

    dying = context.Process(
        target=publish_and_die,
        args=(
            dict(os.environ),
            f"{root_uri}/adapter",
            way,
            local_folder(tmp_path, "dies"),
            digest,
            overwrite,
            write,
            moment,
        ),
    )
    dying.start()
    dying.join(60)
    assert dying.exitcode == -signal.SIGKILL

    publish(store, way, folder, local_folder(tmp_path, "next"), attempt("next", digest), overwrite)
    manifest = read_manifest(store, folder)
    assert manifest is not None
    assert manifest.digest == digest
    fetch(store, folder, manifest, tmp_path / "got")
    assert {(tmp_path / "got" / name).read_text() for name in FILES} == {manifest.attempt}
    decided = "replace claim" if overwrite else "create claim"
    if way == "stable":
        claimed = (OVERWRITE if overwrite else STABLE).index(decided)
        expected = "dies" if (write, MOMENTS.index(moment)) >= (claimed, MOMENTS.index("after")) else "next"
        assert manifest.attempt == expected, "whoever held the claim is published, and nobody else"
        assert len(list(store.entries(folder))) == len(FILES) + 1

        root = folder.rpartition("/")[0]
        beside = [relative(root, e.key) for e in store.entries(root) if not e.key.startswith(f"{folder}/")]
        assert beside == [".claims/adapter.json"]

    kept = [relative(folder, entry.key) for entry in store.entries(folder)]
    in_place = [join("attempts", digest, manifest.attempt, name) for name in FILES]
    assert kept == sorted(["manifest.json", *(FILES if way == "stable" else in_place)])
