"""Publication, step by step: what counts, what is left alone, what is refused, and what a changed byte does."""

import json
import threading
from datetime import UTC, datetime
from pathlib import Path

import pytest

from kubepeft.errors import TransientError, UserError
from kubepeft.storage import Store, join, relative
from kubepeft.storage.publish import (
    Attempt,
    Manifest,
    Published,
    claim_and_finish,
    discard,
    fetch,
    fetch_staged,
    inventory,
    publish_in_place,
    read_manifest,
    recover,
    stage,
    verify,
)

StoreAndRoot = tuple[Store, str]
NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def attempt(name: str, digest: str = "v1:d1") -> Attempt:
    return Attempt(name, digest, NOW, {"model": "org/model", "packages": {"peft": "0.21"}})


def folder_of(tmp_path: Path, content: str, *names: str) -> Path:
    """A local folder whose every file says `content`, so that a mix of two can be told."""
    folder = tmp_path / f"local-{content}"
    for name in names or ("weights.safetensors", "sub/config.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return folder


def publish_stable(store: Store, folder: str, local: Path, who: Attempt, *, overwrite: bool = False) -> Published:
    return claim_and_finish(store, folder, stage(store, folder, local, who), overwrite=overwrite)


def contents(store: Store, folder: str, manifest: Manifest, dest: Path) -> set[str]:
    fetch(store, folder, manifest, dest)
    assert sorted(p.relative_to(dest).as_posix() for p in dest.rglob("*") if p.is_file()) == [
        f.path for f in manifest.files
    ]
    return {(dest / file.path).read_text() for file in manifest.files}


def keys(store: Store, root: str) -> list[str]:
    return [relative(root, entry.key) for entry in store.entries(root)]


@pytest.fixture(params=[publish_in_place, publish_stable], ids=["in place", "stable"])
def publish(request: pytest.FixtureRequest):  # type: ignore[no-untyped-def]
    return request.param


def test_a_folder_counts_when_it_is_published_and_not_before(
    publish, store_and_root: StoreAndRoot, tmp_path: Path
) -> None:  # type: ignore[no-untyped-def]
    store, root = store_and_root
    folder = join(root, "adapter")
    assert read_manifest(store, folder) is None
    done = publish(store, folder, folder_of(tmp_path, "one"), attempt("a1"))
    assert done.won
    manifest = read_manifest(store, folder)
    assert manifest == done.manifest
    assert manifest is not None
    assert (manifest.digest, manifest.attempt, manifest.created_at) == ("v1:d1", "a1", NOW)
    assert manifest.lineage == {"model": "org/model", "packages": {"peft": "0.21"}}
    verify(store, folder, manifest)
    assert contents(store, folder, manifest, tmp_path / "got") == {"one"}


def test_a_stable_folder_holds_its_files_as_they_were_and_nothing_else_is_left(
    store_and_root: StoreAndRoot, tmp_path: Path
) -> None:
    store, root = store_and_root
    publish_stable(store, join(root, "adapter"), folder_of(tmp_path, "one"), attempt("a1"))
    assert keys(store, root) == [
        ".claims/adapter.json", "adapter/manifest.json", "adapter/sub/config.json", "adapter/weights.safetensors",
    ]  # fmt: skip


def test_an_in_place_manifest_points_into_the_attempt(store_and_root: StoreAndRoot, tmp_path: Path) -> None:
    store, root = store_and_root
    publish_in_place(store, join(root, "prepared"), folder_of(tmp_path, "one"), attempt("a1"))
    assert keys(store, root) == [
        "prepared/attempts/v1-d1/a1/sub/config.json",
        "prepared/attempts/v1-d1/a1/weights.safetensors",
        "prepared/manifest.json",
    ]
    document = json.loads(store.read(join(root, "prepared/manifest.json")) or b"")
    assert document["filesUnder"] == "attempts/v1-d1/a1"
    assert document["createdAt"] == "2026-01-02T03:04:05Z"
    assert [file["path"] for file in document["files"]] == ["sub/config.json", "weights.safetensors"]


def test_the_same_digest_published_again_is_found_and_left_alone(
    publish, store_and_root: StoreAndRoot, tmp_path: Path
) -> None:  # type: ignore[no-untyped-def]
    store, root = store_and_root
    folder = join(root, "adapter")
    first = publish(store, folder, folder_of(tmp_path, "one"), attempt("a1"))
    before = list(store.entries(root))
    for overwrite in (False, True):
        again = publish(store, folder, folder_of(tmp_path, "two"), attempt("a2"), overwrite=overwrite)
        assert again == Published(first.manifest, won=False)
        assert list(store.entries(root)) == before


def test_another_digest_is_refused_and_changes_nothing(publish, store_and_root: StoreAndRoot, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    store, root = store_and_root
    folder = join(root, "adapter")
    publish(store, folder, folder_of(tmp_path, "one"), attempt("a1"))
    before = list(store.entries(root))
    with pytest.raises(UserError, match="overwrite: true") as caught:
        publish(store, folder, folder_of(tmp_path, "two"), attempt("a2", "v1:d2"))
    assert caught.value.reason == "OutputBelongsToAnotherSpec"
    assert list(store.entries(root)) == before


def test_overwriting_replaces_the_files_and_removes_the_old_ones(
    publish, store_and_root: StoreAndRoot, tmp_path: Path
) -> None:  # type: ignore[no-untyped-def]
    store, root = store_and_root
    folder = join(root, "adapter")
    old = publish(store, folder, folder_of(tmp_path, "one", "weights.safetensors", "old.json"), attempt("a1"))
    new = publish(
        store, folder, folder_of(tmp_path, "two", "weights.safetensors"), attempt("a2", "v1:d2"), overwrite=True
    )
    assert new.won
    assert read_manifest(store, folder) == new.manifest
    assert contents(store, folder, new.manifest, tmp_path / "got") == {"two"}
    assert not [key for key in keys(store, root) if "old.json" in key or "a1" in key]
    with pytest.raises(TransientError) as caught:
        fetch(store, folder, old.manifest, tmp_path / "late reader")
    assert caught.value.reason == "Overwritten"
    back = publish(store, folder, folder_of(tmp_path, "three"), attempt("a3"), overwrite=True)
    assert contents(store, folder, back.manifest, tmp_path / "got again") == {"three"}


def test_a_changed_byte_a_cut_file_and_a_missing_file_are_named(
    publish, store_and_root: StoreAndRoot, tmp_path: Path
) -> None:  # type: ignore[no-untyped-def]
    store, root = store_and_root
    folder = join(root, "adapter")
    manifest = publish(store, folder, folder_of(tmp_path, "one"), attempt("a1")).manifest
    key = manifest.key(folder, manifest.files[1])
    for number, spoil in enumerate((b"onE", b"on", None)):
        store.delete([key])
        if spoil is not None:
            assert store.create(key, spoil)
        for act in (
            lambda n=number: fetch(store, folder, manifest, tmp_path / f"got{n}"),
            lambda: verify(store, folder, manifest),
        ):
            with pytest.raises(UserError, match=r"weights\.safetensors") as caught:
                act()
            assert caught.value.reason == "ChangedBytes"
        assert list((tmp_path / f"got{number}").rglob("weights*")) == []


def test_files_that_are_there_and_right_are_not_fetched_again(store_and_root: StoreAndRoot, tmp_path: Path) -> None:
    store, root = store_and_root
    folder = join(root, "adapter")
    manifest = publish_stable(store, folder, folder_of(tmp_path, "one"), attempt("a1")).manifest
    dest = tmp_path / "got"
    fetch(store, folder, manifest, dest)
    (dest / "weights.safetensors").write_text("wrong")
    kept = (dest / "sub/config.json").stat().st_ino
    fetch(store, folder, manifest, dest)
    assert (dest / "weights.safetensors").read_text() == "one"
    assert (dest / "sub/config.json").stat().st_ino == kept


def test_a_staged_copy_can_be_tested_before_the_claim_and_thrown_away(
    store_and_root: StoreAndRoot, tmp_path: Path
) -> None:
    store, root = store_and_root
    folder = join(root, "adapter")
    staged = stage(store, folder, folder_of(tmp_path, "one"), attempt("a1"))
    fetch_staged(store, folder, staged, tmp_path / "got")
    assert (tmp_path / "got" / "weights.safetensors").read_text() == "one"
    assert read_manifest(store, folder) is None
    assert recover(store, folder, "v1:d1") is None
    discard(store, staged)
    assert keys(store, root) == []


def test_staged_bytes_that_changed_are_not_published(store_and_root: StoreAndRoot, tmp_path: Path) -> None:
    store, root = store_and_root
    folder = join(root, "adapter")
    staged = stage(store, folder, folder_of(tmp_path, "one"), attempt("a1"))
    assert store.replace(staged.keys()[1], b"onE", expected=b"one")
    with pytest.raises(UserError) as caught:
        fetch_staged(store, folder, staged, tmp_path / "got")
    assert caught.value.reason == "ChangedBytes"
    with pytest.raises(TransientError) as transient:
        claim_and_finish(store, folder, staged)
    assert transient.value.reason == "StagedFilesGone"
    assert read_manifest(store, folder) is None
    done = publish_stable(store, folder, folder_of(tmp_path, "two"), attempt("a2"))
    assert done.won
    assert contents(store, folder, done.manifest, tmp_path / "got2") == {"two"}


def test_what_an_abandoned_attempt_left_goes_when_another_wins(
    publish, store_and_root: StoreAndRoot, tmp_path: Path
) -> None:  # type: ignore[no-untyped-def]
    store, root = store_and_root
    folder = join(root, "adapter")
    attempts = join(folder, "attempts") if publish is publish_in_place else join(root, ".attempts/adapter")
    assert store.create(join(attempts, "v1-d1/dead/weights.safetensors"), b"left")
    assert store.create(join(attempts, "v1-d2/other-spec/weights.safetensors"), b"left")
    publish(store, folder, folder_of(tmp_path, "one"), attempt("a1"))
    assert [key for key in keys(store, root) if "dead" in key or "other-spec" in key] == [
        relative(root, join(attempts, "v1-d2/other-spec/weights.safetensors"))
    ]


def test_output_that_was_removed_by_hand_can_be_made_again(store_and_root: StoreAndRoot, tmp_path: Path) -> None:
    store, root = store_and_root
    folder = join(root, "adapter")
    publish_stable(store, folder, folder_of(tmp_path, "one"), attempt("a1"))
    for number, digest in enumerate(("v1:d1", "v1:d2")):
        store.delete([entry.key for entry in store.entries(folder)])
        assert recover(store, folder, digest) is None
        done = publish_stable(store, folder, folder_of(tmp_path, f"new{number}"), attempt(f"b{number}", digest))
        assert done.won
        assert contents(store, folder, done.manifest, tmp_path / f"got{number}") == {f"new{number}"}


def test_another_spec_is_refused_before_the_work_begins(store_and_root: StoreAndRoot, tmp_path: Path) -> None:
    store, root = store_and_root
    folder = join(root, "adapter")
    published = publish_stable(store, folder, folder_of(tmp_path, "one"), attempt("a1")).manifest
    assert recover(store, folder, "v1:d1") == published
    assert recover(store, folder, "v1:d2", overwrite=True) is None
    with pytest.raises(UserError) as caught:
        recover(store, folder, "v1:d2")
    assert caught.value.reason == "OutputBelongsToAnotherSpec"


def test_a_late_finisher_of_an_overwritten_claim_cannot_publish_it(
    store_and_root: StoreAndRoot, tmp_path: Path
) -> None:
    store, root = store_and_root
    folder = join(root, "adapter")
    old = stage(store, folder, folder_of(tmp_path, "one"), attempt("a1"))
    publish_stable(store, folder, folder_of(tmp_path, "two"), attempt("a2", "v1:d2"))
    with pytest.raises(UserError):
        claim_and_finish(store, folder, old)
    manifest = read_manifest(store, folder)
    assert manifest is not None
    assert contents(store, folder, manifest, tmp_path / "got") == {"two"}
    assert not [key for key in keys(store, root) if "a1" in key]


def test_two_specs_that_overwrite_each_other_at_once_never_leave_a_mix(
    store_and_root: StoreAndRoot, tmp_path: Path
) -> None:
    store, root = store_and_root
    for number in range(10):
        folder = join(root, str(number), "adapter")
        publish_stable(store, folder, folder_of(tmp_path, "zero"), attempt("a0", "v1:d0"))
        outcomes: list[object] = []
        start = threading.Barrier(3)

        def run(
            me: int, folder: str = folder, outcomes: list[object] = outcomes, start: threading.Barrier = start
        ) -> None:
            local = folder_of(tmp_path, f"spec{me}")
            start.wait()
            try:
                outcomes.append(publish_stable(store, folder, local, attempt(f"a{me}", f"v1:d{me}"), overwrite=True))
            except (UserError, TransientError) as error:
                outcomes.append(error.reason)

        threads = [threading.Thread(target=run, args=(me,)) for me in (1, 2, 3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        manifest = read_manifest(store, folder)
        assert manifest is not None, outcomes
        assert contents(store, folder, manifest, tmp_path / f"got{number}") == {f"spec{manifest.attempt[1:]}"}
        assert Published(manifest, won=True) in outcomes


@pytest.mark.parametrize("body", [b"{}", b"not json", b'{"version": 2, "digest": "d"}'])
def test_a_manifest_that_cannot_be_understood_is_told(
    body: bytes, store_and_root: StoreAndRoot, tmp_path: Path
) -> None:
    store, root = store_and_root
    assert store.create(join(root, "adapter/manifest.json"), body)
    for act in (
        lambda: read_manifest(store, join(root, "adapter")),
        lambda: publish_in_place(store, join(root, "adapter"), folder_of(tmp_path, "one"), attempt("a1")),
    ):
        with pytest.raises(UserError, match=r"adapter/manifest\.json") as caught:
            act()
        assert caught.value.reason == "CorruptManifest"


def test_a_manifest_cannot_lead_out_of_its_folder(store_and_root: StoreAndRoot, tmp_path: Path) -> None:
    store, root = store_and_root
    good = publish_in_place(store, join(root, "p"), folder_of(tmp_path, "one"), attempt("a1")).manifest.body()
    for bad in (b"../../etc/passwd", b"/etc/passwd", b"a/../../b"):
        body = good.replace(b"sub/config.json", bad)
        store.delete([join(root, "p/manifest.json")])
        assert store.create(join(root, "p/manifest.json"), body)
        with pytest.raises(UserError) as caught:
            read_manifest(store, join(root, "p"))
        assert caught.value.reason == "CorruptManifest"


def test_an_inventory_lists_every_file_with_size_and_sha256(tmp_path: Path) -> None:
    files = inventory(folder_of(tmp_path, "one"))
    assert [(f.path, f.size) for f in files] == [("sub/config.json", 3), ("weights.safetensors", 3)]
    assert files[0].sha256 == "7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed"
