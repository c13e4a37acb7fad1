"""What files and S3 do alike: reading, writing whole files, conditional writes, finding; and what each says in trouble."""

import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kubepeft.errors import UserError
from kubepeft.storage import Store, find, fingerprint, join, open_reader, open_store, parse_uri, relative
from kubepeft.storage.local import LocalStore, write_beside
from kubepeft.storage.s3 import PART_SIZE
from tests.servers import S3Server

StoreAndRoot = tuple[Store, str]


def put(store: Store, files: dict[str, bytes]) -> None:
    for key, data in files.items():
        assert store.create(key, data)


def test_importing_storage_loads_no_client_library() -> None:
    code = "import sys, kubepeft.storage; print([m for m in ('boto3','urllib3','huggingface_hub','pydantic','torch') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_what_is_written_is_read_listed_and_described(store_and_root: StoreAndRoot) -> None:
    store, root = store_and_root
    put(store, {join(root, "b/two"): b"22", join(root, "a"): b"1", join(root, "b/c/three"): b""})
    assert [(relative(root, e.key), e.size) for e in store.entries(root)] == [("a", 1), ("b/c/three", 0), ("b/two", 2)]
    assert [relative(root, e.key) for e in store.entries(join(root, "b"))] == ["b/c/three", "b/two"]
    assert list(store.entries(join(root, "nothing"))) == []
    assert store.read(join(root, "b/two")) == b"22"
    assert store.read(join(root, "b/c/three")) == b""
    assert store.read(join(root, "missing")) is None
    assert store.stat(join(root, "missing")) is None
    assert store.stat(join(root, "b")) is None
    entry = store.stat(join(root, "a"))
    assert entry is not None
    assert entry in list(store.entries(root))
    with store.open(join(root, "b/two")) as stream:
        assert (stream.read(1), stream.read()) == (b"2", b"2")


def test_a_listing_does_not_take_in_a_neighbour_whose_name_begins_the_same(store_and_root: StoreAndRoot) -> None:
    store, root = store_and_root
    put(store, {join(root, "support/x"): b"1", join(root, "support2/x"): b"1"})
    assert [relative(root, e.key) for e in store.entries(join(root, "support"))] == ["support/x"]


def test_the_version_changes_with_the_content(store_and_root: StoreAndRoot) -> None:
    store, root = store_and_root
    put(store, {join(root, "a"): b"1"})
    before = fingerprint(store.entries(root), root)
    assert fingerprint(store.entries(root), root) == before
    assert store.replace(join(root, "a"), b"2", expected=b"1")
    assert fingerprint(store.entries(root), root) != before


def test_many_files_go_up_and_come_down_whole(store_and_root: StoreAndRoot, tmp_path: Path) -> None:
    store, root = store_and_root
    files = {f"d{n % 3}/{n}": os.urandom(n * 1000) for n in range(20)}
    files["large"] = os.urandom(2 * PART_SIZE + 12_345)  # several parts
    files["empty"] = b""
    for name, data in files.items():
        path = tmp_path / "source" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    store.upload({join(root, name): tmp_path / "source" / name for name in files})
    store.copy({join(root, name): join(root, "copy", name) for name in files})
    store.download({join(root, "copy", name): tmp_path / "back" / name for name in files})
    assert {name: (tmp_path / "back" / name).read_bytes() for name in files} == files
    assert sorted(p.name for p in (tmp_path / "back").iterdir()) == ["d0", "d1", "d2", "empty", "large"]


def test_delete_removes_what_is_there_and_minds_nothing_else(store_and_root: StoreAndRoot) -> None:
    store, root = store_and_root
    put(store, {join(root, f"x/{n}"): b"1" for n in range(3)})
    store.delete([join(root, "x/0"), join(root, "x/missing"), join(root, "x/2")])
    assert [relative(root, e.key) for e in store.entries(root)] == ["x/1"]
    store.delete([])


def test_create_writes_only_where_nothing_is(store_and_root: StoreAndRoot) -> None:
    store, root = store_and_root
    assert store.create(join(root, "c"), b"first")
    assert not store.create(join(root, "c"), b"second")
    assert store.read(join(root, "c")) == b"first"


