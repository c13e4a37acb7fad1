"""Container images without a registry: a Debian base made by debootstrap, this project's own by buildah, and their way to a node.

Everything lies in a storage of our own in the cache folder, so that the user's images stay apart and a second build takes seconds.
Needs root.
"""

import base64
import contextlib
import fcntl
import hashlib
import io
import json
import os
import shutil
import stat
import subprocess
import tarfile
import tempfile
import threading
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import IO, Any

from tests.cluster import build
from tests.cluster.build import REPOSITORY, CannotBuild

PREFIX = "localhost/kubepeft"
"""A name without a host would be looked for in a registry."""
BASE = f"{PREFIX}-base:trixie"
"""Debian with Python 3.13, as python:3.13-slim is."""
_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
_PACKAGES = "python3,ca-certificates"
_CERTIFICATES = ("/etc/ssl/certs", "/usr/share/ca-certificates", "/usr/local/share/ca-certificates")


def build_base() -> str:
    """The base image, made on first use (half a minute). Returns its name.

    Raises:
        CannotBuild: debootstrap or buildah is missing or failed.
    """
    with _missing(BASE) as missing:
        if missing:
            print("── base image: Debian trixie with Python, by debootstrap (half a minute, once)", flush=True)
            with tempfile.TemporaryDirectory(dir=_cache()) as scratch:
                root = Path(scratch) / "root"
                _run("debootstrap", "--variant=minbase", f"--include={_PACKAGES}", "trixie", root)
                shutil.rmtree(root / "var/cache/apt")
                shutil.rmtree(root / "var/lib/apt/lists")
                _build(BASE, "FROM scratch\nCOPY root/ /\n", Path(scratch))
    return BASE


def build_pause() -> str:
    """The image of a pod's sandbox. Returns its name."""
    name = f"{PREFIX}-pause:{_digest(build.program('pause'))}"
    return _build_of_file(name, build.program("pause"), 'COPY pause /pause\nENTRYPOINT ["/pause"]\n')


def build_image(target: str, tag: str = "test", base: str | None = None) -> str:
    """An image of the project's Dockerfile. Returns its name, `PREFIX`/TARGET:TAG.

    Args:
        target: `operator` or `jobs`.
        tag: the last part of its name.
        base: a name in this storage; `build_base()` where it is left out.

    Raises:
        CannotBuild: buildah is missing or failed; the message ends with what it said.
    """
    name = f"{PREFIX}/{target}:{tag}"
    base = base or build_base()
    uv = Path(shutil.which("uv") or REPOSITORY / ".build/uv/bin/uv")
    uv_image = _build_of_file(f"{PREFIX}-uv:{_digest(uv)}", uv, "COPY uv /uv\n")
    uv_cache = subprocess.run([uv, "cache", "dir"], check=True, capture_output=True, text=True).stdout.strip()
    arguments = {"BASE": base, "UV": uv_image, "UV_CACHE_DIR": "/uv-cache"}
    volumes = {uv_cache: "/uv-cache"}
    if bundle := os.environ.get("SSL_CERT_FILE"):  # a machine whose network signs TLS itself
        arguments["SSL_CERT_FILE"] = bundle
        volumes |= {folder: f"{folder}:ro" for folder in _CERTIFICATES if Path(folder).is_dir()}
    print(f"── image {name}: building (jobs takes minutes the first time)", flush=True)
    with _builder():
        _run(
            *_buildah("build", "--isolation", "chroot", "--layers", "--quiet", "--target", target, "--tag", name),
            *(word for key, value in arguments.items() for word in ("--build-arg", f"{key}={value}")),
            *(word for source, place in volumes.items() for word in ("--volume", f"{source}:{place}")),
            "--file",
            REPOSITORY / "Dockerfile",
            REPOSITORY,
        )
        _drop_stale()
    return name


def _drop_stale() -> None:
    """Removes what earlier builds left with a large layer (the packages of jobs, 6 GB) that no named image has any more."""
    images = json.loads((_storage() / "overlay-images" / "images.json").read_text())
    records = json.loads((_storage() / "overlay-layers" / "layers.json").read_text())
    large = {record["id"] for record in records if record.get("diff-size", 0) > 1 << 30}
    held = {layer for image in images if image.get("names") for layer in _chain(image["layer"])}
    stale = [
        image["id"]
        for image in images
        if not image.get("names") and not large.intersection(_chain(image["layer"])) <= held
    ]
    if stale:
        _run(*_buildah("rmi", "--force", *stale))


