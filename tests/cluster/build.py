"""The programs that tests start, built by Go from pinned modules: `python3 tests/cluster/build.py [PART ...]`.

Nothing is downloaded ready made but Debian's own Prometheus and prometheus-operator's CRDs. What was built stays in a cache folder of the user's, under the hash
of its recipe, so that another checkout links it in a moment; `.build/bin` holds links into that cache. Standard library only: the
Makefile runs this before there is a .venv.
"""

import argparse
import fcntl
import functools
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
BIN = REPOSITORY / ".build" / "bin"
HERE = Path(__file__).resolve().parent
KUBERNETES = "v1.36.3"


@dataclass(frozen=True)
class Part:
    """One build and the programs that come of it.

    `packages` are Go packages with their version, or the name of a folder here that is a Go module, or of Debian packages. With the
    kind "files", `programs` are files of a Go module, by name.
    """

    packages: tuple[str, ...]
    programs: tuple[str, ...]
    minutes: float = field(repr=False)
    kind: str = "install"
    tags: str = ""
    cgo: bool = False
    ldflags: str = "-s -w"


def _containerd(version: str) -> tuple[str, ...]:
    return tuple(
        f"github.com/containerd/containerd/v2/cmd/{program}@{version}"
        for program in ("containerd", "ctr", "containerd-shim-runc-v2")
    )


def _kubernetes_version() -> str:
    package, (major, minor, _) = "k8s.io/component-base/version", KUBERNETES.removeprefix("v").split(".")
    return f"-X {package}.gitVersion={KUBERNETES} -X {package}.gitMajor={major} -X {package}.gitMinor={minor}"


PARTS = {
    "kubernetes": Part(
        ("kubernetes",),
        ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kube-proxy", "kubelet", "kubectl"),
        minutes=5,
        kind="module",
        ldflags=f"-s -w {_kubernetes_version()}",
    ),
    "versitygw": Part(("github.com/versity/versitygw/cmd/versitygw@v1.8.0",), ("versitygw",), minutes=1),
    "kwok": Part(("sigs.k8s.io/kwok/cmd/kwok@v0.8.0",), ("kwok",), minutes=1),
    "helm": Part(("helm.sh/helm/v4/cmd/helm@v4.3.1",), ("helm",), minutes=2),
    "containerd": Part(_containerd("v2.2.1"), ("containerd", "ctr", "containerd-shim-runc-v2"), minutes=1.5),
    "runc": Part(("github.com/opencontainers/runc@v1.5.2",), ("runc",), minutes=0.5, tags="seccomp", cgo=True),
    "coredns": Part(("github.com/coredns/coredns@v1.14.7",), ("coredns",), minutes=2),
    "pause": Part(("pause",), ("pause",), minutes=0.1, kind="module"),
    "prometheus-operator": Part(
        ("github.com/prometheus-operator/prometheus-operator@v0.85.0",),
        tuple(f"monitoring.coreos.com_{one}.yaml" for one in ("podmonitors", "servicemonitors", "prometheusrules")),
        minutes=0.1,
        kind="files",
    ),
    "prometheus": Part(("prometheus",), ("prometheus", "promtool"), minutes=0.2, kind="debian"),
}


class CannotBuild(RuntimeError):
    """A part can't be built on this machine; the message says what is missing."""


def program(name: str) -> Path:
    """The path of a program, built first where it is missing.

    Raises:
        CannotBuild: Go or a library is missing, or the build failed; the message ends with what the compiler said.
    """
    part = next(part for part, recipe in PARTS.items() if name in recipe.programs)
    ensure(part)
    return BIN / name


@functools.cache
def ensure(name: str) -> None:
    """Build and link the programs of one part, as far as that has not been done.

    Raises:
        CannotBuild: as for `program`.
    """
    part = PARTS[name]
    folder = cache_folder() / "bin" / f"{name}-{_recipe_hash(part)}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    if not folder.exists():
        with _lock(folder.with_suffix(".lock")):  # another session builds it: one wait is cheaper than two builds
            if not folder.exists():
                _build(name, part, folder)
    BIN.mkdir(parents=True, exist_ok=True)
    for program in part.programs:
        target = folder / (name if part.kind == "module" else program)
        link = BIN / program
        if link.is_symlink() and link.readlink() == target:
            continue
        fresh = BIN / f".{program}.{os.getpid()}"
        fresh.symlink_to(target)
        fresh.replace(link)


