"""The command without any training: what it prints, where, and with which exit code. Each call is a process of its own."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.servers import REPOSITORY

KUBEPEFT = Path(sys.executable).parent / "kubepeft"
EXAMPLES = sorted((REPOSITORY / "examples").rglob("*.yaml"))
MANIFEST = """apiVersion: kubepeft.io/v1alpha1
kind: FineTune
metadata: {name: support-bot}
spec:
  model: {uri: ./base}
  data: {train: ./train.jsonl}
"""


def kubepeft(*arguments: str | Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run([KUBEPEFT, *arguments], input=stdin, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    path = tmp_path / "finetune.yaml"
    path.write_text(MANIFEST)
    return path


def test_help_names_every_command() -> None:
    done = kubepeft("--help")
    assert done.returncode == 0
    for command in ("run", "validate", "crd", "report"):
        assert f"  {command} " in done.stdout
        assert kubepeft(command, "--help").returncode == 0


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_every_example_is_valid(path: Path) -> None:
    done = kubepeft("validate", path)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"{path}: FineTune " in done.stdout


def test_a_manifest_can_come_from_standard_input() -> None:
    assert kubepeft("validate", "-", stdin=MANIFEST).stdout == "-: FineTune support-bot is valid\n"


def test_every_mistake_of_every_manifest_is_told(manifest: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(MANIFEST + "  training: {learnigRate: 1e-4}\n  gpu: 1\n")
    done = kubepeft("validate", wrong, manifest)
    assert done.returncode == 65
    assert done.stdout == f"{manifest}: FineTune support-bot is valid\n"
    assert "wrong.yaml:7: spec.training.learnigRate: unknown field (did you mean learningRate?)" in done.stderr
    assert "wrong.yaml:8: spec.gpu: unknown field (did you mean gpus?)" in done.stderr
    assert "Traceback" not in done.stderr


def test_paths_of_this_machine_are_nothing_for_a_cluster(manifest: Path) -> None:
    done = kubepeft("validate", "--cluster", manifest)
    assert done.returncode == 65
    assert "only with kubepeft run" in done.stderr


@pytest.mark.parametrize("command", ["run", "validate"])
@pytest.mark.parametrize(
    "content, words",
    [
        (None, "no such file"),
        (b"", "no document in it"),
        (MANIFEST.encode("utf-16"), "not UTF-8 at byte"),
        (b"kind: FineTune\n\0\n", "not YAML"),
    ],
)
def test_a_file_that_is_no_manifest_is_refused_in_one_message(
    command: str, content: bytes | None, words: str, tmp_path: Path
) -> None:
    path = tmp_path / "f.yaml"
    if content is not None:
        path.write_bytes(content)
    done = kubepeft(command, path)
    assert (done.returncode, done.stdout) == (65, "")
    assert str(path) in done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_a_folder_is_no_manifest(tmp_path: Path) -> None:
    done = kubepeft("run", tmp_path)
    assert done.returncode == 65
    assert "is a folder" in done.stderr


def test_crd_prints_both_definitions() -> None:
    kinds = [one["spec"]["names"]["kind"] for one in yaml.safe_load_all(kubepeft("crd").stdout)]
    assert kinds == ["FineTune", "BatchInference"]


def test_report_says_where_it_found_nothing(tmp_path: Path) -> None:
    done = kubepeft("report", tmp_path)
    assert done.returncode == 65
    assert f"file://{tmp_path}" in done.stderr
    assert "no adapter is published there" in done.stderr


def test_help_and_validate_load_neither_torch_nor_a_client(manifest: Path) -> None:
    code = (
        "import sys; from kubepeft.cli import cli\n"
        "for arguments in (['--help'], ['validate', sys.argv[1]]):\n"
        "    cli.main(arguments, standalone_mode=False)\n"
        "print(sorted({'torch', 'transformers', 'boto3', 'kubernetes', 'numpy'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, manifest], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_suspended_manifest_is_not_run(tmp_path: Path) -> None:
    path = tmp_path / "f.yaml"
    path.write_text(MANIFEST + "  suspend: true\n")
    done = kubepeft("run", path)
    assert done.returncode == 65
    assert "suspend: false" in done.stderr