def size(name: str) -> int:
    """Bytes of an image's layers, uncompressed."""
    image = _find(name)
    assert image, name
    return sum(int(_layer_descriptor(layer)["size"]) for layer in _chain(image["layer"]))


def write_archive(name: str, to: IO[bytes], present: Collection[str]) -> None:
    """Write an image as an OCI archive to a file or pipe, without the blobs of `present` (digests), which its receiver has.

    buildah's own push would read and write all layers every time, gigabytes of them, and wait while others build; here they are read from
    its storage, and their digests kept beside it.
    https://github.com/opencontainers/image-spec/blob/main/image-layout.md
    """
    image = _find(name)
    if image is None:
        raise CannotBuild(f"there is no image {name}: build it first")
    layers = {layer: _layer_descriptor(layer) for layer in _chain(image["layer"])}
    config = json.loads(_config_file(image["id"]).read_bytes())
    config["rootfs"]["diff_ids"] = [descriptor["digest"] for descriptor in layers.values()]
    config_bytes = json.dumps(config).encode()
    manifest = {
        "schemaVersion": 2,
        "mediaType": _MANIFEST,
        "config": _descriptor("application/vnd.oci.image.config.v1+json", config_bytes),
        "layers": [*layers.values()],
    }
    manifest_bytes = json.dumps(manifest).encode()
    annotations = {"io.containerd.image.name": name, "org.opencontainers.image.ref.name": name}
    entry = {**_descriptor(_MANIFEST, manifest_bytes), "annotations": annotations}
    with tarfile.open(fileobj=to, mode="w|", bufsize=1 << 20) as tar:
        _add(tar, "oci-layout", b'{"imageLayoutVersion": "1.0.0"}')
        _add(tar, "index.json", json.dumps({"schemaVersion": 2, "manifests": [entry]}).encode())
        for blob in (manifest_bytes, config_bytes):
            _add(tar, f"blobs/sha256/{hashlib.sha256(blob).hexdigest()}", blob)
        for layer, descriptor in layers.items():
            if descriptor["digest"] not in present:
                blob_entry = tarfile.TarInfo(f"blobs/sha256/{descriptor['digest'].removeprefix('sha256:')}")
                blob_entry.size = descriptor["size"]
                with _layer_stream(layer) as content:
                    tar.addfile(blob_entry, content)


def _find(name: str) -> dict[str, Any] | None:
    """The storage's record of an image. Asking buildah would wait for its builds."""
    records = _storage() / "overlay-images" / "images.json"
    images = json.loads(records.read_text()) if records.exists() else []
    return next((image for image in images if name in image.get("names", [])), None)


def _config_file(image: str) -> Path:
    key = base64.b64encode(f"sha256:{image}".encode()).decode()
    return _storage() / "overlay-images" / image / f"={key}"


def _chain(layer: str) -> list[str]:
    """A layer and those below it, the lowest first."""
    records = json.loads((_storage() / "overlay-layers" / "layers.json").read_text())
    parents = {record["id"]: record.get("parent") for record in records}
    chain = [layer]
    while parent := parents[chain[-1]]:
        chain.append(parent)
    return chain[::-1]


def _layer_descriptor(layer: str) -> dict[str, Any]:
    """Of the tar that `_layer_stream` gives: a layer is read for it once."""
    known = _cache() / "layers" / f"{layer}.json"
    if known.exists():
        return dict(json.loads(known.read_text()))
    digest, length = hashlib.sha256(), 0
    with _layer_stream(layer) as content:
        while data := content.read(1 << 20):
            digest.update(data)
            length += len(data)
    media_type = "application/vnd.oci.image.layer.v1.tar"
    descriptor = {"mediaType": media_type, "digest": f"sha256:{digest.hexdigest()}", "size": length}
    known.parent.mkdir(exist_ok=True)
    known.write_text(json.dumps(descriptor))
    return descriptor