def _build(name: str, part: Part, folder: Path) -> None:
    print(f"── {name}: building {' '.join(part.packages)} (about {part.minutes:g} min on two cores, once)", flush=True)
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{name}-") as scratch:
        out = Path(scratch) / "out"
        out.mkdir()
        if part.kind == "debian":
            _unpack_debian(part, Path(scratch), out)
        elif part.kind == "files":
            _copy_files(name, part, out)
        else:
            _go(name, part, out)
        if missing := [one for one in _files(name, part) if not (out / one).exists()]:
            raise CannotBuild(f"{name}: the build left no {', '.join(missing)}")
        out.replace(folder)
    print(f"── {name}: built in {time.monotonic() - begun:.0f} s", flush=True)


def _files(name: str, part: Part) -> tuple[str, ...]:
    return (name,) if part.kind == "module" else part.programs


def _need_go(name: str) -> None:
    if not shutil.which("go"):
        raise CannotBuild(
            f"Go is needed once to build {name} for the tests: https://go.dev/dl (or your distribution's golang)"
        )


def _copy_files(name: str, part: Part, out: Path) -> None:
    _need_go(name)
    for module in part.packages:
        told = _run(name, ["go", "mod", "download", "-json", module], {**os.environ, "GOWORK": "off"}, cwd=out)
        for file in Path(json.loads(told)["Dir"]).rglob("*.yaml"):
            if file.name in part.programs:
                shutil.copyfile(file, out / file.name)


def _go(name: str, part: Part, out: Path) -> None:
    _need_go(name)
    flags = ["-trimpath", "-ldflags", part.ldflags, *(["-tags", part.tags] if part.tags else [])]
    environment = {**os.environ, "CGO_ENABLED": str(int(part.cgo)), "GOBIN": str(out), "GOWORK": "off"}
    if part.kind == "module":
        command = [
            "go",
            "build",
            "-C",
            str(HERE / part.packages[0]),
            "-mod=readonly",
            *flags,
            "-o",
            str(out / name),
            ".",
        ]
        _run(name, command, environment)
    else:
        _run(name, ["go", "install", *flags, *part.packages], environment)


def _unpack_debian(part: Part, scratch: Path, out: Path) -> None:
    """Programs out of a Debian package that is not installed: installing it would start a service."""
    if not shutil.which("apt-get"):
        raise CannotBuild(
            f"{' '.join(part.packages)}: needs Debian's apt-get; put {', '.join(part.programs)} into {BIN}"
        )
    _run(part.packages[0], ["apt-get", "download", "-qq", *part.packages], dict(os.environ), cwd=scratch)
    for package in scratch.glob("*.deb"):
        _run(package.name, ["dpkg-deb", "--extract", str(package), str(scratch / "root")], dict(os.environ))
    for program in part.programs:
        (scratch / "root" / "usr" / "bin" / program).replace(out / program)


def _run(name: str, command: list[str], environment: dict[str, str], cwd: Path | None = None) -> str:
    done = subprocess.run(
        command, env=environment, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        raise CannotBuild(f"{name}: {' '.join(command)} failed:\n{done.stdout[-4000:]}")
    return done.stdout


def _recipe_hash(part: Part) -> str:
    recipe = hashlib.sha256(f"{part} {platform.machine()}".encode())
    if part.kind == "module":
        for file in sorted((HERE / part.packages[0]).iterdir()):
            recipe.update(f"{file.name}\n".encode() + file.read_bytes())
    return recipe.hexdigest()[:16]


def cache_folder() -> Path:
    """Where what was built outlives the checkout."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kubepeft"


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    with open(path, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; none is all")
    parts = parser.parse_args().parts or list(PARTS)
    if unknown := [name for name in parts if name not in PARTS]:
        parser.error(f"no part is called {', '.join(unknown)}: there are {', '.join(PARTS)}")
    try:
        for name in parts:
            ensure(name)
    except CannotBuild as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
