"""The process of a stage: starts the workers, shows their figures, passes SIGTERM on, and writes the result.

It stays small: no torch and no storage, so it outlives whatever happens to a worker. When a worker runs out of memory, all of
them start again with a smaller micro-batch and more accumulation, at the same effective batch.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server
from pydantic import ValidationError

from kubepeft import errors, logs, stage
from kubepeft_jobs import cpus
from kubepeft_jobs.progress import ENV_PROGRESS, Page

log = logging.getLogger("kubepeft.supervisor")

EXIT_OUT_OF_MEMORY = 77
"""What a worker ends with when a micro-batch did not fit; never leaves this process."""
ENV_MICRO_BATCH = "KUBEPEFT_MICRO_BATCH"
"""Examples per worker and micro-batch, where that is no longer what the manifest says."""
ENV_WORK = "KUBEPEFT_WORK"
"""A folder for this attempt's files, shared by its workers and kept over their restarts."""
STRAGGLER_SECONDS = 20.0
"""How long the other workers may go on once one of them has failed."""


@dataclass
class Outcome:
    """How one set of workers ended."""

    exit_code: int
    result: dict[str, Any] = field(default_factory=dict)


def main(argv: list[str]) -> int:
    """Run a stage to its end.

    Returns: the process's exit code, one of kubepeft.errors or 1 for a defect.
    """
    logs.configure()
    started = _now()
    try:
        document = _document(argv)
    except errors.KubepeftError as error:
        log.error("%s", error)
        known = argv[0] if argv and argv[0] in ("prepare", "train", "infer") else "prepare"
        return _finish(
            stage.Result(stage=known, outcome="Failed", started_at=started, finished_at=_now(), **told(error))
        )  # type: ignore[arg-type]
    page = Page(document.stage)
    _serve(page)
    keeper = _Keeper()
    work = Path(tempfile.mkdtemp(prefix=f"kubepeft-{document.stage}-"))
    try:
        outcome = _run(document, page, keeper, work)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    ended = {0: "Succeeded", errors.EXIT_SAVED: "Saved"}.get(outcome.exit_code, "Failed")
    return _finish(
        stage.Result.model_validate(
            {
                **outcome.result,
                "stage": document.stage,
                "outcome": ended,
                "exitCode": outcome.exit_code,
                "specDigest": document.spec_digest,
                "startedAt": started,
                "finishedAt": _now(),
            }
        )
    )


def told(error: errors.KubepeftError) -> dict[str, Any]:
    """The fields of a Result that say what went wrong."""
    message = f"{error.where}: {error.what}" if error.where else error.what
    return {"exit_code": error.exit_code, "reason": error.reason, "message": message, "hint": error.mend}


