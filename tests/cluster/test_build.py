"""The programs of the tests: built once for all checkouts of a user, and a clear word where that can't be."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.build import HERE


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Another checkout of the recipes."""
    shutil.copytree(HERE, tmp_path / "tests" / "cluster")
    return tmp_path


def build(checkout: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command: list[str | Path] = [sys.executable, checkout / "tests/cluster/build.py", "pause"]
    go_cache = subprocess.run(["go", "env", "GOCACHE"], check=True, capture_output=True, text=True).stdout.strip()
    variables = {**os.environ, "GOCACHE": go_cache, **environment}  # it would follow XDG_CACHE_HOME
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300)


def test_another_checkout_takes_what_was_built(checkout: Path, tmp_path: Path) -> None:
    cache = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    assert "pause: built" in build(checkout, **cache).stdout
    shutil.rmtree(checkout / ".build")
    assert build(checkout, **cache, PATH="").stdout == ""
    assert (checkout / ".build/bin/pause").resolve().is_relative_to(tmp_path / "cache")


def test_a_changed_recipe_builds_anew(checkout: Path, tmp_path: Path) -> None:
    cache = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    build(checkout, **cache)
    with open(checkout / "tests/cluster/pause/main.go", "a") as source:
        source.write("// changed\n")
    assert "pause: built" in build(checkout, **cache).stdout


def test_without_go_it_says_what_to_install(checkout: Path, tmp_path: Path) -> None:
    done = build(checkout, XDG_CACHE_HOME=str(tmp_path / "cache"), PATH="")
    assert done.returncode == 1
    assert done.stderr.startswith("Go is needed once to build pause for the tests: https://go.dev/dl")
    assert "Traceback" not in done.stderr


def test_a_failed_build_shows_the_compilers_words_and_leaves_nothing(checkout: Path, tmp_path: Path) -> None:
    (checkout / "tests/cluster/pause/main.go").write_text("package main\nfunc main() { nothing() }\n")
    done = build(checkout, XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert done.returncode == 1
    assert "undefined: nothing" in done.stderr
    assert not [path for path in (tmp_path / "cache/kubepeft/bin").iterdir() if path.suffix != ".lock"]
