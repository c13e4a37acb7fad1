"""The operator's image: small, without a root user, quick to start, and with nothing in it that it does not need.

The jobs image is run by the tests on a real node.
"""

import json
from collections.abc import Iterator

import pytest

from tests.cluster import images
from tests.cluster.fixtures import start

MOST_MEGABYTES = 70
"""Over the base image."""
MOST_SECONDS = 1.5
"""Of processor time until every module of the operator is loaded; a container is started in under two."""


@pytest.fixture(scope="module")
def operator_image() -> str:
    return start(lambda: images.build_image("operator"))


@pytest.fixture(scope="module")
def container(operator_image: str) -> Iterator[str]:
    """A container of the image, to run programs in."""
    name = images.run_buildah("from", operator_image).strip()
    yield name
    images.run_buildah("rm", name)


def python(container: str, code: str) -> str:
    """What a Python program prints as the image's own user."""
    return images.run_buildah(
        "run", "--isolation", "chroot", "--user", "65532:65532", container, "--", "python", "-c", code
    ).strip()


def test_it_is_small(operator_image: str) -> None:
    assert images.size(operator_image) - images.size(images.build_base()) < MOST_MEGABYTES * 1e6


def test_it_says_what_it_is_and_runs_as_nobody_without_a_shell(operator_image: str) -> None:
    config = json.loads(images.run_buildah("inspect", "--type", "image", operator_image))["OCIv1"]["config"]
    assert config["User"] == "65532:65532"
    assert config["Entrypoint"] == ["python", "-m", "kubepeft_operator"]
    labels = {key.removeprefix("org.opencontainers.image."): value for key, value in config["Labels"].items()}
    assert labels["title"] == "kubepeft operator"
    assert labels["licenses"] == "Apache-2.0"
    assert labels["version"] == "0.1.0"
    assert labels["revision"]


def test_it_is_quickly_loaded_from_compiled_code(container: str) -> None:
    code = "import resource, kubepeft_operator.__main__; print(sum(resource.getrusage(resource.RUSAGE_SELF)[:2]))"
    assert min(float(python(container, code)) for _ in range(3)) < MOST_SECONDS
    compiled = "import kubepeft_operator.__main__ as m, yaml, pathlib, importlib.util as u; print(all(pathlib.Path(u.cache_from_source(one.__file__)).exists() for one in (m, yaml)))"
    assert python(container, compiled) == "True"


def test_it_says_how_it_is_called(container: str) -> None:
    told = images.run_buildah(
        "run",
        "--isolation",
        "chroot",
        "--user",
        "65532:65532",
        container,
        "--",
        "python",
        "-m",
        "kubepeft_operator",
        "--help",
    )
    assert "--config FILE" in told


def test_it_holds_no_torch_and_no_s3_client_and_its_user_can_write_nowhere_but_tmp(container: str) -> None:
    found = python(
        container,
        "import importlib.util as u; print([name for name in ('torch', 'boto3', 'kubepeft_jobs', 'uv', 'pip') if u.find_spec(name)])",
    )
    assert found == "[]"
    writable = python(
        container,
        "import os; print([path for path in ('/', '/app', '/opt/kubepeft', '/etc', '/usr/bin', '/app/kubepeft') if os.access(path, os.W_OK)])",
    )
    assert writable == "[]"