def smaller_micro_batch(now: int, effective: int) -> int | None:
    """The largest micro-batch of at most half of `now` that divides the effective batch; None when `now` is 1."""
    return next((size for size in range(now // 2, 0, -1) if effective % size == 0), None)


def _document(argv: list[str]) -> stage.PrepareStage | stage.TrainStage | stage.InferStage:
    text = os.environ.get(stage.ENV_STAGE)
    if text is None:
        raise errors.UserError(
            "BadStage", f"the environment has no {stage.ENV_STAGE}", mend="start stages by kubepeft run or the operator"
        )
    try:
        document = stage.loads(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise errors.UserError(
            "BadStage",
            f"{place}: {first['msg']}",
            where=stage.ENV_STAGE,
            mend="use an image and an operator of the same version",
        ) from None
    if argv != [document.stage]:
        raise errors.UserError(
            "BadStage",
            f"asked to run {' '.join(argv) or 'nothing'}, but the document is for {document.stage}",
            mend=f"run: python -m kubepeft_jobs {document.stage}",
        )
    return document


def _serve(page: Page) -> None:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(page)
    port = int(os.environ.get(stage.ENV_PORT, stage.METRICS_PORT))
    try:
        server, _ = start_http_server(port, registry=registry)
    except OSError as error:
        # Nothing depends on the page, so a taken port is no reason not to train.
        log.warning("no metrics page on port %d: %s", port, error)
        return
    if path := os.environ.get(stage.ENV_PORT_FILE):
        Path(path).write_text(str(server.server_port))


class _Keeper:
    """Keeps the running workers and passes SIGTERM on to them; the lifeline's end counts as a SIGTERM."""

    def __init__(self) -> None:
        self.workers: list[subprocess.Popen[bytes]] = []
        self.stopping = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self.stop())
        if (lifeline := os.environ.pop(stage.ENV_LIFELINE, None)) is not None:
            threading.Thread(target=self._watch, args=(int(lifeline),), daemon=True).start()

    def _watch(self, lifeline: int) -> None:
        with contextlib.suppress(OSError):
            while os.read(lifeline, 1):
                pass
        log.warning("whoever started this stage is gone: saving and stopping")
        self.stop()

    def stop(self) -> None:
        self.stopping = True
        self.signal(signal.SIGTERM)

    def signal(self, number: int) -> None:
        for worker in self.workers:
            if worker.poll() is None:
                worker.send_signal(number)


def _run(document: Any, page: Page, keeper: _Keeper, work: Path) -> Outcome:
    count = max(1, document.gpus)
    if not isinstance(document, stage.TrainStage):
        outcome = _workers(document, 1, {}, page, keeper, work)
        if outcome.exit_code != EXIT_OUT_OF_MEMORY:
            return outcome
        return _out_of_memory("it does not fit into memory", "raise pod.resources.limits.memory, or take a larger GPU")
    wished = document.training.per_device_train_batch_size
    effective = wished * document.training.gradient_accumulation_steps
    micro_batch, restarts = wished, 0
    while True:
        page.take({"kubepeft_training_micro_batch": micro_batch, "kubepeft_out_of_memory_restarts": restarts})
        outcome = _workers(document, count, {ENV_MICRO_BATCH: str(micro_batch)}, page, keeper, work)
        if training := outcome.result.get("training"):
            training["outOfMemoryRestarts"] = restarts
        if outcome.exit_code != EXIT_OUT_OF_MEMORY:
            return outcome
        smaller = smaller_micro_batch(micro_batch, effective)
        if smaller is None:
            return _out_of_memory(
                "one example at a time does not fit into memory",
                "set training.gradientCheckpointing: true, a smaller data.maxLength, model.quantization: nf4, or take a larger GPU",
            )
        log.warning(
            "out of memory with micro-batch %d: starting again with %d, same effective batch", micro_batch, smaller
        )
        micro_batch, restarts = smaller, restarts + 1


def _out_of_memory(what: str, mend: str) -> Outcome:
    error = errors.UserError("OutOfMemory", what, mend=mend)
    log.error("%s", error)
    return Outcome(error.exit_code, told(error))


def _workers(document: Any, count: int, extra: dict[str, str], page: Page, keeper: _Keeper, work: Path) -> Outcome:
    """Run one set of workers to its end; the first failure ends them all."""
    env = os.environ | extra | {ENV_WORK: str(work)}
    usable = cpus.available()
    if count > 1 or usable < (os.cpu_count() or 1):  # else torch's own choice, a thread a core
        env.setdefault("OMP_NUM_THREADS", str(max(1, usable // count)))
    if count > 1:
        env |= {
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(_free_port()),
        }
    result: dict[str, Any] = {}
    readers = []
    lifeline_here, lifeline_there = os.pipe()
    os.set_inheritable(lifeline_here, True)
    try:
        for rank in range(count):
            ours, theirs = os.pipe()
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if count > 1 else {}
            keeper.workers.append(
                subprocess.Popen(
                    [sys.executable, "-m", "kubepeft_jobs.worker"],
                    env=env | place | {ENV_PROGRESS: str(theirs), stage.ENV_LIFELINE: str(lifeline_here)},
                    pass_fds=(theirs, lifeline_here),
                    stdin=subprocess.DEVNULL,
                )
            )
            os.close(theirs)
            reader = threading.Thread(target=_listen, args=(ours, rank, page, result), daemon=True)
            reader.start()
            readers.append(reader)
        if keeper.stopping:
            keeper.stop()
        exit_code = _wait(keeper)
        for reader in readers:
            reader.join(5)
    finally:
        keeper.signal(signal.SIGKILL)
        keeper.workers.clear()
        os.close(lifeline_here)
        os.close(lifeline_there)
    if exit_code < 0:
        name = signal.Signals(-exit_code).name
        result = told(
            errors.TransientError(
                "Killed",
                f"a worker was killed by {name}",
                mend=(
                    "often the memory limit: raise pod.resources.limits.memory" if exit_code == -signal.SIGKILL else ""
                ),
            )
        )
        log.error("%s", result["message"])
        exit_code = 1
    return Outcome(exit_code, result)


def _wait(keeper: _Keeper) -> int:
    """The exit code that says most: that of the first worker to fail; 0 when none did."""
    first = 0
    deadline = None
    while True:
        codes = [worker.poll() for worker in keeper.workers]
        failed = [code for code in codes if code not in (None, 0)]
        # A peer of a worker that ran out of memory fails too, of its lost connection: the cause is what counts.
        telling = [code for code in failed if code in (EXIT_OUT_OF_MEMORY, errors.EXIT_USER, errors.EXIT_TRY_AGAIN)]
        if failed:
            first = (telling or [first or failed[0]])[0] or 0
        if None not in codes:
            return first
        if failed and deadline is None:
            deadline = time.monotonic() + STRAGGLER_SECONDS
        if deadline and time.monotonic() > deadline and not (keeper.stopping and first == errors.EXIT_SAVED):
            keeper.signal(signal.SIGKILL)
        time.sleep(0.05)


def _listen(pipe: int, rank: int, page: Page, result: dict[str, Any]) -> None:
    with os.fdopen(pipe, "rb") as lines:
        for line in lines:
            message = json.loads(line)
            if rank == 0:
                page.take(message.get("figures", {}))
            # A failure of any worker is told; of successes only worker 0's.
            if "result" in message and (rank == 0 or message["result"].get("reason")) and not result.get("reason"):
                result.update(message["result"])


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def _finish(result: stage.Result) -> int:
    text = result.dumps()
    log.info("%s %s", result.stage, result.outcome.lower(), extra={"result": json.loads(text)})
    if path := os.environ.get(stage.ENV_RESULT):
        Path(path).write_text(text)
    return result.exit_code


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
