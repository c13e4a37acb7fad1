"""kubepeft status, logs and cancel against a real API server, as a user starts them."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cluster.control_plane import ControlPlane
from tests.operator.harness import Cluster, Operator, eventually
from tests.operator.player import Play, Player, stage_of
from tests.operator.world import FINE_TUNE, INFERENCE, changed, failure

Run = Callable[..., Operator]
KUBEPEFT = Path(sys.executable).parent / "kubepeft"


@pytest.fixture
def kubepeft(control_plane: ControlPlane, namespace: str) -> Callable[..., subprocess.CompletedProcess[str]]:
    def run(*arguments: str, kubeconfig: Path | None = None, input: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [KUBEPEFT, *arguments, "-n", namespace],
            env={**os.environ, "KUBECONFIG": str(kubeconfig or control_plane.kubeconfig)},
            input=input, capture_output=True, text=True, timeout=60,
        )  # fmt: skip

    return run


def test_status_follows_a_run_to_its_end(cluster: Cluster, run_operator: Run, kubepeft: Run) -> None:
    run_operator()
    cluster.create(changed(FINE_TUNE, **INFERENCE))
    done = kubepeft("status", "support-bot", "-w")
    assert (done.returncode, done.stderr) == (0, "")
    last = done.stdout.split("\n\n")[-1].splitlines()
    assert last[0].split(": ")[1] == "Succeeded"
    assert "  adapter: s3://adapters/support-bot/adapter (4.2 KB)" in last
    assert "  answers: 7 of 8, 1 failed, in s3://adapters/support-bot/predictions/support-bot" in last


def test_status_says_why_it_does_not_run_and_what_to_do(cluster: Cluster, run_operator: Run, kubepeft: Run) -> None:
    run_operator()
    cluster.create(changed(FINE_TUNE, pod={"nodeSelector": {"gpu": "h100"}}))
    eventually(lambda: cluster.reason() == "Unschedulable")
    lines = kubepeft("status", "support-bot").stdout.splitlines()
    assert lines[0].startswith(f"FineTune {cluster.namespace}/support-bot: Pending")
    assert lines[1].startswith("  Unschedulable: 0/1 nodes are available: 1 node(s) didn't match Pod's node affinity")
    assert lines[2].startswith("  → free or add such a node")


def test_status_of_a_failure_shows_its_attempts_and_fails_when_watched(
    cluster: Cluster, player: Player, run_operator: Run, kubepeft: Run
) -> None:
    player.script = lambda pod: Play(
        code=65, message=failure("prepare", 65, "BadRow", "d.jsonl:3: no prompt", "mend it")
    )
    run_operator()
    cluster.create(FINE_TUNE)
    done = kubepeft("status", "support-bot", "--watch")
    assert done.returncode == 1
    assert "  BadRow: d.jsonl:3: no prompt\n  → mend it\n" in done.stdout
    assert "    prepare failed: BadRow: d.jsonl:3: no prompt → mend it" in done.stdout


def test_an_object_that_nobody_looks_after_says_so(cluster: Cluster, kubepeft: Run) -> None:
    cluster.create(FINE_TUNE)
    assert "no operator has taken it up" in kubepeft("status", "support-bot").stdout


def test_what_is_not_there_and_what_is_not_allowed_are_told_apart(
    cluster: Cluster, kubepeft: Run, control_plane: ControlPlane, tmp_path: Path
) -> None:
    missing = kubepeft("status", "nobody")
    assert (missing.returncode, missing.stdout) == (65, "")
    assert f"'nobody' in the namespace '{cluster.namespace}'" in missing.stderr
    stranger = kubepeft("status", "support-bot", kubeconfig=control_plane.kubeconfig_for("stranger"))
    assert 'User "stranger" cannot get resource "finetunes"' in stranger.stderr
    nowhere = kubepeft("status", "support-bot", kubeconfig=tmp_path / "none")
    assert (nowhere.returncode, "Traceback" in nowhere.stderr) == (65, False)


def test_an_api_server_that_is_not_there_may_come_back(
    kubepeft: Run, control_plane: ControlPlane, tmp_path: Path
) -> None:
    text = control_plane.kubeconfig.read_text().replace(f":{control_plane.port}", ":1")
    (tmp_path / "gone").write_text(text)
    done = kubepeft("status", "support-bot", kubeconfig=tmp_path / "gone")
    assert (done.returncode, "Traceback" in done.stderr) == (75, False)
    assert "no answer from the API server" in done.stderr


def test_logs_without_a_pod_say_why_there_is_none(cluster: Cluster, run_operator: Run, kubepeft: Run) -> None:
    run_operator()
    cluster.create(changed(FINE_TUNE, suspend=True))
    eventually(lambda: cluster.phase() == "Suspended")
    done = kubepeft("logs", "support-bot")
    assert done.returncode == 65
    assert "there is no pod: Suspended" in done.stderr


def test_cancel_asks_deletes_and_says_what_stays(
    cluster: Cluster, player: Player, run_operator: Run, kubepeft: Run
) -> None:
    player.script = lambda pod: Play(runs=None) if stage_of(pod) == "train" else Play()
    run_operator()
    cluster.create(FINE_TUNE)
    eventually(lambda: cluster.phase() == "Training")
    assert kubepeft("cancel", "support-bot", input="n\n").returncode == 1
    assert not cluster.gone()
    done = kubepeft("cancel", "support-bot", input="y\n")
    assert done.returncode == 0
    assert "stays under s3://adapters/support-bot" in done.stdout
    eventually(lambda: cluster.gone() and cluster.pods() == [])


@pytest.mark.parametrize("module", ["kubernetes", "torch", "rich", "pydantic", "boto3"])
def test_help_loads_nothing_that_takes_time(module: str) -> None:
    code = f"import sys, click.testing, kubepeft.cli as c; click.testing.CliRunner().invoke(c.cli, ['--help']); print({module!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