@contextlib.contextmanager
def _layer_stream(layer: str) -> Iterator[IO[bytes]]:
    """A layer as a tar, byte for byte the same every time."""
    reader, writer = os.pipe()

    def produce() -> None:
        with (
            contextlib.suppress(BrokenPipeError),  # whoever reads says why it stopped
            open(writer, "wb") as out,
            tarfile.open(fileobj=out, mode="w|", bufsize=1 << 20, format=tarfile.PAX_FORMAT) as tar,
        ):
            _add_layer(tar, _storage() / "overlay" / layer / "diff")

    thread = threading.Thread(target=produce)
    thread.start()
    with open(reader, "rb") as content:
        yield content
    thread.join()


def _add_layer(tar: tarfile.TarFile, root: Path) -> None:
    """A layer's folder as overlayfs keeps it, with OCI's files for what it hides of the layers below."""
    for folder, names, files in os.walk(root):
        names.sort()
        place = Path(folder)
        if place != root and "trusted.overlay.opaque" in os.listxattr(folder):
            _add(tar, (place / ".wh..wh..opq").relative_to(root).as_posix(), b"")
        for name in sorted([*names, *files]):
            path = place / name
            mode = path.lstat()
            if stat.S_ISCHR(mode.st_mode) and mode.st_rdev == 0:
                _add(tar, (place / f".wh.{name}").relative_to(root).as_posix(), b"")
            else:
                tar.add(path, path.relative_to(root).as_posix(), recursive=False)


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    tar.addfile(entry, io.BytesIO(content))


def _descriptor(media_type: str, content: bytes) -> dict[str, Any]:
    digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
    return {"mediaType": media_type, "digest": digest, "size": len(content)}


def _build_of_file(name: str, file: Path, instructions: str) -> str:
    with _missing(name) as missing:
        if missing:
            with tempfile.TemporaryDirectory(dir=_cache()) as scratch:
                shutil.copyfile(file, Path(scratch) / file.name)
                (Path(scratch) / file.name).chmod(0o755)
                _build(name, f"FROM scratch\n{instructions}", Path(scratch))
    return name


def _build(name: str, containerfile: str, context: Path) -> None:
    (context / "Containerfile").write_text(containerfile)
    _run(
        *_buildah(
            "build", "--isolation", "chroot", "--quiet", "--tag", name, "--file", context / "Containerfile", context
        )
    )


def _buildah(*arguments: str | Path) -> tuple[str | Path, ...]:
    """buildah in a mount namespace, so that none of its mounts outlives it."""
    return (
        *(
            "unshare",
            "--mount",
            "buildah",
            "--root",
            _storage(),
            "--runroot",
            _cache() / "run",
            "--storage-driver",
            "overlay",
        ),
        *arguments,
    )


_BUSY = "sealing memfd copy: Device or resource busy"
"""buildah starts itself from a copy in memory, and now and then can't seal it yet: nothing has been done then."""


def run_buildah(*arguments: str | Path) -> str:
    """What buildah prints, in the tests' own storage.

    Raises:
        CannotBuild: it failed; the message ends with what it said.
    """
    return _run(*_buildah(*arguments))


def _run(*argv: str | Path) -> str:
    for again in (True, True, False):
        done = subprocess.run(argv, env=_environment(), capture_output=True, text=True)
        if not (again and done.returncode and _BUSY in done.stderr):
            break
        time.sleep(1)
    if done.returncode:
        raise CannotBuild(f"{' '.join(map(str, argv))} failed:\n{(done.stdout + done.stderr)[-4000:]}")
    return done.stdout


def _environment() -> dict[str, str]:
    return {**os.environ, "TMPDIR": str(_cache())}


def _storage() -> Path:
    return _cache() / "storage"


def _digest(file: Path) -> str:
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()[:12]


def _cache() -> Path:
    folder = build.cache_folder() / "images"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextlib.contextmanager
def _missing(name: str) -> Iterator[bool]:
    """Whether an image is missing, and if so the right to build it: no wait for others' builds where it is there."""
    _check_tools()
    if _find(name):
        yield False
        return
    with _builder():
        yield _find(name) is None


@contextlib.contextmanager
def _builder() -> Iterator[None]:
    """One build at a time."""
    _check_tools()
    with open(_cache() / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _check_tools() -> None:
    for program, package in {"buildah": "buildah", "debootstrap": "debootstrap", "unshare": "util-linux"}.items():
        if not shutil.which(program):
            raise CannotBuild(f"{program} is needed to build images for the tests: install {package}")
    if os.geteuid() != 0:
        raise CannotBuild("building images for the tests needs root")
