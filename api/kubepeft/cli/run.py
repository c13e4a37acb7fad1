"""kubepeft run: the stages of a manifest as subprocesses of this machine, with live progress.

It plays the operator's part: it hands each stage its document, follows it, and passes on what it found. It knows no torch and writes
nothing under the outputs but logs.
"""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from kubepeft import digest, progress, stage
from kubepeft.cli import load_manifest
from kubepeft.cli.display import Display
from kubepeft.errors import EXIT_SAVED, EXIT_TRY_AGAIN, UserError
from kubepeft.stage import Result
from kubepeft.storage.uri import parse_uri
from kubepeft.types import BatchInference, FineTune
from kubepeft.types.objects import FineTuneSpec
from kubepeft.types.pod import Pod

STAGES = ("prepare", "train", "infer")
POLL_SECONDS = 0.5
KILL_AFTER_SECONDS = 120.0
"""How long a stage may take to save once it was asked to stop; a pod's grace period."""


@dataclass
class Run:
    """One document on its way through its stages."""

    name: str
    output: str
    log_dir: Path
    env: Mapping[str, str]
    mounts: Mapping[str, str]
    deadline: float | None
    results: list[tuple[Result, float]] = field(default_factory=list)
    """The stages so far, each with its seconds."""


class Stopped(Exception):
    """A stage did not succeed; its result is in the run."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(exit_code)
        self.exit_code = exit_code


def run_manifest(path: Path, *, until: str | None, quiet: bool, mounts: Mapping[str, str]) -> int:
    """Run every document of a manifest in order.

    Returns: 0, or the exit code of the stage that did not succeed (130 after Ctrl-C).
    """
    documents = load_manifest(path, local=True)
    base_dir = Path.cwd() if str(path) == "-" else path.absolute().parent
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("kubepeft_jobs") is None:
        raise UserError(
            "NotInstalled",
            "this installation has no training packages",
            mend="install them: pip install 'kubepeft[jobs]'",
        )
    signals = _Signals()
    adapters: dict[str, str] = {}
    with Display(quiet=quiet) as display:
        for document in documents:
            run = _prepare_run(document, base_dir, mounts)
            display.document(document.kind, run.name, run.output)
            try:
                if isinstance(document, FineTune):
                    _fine_tune(document, run, base_dir, until, display, signals)
                    adapters[run.name] = stage.adapter_uri(run.output)
                elif until in (None, "infer"):
                    _batch_inference(document, run, base_dir, adapters, display, signals)
            except Stopped as stopped:
                display.ended(run.results, run.log_dir)
                if stopped.exit_code == EXIT_SAVED:
                    display.say(f"Go on with: kubepeft run {path}")
                elif stopped.exit_code == EXIT_TRY_AGAIN:
                    display.say(f"This may pass; try again with: kubepeft run {path}")
                return signals.exit_code or stopped.exit_code
            display.ended(run.results, run.log_dir)
    return 0


def _prepare_run(document: FineTune | BatchInference, base_dir: Path, mounts: Mapping[str, str]) -> Run:
    spec, name = document.spec, document.metadata.name
    if isinstance(spec, FineTuneSpec):
        wished = spec.output.uri or f"runs/{name}"
    else:
        wished = spec.output or f"runs/{name}/predictions"
    output = _absolute(wished, base_dir, "spec.output")
    if output.startswith("file://"):
        log_dir = Path(output.removeprefix("file://")) / "logs"
    else:
        cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
        log_dir = cache / "kubepeft" / "logs" / f"{name}-{digest.of(output)[-8:]}"
    deadline = None if spec.active_deadline_seconds is None else time.monotonic() + spec.active_deadline_seconds
    if spec.suspend:
        raise UserError("Suspended", f"{name} has suspend: true", mend="set suspend: false to run it")
    return Run(name, output, log_dir, _environment(spec.pod), mounts, deadline)


def _fine_tune(
    document: FineTune, run: Run, base_dir: Path, until: str | None, display: Display, signals: _Signals
) -> None:
    spec = _with_absolute_uris(document.spec, base_dir)
    spec_digest = digest.of_spec(document.spec)
    prepare = stage.prepare_stage(run.name, spec, run.output, mounts=dict(run.mounts), cache_dir=_cache_dir())
    prepare = prepare.model_copy(update={"spec_digest": spec_digest})
    prepared = _stage(prepare, run, display, signals).prepared
    if until == "prepare" or prepared is None:
        return
    train = stage.train_stage(prepare, prepared, gpus=min(spec.gpus, _gpus_here()))
    adapter = _stage(train, run, display, signals).adapter
    inference = stage.batch_inference_of(run.name, spec)
    if until == "train" or inference is None or adapter is None:
        return
    infer = stage.infer_stage(
        run.name,
        inference,
        adapter.uri,
        stage.predictions_uri(run.output, run.name),
        adapter_digest=adapter.digest,
        mounts=dict(run.mounts),
        cache_dir=_cache_dir(),
        gpus=min(inference.gpus, _gpus_here()),
    )
    _shards(infer, run, display, signals)


def _batch_inference(
    document: BatchInference, run: Run, base_dir: Path, adapters: Mapping[str, str], display: Display, signals: _Signals
) -> None:
    spec = document.spec
    if spec.adapter.fine_tune:
        adapter = adapters.get(spec.adapter.fine_tune)
        if adapter is None:
            raise UserError(
                "NoSuchFineTune",
                f"the FineTune {spec.adapter.fine_tune!r} is not above it in this manifest",
                where=f"{run.name}: spec.adapter.fineTune",
                mend="put that FineTune into the same file, or give adapter.uri",
            )
    else:
        adapter = _absolute(spec.adapter.uri or "", base_dir, "spec.adapter.uri")
    absolute = spec.model_copy(
        update={
            "input": _absolute(spec.input, base_dir, "spec.input"),
            "model_uri": spec.model_uri and _absolute(spec.model_uri, base_dir, "spec.modelUri"),
        }
    )
    infer = stage.infer_stage(
        run.name,
        absolute,
        adapter,
        run.output,
        mounts=dict(run.mounts),
        cache_dir=_cache_dir(),
        gpus=min(spec.gpus, _gpus_here()),
    )
    _shards(infer.model_copy(update={"spec_digest": digest.of_spec(spec)}), run, display, signals)


def _shards(infer: stage.InferStage, run: Run, display: Display, signals: _Signals) -> None:
    """On one machine the shards take turns; the last to finish writes the summary."""
    for shard in range(infer.shards):
        _stage(infer, run, display, signals, shard=shard)


def _stage(
    document: stage.PrepareStage | stage.InferStage, run: Run, display: Display, signals: _Signals, *, shard: int = 0
) -> Result:
    """Run one stage to its end.

    Raises:
        Stopped: the stage failed or was stopped; the display has said why.
    """
    label = document.stage if shard == 0 else f"{document.stage} {shard + 1}/{getattr(document, 'shards', 1)}"
    began = time.monotonic()
    display.stage(label)
    try:
        run.log_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            "OutputNotWritable",
            f"cannot make the folder: {error.strerror}",
            where=str(run.log_dir),
            mend="check output.uri and its rights",
        ) from None
    result = _follow(document, run, shard, display.progress, signals)
    seconds = time.monotonic() - began
    run.results.append((result, seconds))
    display.stage_ended(label, result, seconds)
    if result.exit_code != 0:
        raise Stopped(result.exit_code)
    return result


def _follow(
    document: stage.PrepareStage | stage.InferStage,
    run: Run,
    shard: int,
    show: Callable[[dict[str, float]], None],
    signals: _Signals,
) -> Result:
    with (
        tempfile.TemporaryDirectory(prefix="kubepeft-run-") as folder,
        (run.log_dir / f"{document.stage}.log").open("ab") as log,
    ):
        result_file, port_file = Path(folder, "result.json"), Path(folder, "port")
        lifeline, held = os.pipe()
        env = (
            os.environ
            | run.env
            | {
                stage.ENV_STAGE: document.dumps(),
                stage.ENV_RESULT: str(result_file),
                stage.ENV_SHARD: str(shard),
                stage.ENV_PORT: "0",
                stage.ENV_PORT_FILE: str(port_file),
                stage.ENV_LIFELINE: str(lifeline),
                "KUBEPEFT_LOG": "text",
            }
        )
        process = subprocess.Popen(
            [sys.executable, "-m", "kubepeft_jobs", document.stage],
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=(lifeline,),
            start_new_session=True,
        )
        os.close(lifeline)
        try:
            _wait(process, port_file, run.deadline, show, signals)
        finally:
            os.close(held)
            if process.poll() is None:
                process.kill()
                process.wait()
        if result_file.exists() and result_file.stat().st_size:
            return Result.model_validate_json(result_file.read_bytes())
    code = process.returncode
    killed = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code} and no result"
    return Result(
        stage=document.stage,
        outcome="Failed",
        exit_code=code if code > 0 else 1,
        reason="Killed",
        message=f"the {document.stage} stage {killed}",
        hint=f"see {run.log_dir / document.stage}.log, then run it again",
    )


def _wait(
    process: subprocess.Popen[bytes],
    port_file: Path,
    deadline: float | None,
    show: Callable[[dict[str, float]], None],
    signals: _Signals,
) -> None:
    asked: float | None = None
    while True:
        try:
            process.wait(POLL_SECONDS)
            return
        except subprocess.TimeoutExpired:
            pass
        now = time.monotonic()
        overdue = deadline is not None and now > deadline
        if (signals.count or overdue) and asked is None:
            asked = now
            process.terminate()
        if signals.count > 1 or (asked is not None and now - asked > KILL_AFTER_SECONDS):
            process.kill()
        if figures := _figures(port_file):
            show(figures)


def _figures(port_file: Path) -> dict[str, float]:
    """What the stage's metrics page says; nothing when it can't be read, since nothing depends on it."""
    try:
        port = int(port_file.read_text())
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=1) as page:
            return progress.parse(page.read(progress.PAGE_LIMIT).decode(errors="replace"))
    except (OSError, ValueError):
        return {}


class _Signals:
    """Ctrl-C and SIGTERM ask the stage to save and stop; a second one kills it."""

    def __init__(self) -> None:
        self.count = 0
        self.exit_code = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._take)

    def _take(self, number: int, _: object) -> None:
        self.count += 1
        self.exit_code = 128 + number
        if self.count == 1:
            print("\nSaving; once more to stop at once.", file=sys.stderr)


def _absolute(uri: str, base_dir: Path, where: str) -> str:
    """The URI with a plain path made a file:// one; a query string stays as it is."""
    location = parse_uri(uri, base_dir=base_dir, where=where)
    return str(location) if location.scheme == "file" else uri