def test_replace_writes_only_over_what_is_expected(store_and_root: StoreAndRoot) -> None:
    store, root = store_and_root
    key = join(root, "c")
    assert not store.replace(key, b"x", expected=b"first")
    assert store.create(key, b"first")
    assert not store.replace(key, b"x", expected=b"other")
    assert store.replace(key, b"second", expected=b"first")
    assert not store.replace(key, b"third", expected=b"first")
    assert store.read(key) == b"second"


def test_of_many_writers_at_once_exactly_one_creates_and_one_replaces(store_and_root: StoreAndRoot) -> None:
    store, root = store_and_root
    for number in range(20):
        key = join(root, f"race/{number}")
        for step in ("create", "replace"):
            before = store.read(key) or b""
            won: list[bytes] = []
            start = threading.Barrier(4)

            def write(me: int, step: str = step, key: str = key, before: bytes = before, won: list[bytes] = won,
                      start: threading.Barrier = start) -> None:  # fmt: skip
                data = f"{step}{me}".encode()
                start.wait()
                if store.create(key, data) if step == "create" else store.replace(key, data, expected=before):
                    won.append(data)

            threads = [threading.Thread(target=write, args=(me,)) for me in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert [store.read(key)] == won


def test_find_takes_a_file_a_folder_or_a_glob(store_and_root: StoreAndRoot) -> None:
    store, root = store_and_root
    put(store, {join(root, k): b"1" for k in ("d/a.jsonl", "d/b.jsonl", "d/e/c.jsonl", "d/x.csv", "d/we[i]rd.csv")})

    def names(path: str) -> list[str]:
        return [relative(root, e.key) for e in find(store, join(root, path))]

    assert names("d/a.jsonl") == ["d/a.jsonl"]
    assert names("d/*.jsonl") == ["d/a.jsonl", "d/b.jsonl"]
    assert names("d/**/*.jsonl") == ["d/a.jsonl", "d/b.jsonl", "d/e/c.jsonl"]
    assert names("d/e") == ["d/e/c.jsonl"]
    assert names("d/we[i]rd.csv") == ["d/we[i]rd.csv"]


def test_find_says_what_lies_nearby_when_nothing_matches(store_and_root: StoreAndRoot) -> None:
    store, root = store_and_root
    put(store, {join(root, "d/train.jsonl"): b"1", join(root, "d/notes"): b"1"})
    for path in ("d/trian.jsonl", "d/*.json"):
        with pytest.raises(UserError, match=r"train\.jsonl") as caught:
            find(store, join(root, path))
        assert caught.value.reason == "NothingFound"
    with pytest.raises(UserError, match="nothing lies below"):
        find(store, join(root, "elsewhere/x.jsonl"))


def test_opening_or_fetching_a_missing_key_names_it(store_and_root: StoreAndRoot, tmp_path: Path) -> None:
    store, root = store_and_root
    key = join(root, "missing.jsonl")
    for act in (
        lambda: store.open(key),
        lambda: store.download({key: tmp_path / "x"}),
        lambda: store.copy({key: key + "2"}),
    ):
        with pytest.raises(UserError, match=r"missing\.jsonl") as caught:
            act()
        assert caught.value.reason == "NoSuchKey"
    assert not (tmp_path / "x").exists()


# --- Files only


def test_a_claim_is_read_at_its_mount(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "x").write_bytes(b"1")
    location = parse_uri("pvc://cache/base")
    store = open_store(location, mounts={"cache": tmp_path})
    assert [e.key for e in find(store, location.path)] == ["base/x"]
    assert store.uri("base/x") == "pvc://cache/base/x"
    with pytest.raises(UserError, match="'cache' is not mounted") as caught:
        open_store(location)
    assert caught.value.reason == "ClaimNotMounted"


def test_hub_and_web_addresses_can_not_be_written_to() -> None:
    for text in ("hf://org/name", "https://example.com/x"):
        with pytest.raises(UserError, match="can be read only"):
            open_store(parse_uri(text))


def test_a_full_disk_is_told_and_leaves_nothing_behind(tmp_path: Path) -> None:
    disk = tmp_path / "small"
    disk.mkdir()
    if (
        os.getuid()
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], check=False).returncode
    ):
        pytest.skip("needs the right to mount a small file system")
    try:
        store = LocalStore(disk, "file://")
        (tmp_path / "big").write_bytes(b"x" * 1_000_000)
        for act in (lambda: store.upload({"a": tmp_path / "big"}), lambda: store.create("a", b"x" * 1_000_000)):
            with pytest.raises(UserError, match="larger volume") as caught:
                act()
            assert caught.value.reason == "DiskFull"
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_file_in_place_of_a_folder_is_told(tmp_path: Path) -> None:
    store = LocalStore(tmp_path, "file://")
    assert store.create("a", b"1")
    with pytest.raises(UserError, match="share a name") as caught:
        store.create("a/b", b"1")
    assert caught.value.reason == "BadPath"


