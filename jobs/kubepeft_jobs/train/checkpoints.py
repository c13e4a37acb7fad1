"""Checkpoints in storage: uploaded in the background while training goes on, and found again by the next attempt.

A checkpoint counts once its manifest.json is there (kubepeft.storage.publish). They lie under checkpoints/<key>/<step>/, where the key
follows from spec and prepared data, so an attempt never resumes from another run's.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
from datetime import UTC, datetime
from pathlib import Path
from queue import Queue

from kubepeft.errors import KubepeftError
from kubepeft.storage import Store
from kubepeft.storage.publish import MANIFEST, Attempt, fetch, publish_in_place, read_manifest
from kubepeft.storage.store import join, relative

log = logging.getLogger("kubepeft.checkpoints")

STATE = "trainer_state.json"


class Checkpoints:
    """The checkpoints of one run in storage."""

    def __init__(self, store: Store, folder: str, *, digest: str, attempt: str, keep: int) -> None:
        """`folder` is the key below which they lie; `keep` how many are kept while training, the best one besides."""
        self._store, self._folder = store, folder
        self._digest, self._attempt, self._keep = digest, attempt, keep
        self._queue: Queue[tuple[Path, int | None] | None] = Queue()
        self._error: Exception | None = None
        self._thread: threading.Thread | None = None

    def save(self, checkpoint: Path, best_step: int | None) -> None:
        """Take a snapshot of a local checkpoint-N folder (by links, at once) and upload it in the background.

        An upload that fails is logged and the next one tried; `finish` says whether the last one arrived.
        """
        snapshot = checkpoint.parent / f".upload-{checkpoint.name}"
        shutil.rmtree(snapshot, ignore_errors=True)
        shutil.copytree(checkpoint, snapshot, copy_function=os.link)
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="checkpoint-upload", daemon=True)
            self._thread.start()
        self._queue.put((snapshot, best_step))

    def finish(self) -> None:
        """Wait until all is uploaded.

        Raises:
            KubepeftError: the last upload failed.
        """
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()
            self._thread = None
        if self._error is not None:
            raise self._error

    def restore(self, run_dir: Path) -> Path | None:
        """Fetch the newest complete checkpoint, and the best one if that is another, to `run_dir`/checkpoint-N.

        Returns: the newest one's folder, or None where there is none.
        """
        steps = self.steps()
        if not steps:
            return None
        newest = self._fetch(steps[-1], run_dir)
        state = json.loads((newest / STATE).read_text())
        best = state.get("best_global_step")
        if best in steps:
            # The former attempt's folder is gone with its pod; the best checkpoint lies in this one's now.
            state["best_model_checkpoint"] = str(self._fetch(best, run_dir))
        elif state.get("best_model_checkpoint"):
            state["best_model_checkpoint"] = None
        (newest / STATE).write_text(json.dumps(state, indent=2, sort_keys=True) + "\n")
        return newest

    def steps(self) -> list[int]:
        """The steps of the complete checkpoints in storage, ascending."""
        found = set()
        for entry in self._store.entries(self._folder):
            step, _, rest = relative(self._folder, entry.key).partition("/")
            if rest == MANIFEST and step.isdigit():
                found.add(int(step))
        return sorted(found)

    def remove_but(self, keep: int, best_step: int | None = None) -> None:
        """Remove all but the newest `keep` checkpoints (and the best); a manifest goes first, so none is ever half there."""
        steps = self.steps()
        gone = {step for step in steps[: len(steps) - keep] if step != best_step}
        keys = [
            entry.key
            for entry in self._store.entries(self._folder)
            if (name := relative(self._folder, entry.key).partition("/")[0]).isdigit() and int(name) in gone
        ]
        self._store.delete([key for key in keys if key.endswith(f"/{MANIFEST}")])
        self._store.delete([key for key in keys if not key.endswith(f"/{MANIFEST}")])

    def _fetch(self, step: int, run_dir: Path) -> Path:
        folder, target = self._place(step), run_dir / f"checkpoint-{step}"
        manifest = read_manifest(self._store, folder)
        assert manifest is not None, f"{folder} was listed with a manifest"
        fetch(self._store, folder, manifest, target)
        return target

    def _place(self, step: int) -> str:
        return join(self._folder, f"{step:08d}")

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            snapshot, best_step = item
            step = int(snapshot.name.rpartition("-")[2])
            try:
                attempt = Attempt(self._attempt, self._digest, datetime.now(UTC))
                publish_in_place(self._store, self._place(step), snapshot, attempt)
                self._error = None
                log.info("checkpoint of step %d is in storage", step)
                self.remove_but(self._keep, best_step)
            except KubepeftError as error:
                self._error = error
                log.warning("checkpoint of step %d was not uploaded: %s", step, error)
            except Exception as error:  # a defect must reach `finish`, not die with this thread
                self._error = error
                log.exception("checkpoint of step %d was not uploaded", step)
            finally:
                shutil.rmtree(snapshot, ignore_errors=True)