def _with_absolute_uris(spec: FineTuneSpec, base_dir: Path) -> FineTuneSpec:
    data = spec.data.model_copy(
        update={
            "train": _absolute(spec.data.train, base_dir, "spec.data.train"),
            "eval": spec.data.eval and _absolute(spec.data.eval, base_dir, "spec.data.eval"),
        }
    )
    inference = spec.inference and spec.inference.model_copy(
        update={"input": _absolute(spec.inference.input, base_dir, "spec.inference.input")}
    )
    model = spec.model.model_copy(update={"uri": _absolute(spec.model.uri, base_dir, "spec.model.uri")})
    return spec.model_copy(update={"model": model, "data": data, "inference": inference})


def _environment(pod: Pod) -> dict[str, str]:
    """pod.env for a run without a cluster; what comes from a Secret or ConfigMap must be in this environment already."""
    env = {}
    for variable in pod.env:
        if variable.value_from is None:
            env[variable.name] = variable.value or ""
        elif variable.name not in os.environ:
            raise UserError(
                "NoSuchVariable",
                f"{variable.name} comes from a Secret or ConfigMap, which this machine has not",
                where="spec.pod.env",
                mend=f"set {variable.name} in your environment",
            )
    return env


def _cache_dir() -> str:
    return str(Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "kubepeft" / "models")


def _gpus_here() -> int:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([part for part in visible.split(",") if part.strip() and not part.strip().startswith("-")])
    return (
        sum(bool(re.fullmatch(r"nvidia\d+", entry.name)) for entry in os.scandir("/dev"))
        if Path("/dev").is_dir()
        else 0
    )