def test_a_write_that_was_killed_is_not_listed(tmp_path: Path) -> None:
    code = f"""
import os, pathlib
from kubepeft.storage.local import write_beside
write_beside(pathlib.Path({str(tmp_path / "d" / "x")!r}), lambda file: (file.write(b'half'), file.flush(), os.kill(os.getpid(), 9)))
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    assert len(list((tmp_path / "d").iterdir())) == 1
    assert list(LocalStore(tmp_path, "file://").entries("")) == []
    write_beside(tmp_path / "d" / "x", lambda file: file.write(b"whole") and None)
    assert [e.key for e in LocalStore(tmp_path, "file://").entries("")] == ["d/x"]


def test_reading_without_permission_is_told(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"1")
    (tmp_path / "secret").chmod(0)
    tmp_path.chmod(0o755)
    if not os.getuid():
        pytest.skip("root may read everything")
    with pytest.raises(UserError) as caught:
        LocalStore(tmp_path, "file://").read("secret")
    assert caught.value.reason == "AccessDenied"


# --- S3 only


def test_objects_that_consoles_make_for_folders_are_left_out(s3: Store, bucket: str, s3_environment: S3Server) -> None:
    import boto3
    from botocore.config import Config

    client = boto3.client("s3", config=Config(s3={"addressing_style": "path"}))
    client.put_object(Bucket=bucket, Key="data/", Body=b"")
    put(s3, {"data/x": b"1"})
    assert [e.key for e in find(open_reader(parse_uri(f"s3://{bucket}/data/")), "data")] == ["data/x"]


def test_a_listing_of_more_than_one_page_is_whole(s3: Store, bucket: str, s3_environment: S3Server) -> None:
    folder = s3_environment.root / bucket / "many"
    folder.mkdir()
    for number in range(2_100):
        (folder / f"{number:05}").touch()
    assert [e.key for e in s3.entries("many")] == [f"many/{number:05}" for number in range(2_100)]
    s3.delete([e.key for e in s3.entries("many")])
    assert list(s3.entries("many")) == []


def test_objects_without_an_etag_are_read_too(s3: Store, bucket: str, s3_environment: S3Server) -> None:
    (s3_environment.root / bucket / "put-there-by-hand").write_bytes(b"1")
    assert s3.read("put-there-by-hand") == b"1"
    assert [e.key for e in s3.entries("")] == ["put-there-by-hand"]


def test_a_copy_whose_source_is_removed_on_its_way_does_not_land(tmp_path: Path) -> None:
    """An overruled attempt's late copy would otherwise lie over what was published since."""
    location = parse_uri(f"file://{tmp_path}")
    store, root = open_store(location), location.path
    (tmp_path / "source").write_bytes(bytes(256 << 20))
    store.create(f"{root}/out/target", b"published since")
    with ThreadPoolExecutor(1) as pool:
        copying = pool.submit(store.copy, {f"{root}/source": f"{root}/out/target"})
        deadline = time.monotonic() + 60
        while len(list((tmp_path / "out").iterdir())) < 2:
            assert time.monotonic() < deadline
        (tmp_path / "source").unlink()
        with pytest.raises(UserError) as caught:
            copying.result()
    assert caught.value.reason == "NoSuchKey"
    assert store.read(f"{root}/out/target") == b"published since"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["target"]
