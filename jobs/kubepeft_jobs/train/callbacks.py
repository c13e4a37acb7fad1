"""What happens beside training: figures for the metrics page, checkpoints to storage, SIGTERM, and a look at the loss.

Callbacks of transformers.Trainer; none of them changes what is learned.
"""

from __future__ import annotations

import logging
import math
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from kubepeft.errors import UserError
from kubepeft_jobs import memory, progress
from kubepeft_jobs.train.checkpoints import Checkpoints

if TYPE_CHECKING:
    from kubepeft_jobs.train.trainer import PeftTrainer


log = logging.getLogger("kubepeft.train")

SHOWN = ("loss", "eval_loss", "learning_rate", "grad_norm", "tokens_per_second", "train_runtime")


class StopOnSigterm(TrainerCallback):
    """On SIGTERM, ends the step at hand, saves a checkpoint and stops; all workers stop at the same step."""

    def __init__(self) -> None:
        self.asked = False
        signal.signal(signal.SIGTERM, self._ask)

    def _ask(self, *_: object) -> None:
        self.asked = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if args.world_size > 1:
            # The signal reaches each worker in its own time, and a checkpoint needs them all.
            asked = torch.tensor(int(self.asked), device=args.device)
            dist.all_reduce(asked, dist.ReduceOp.MAX)
            self.asked = bool(asked.item())
        if self.asked:
            control.should_save = args.save_strategy != "no" or state.global_step < state.max_steps
            control.should_training_stop = True


class Finite(TrainerCallback):
    """Ends a run whose loss is no number any more, which no further step can mend."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        for name in ("loss", "eval_loss"):
            value = (logs or {}).get(name)
            if value is not None and not math.isfinite(value):
                raise UserError(
                    "Diverged",
                    f"the {name.replace('_', ' ')} became {value} at step {state.global_step}",
                    mend="lower training.learningRate, or set model.dtype: float32; and look for broken examples in the data",
                )


class CheckpointUpload(TrainerCallback):
    """Hands every checkpoint to the background upload. For worker 0 only."""

    def __init__(self, checkpoints: Checkpoints) -> None:
        self.checkpoints = checkpoints

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.checkpoints.save(Path(args.output_dir or "", f"checkpoint-{state.global_step}"), state.best_global_step)


class Figures(TrainerCallback):
    """Reports steps, losses, speed and memory; speed counts training alone, not evaluation."""

    trainer: PeftTrainer

    def __init__(self) -> None:
        self.tokens_per_second: float | None = None
        self._training_seconds = 0.0
        self._mark = 0.0
        self._steps = 0
        self._logged = (0, 0.0)
        """Tokens and training seconds at the last log, so that a slowdown shows in the next."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._mark = time.monotonic()
        progress.report(training_step=state.global_step, training_total_steps=state.max_steps)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._mark = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._training_seconds += time.monotonic() - self._mark
        self._steps += 1
        tokens = self.trainer.tokens_seen * args.world_size
        self.tokens_per_second = tokens / self._training_seconds if self._training_seconds else None
        progress.report(
            training_step=state.global_step,
            training_epoch=state.epoch or 0,
            training_tokens=tokens,
            training_tokens_per_second=self.tokens_per_second or 0,
            training_eta_seconds=self._training_seconds / self._steps * (state.max_steps - state.global_step),
            memory_bytes=memory.peak(),
        )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        if logs is None:
            return
        if "loss" in logs and self._training_seconds > self._logged[1]:
            tokens = self.trainer.tokens_seen * args.world_size
            pace = (tokens - self._logged[0]) / (self._training_seconds - self._logged[1])
            logs["tokens_per_second"] = state.log_history[-1]["tokens_per_second"] = round(pace, 1)
            self._logged = (tokens, self._training_seconds)
        if state.is_world_process_zero:
            shown = "  ".join(f"{name} {value:.6g}" for name, value in logs.items() if name in SHOWN)
            log.info("step %d/%d  %s", state.global_step, state.max_steps, shown, extra={"logs": logs})
        known = {"loss": "training_loss", "eval_loss": "training_eval_loss", "learning_rate": "training_learning_rate"}
        progress.report(**{known[name]: value for name, value in logs.items() if name in known})
