"""The figures that a running stage shows on its metrics page, and how they are read back.

`kubepeft run` and the operator read the same page. It is for people: nothing may depend on it, and what it says is not trusted.
"""

from __future__ import annotations

from typing import Literal

FIGURES: dict[str, tuple[Literal["gauge", "counter"], str]] = {
    "kubepeft_prepare_rows": ("gauge", "Rows read so far"),
    "kubepeft_prepare_bytes": ("gauge", "Bytes of the data files read so far"),
    "kubepeft_prepare_total_bytes": ("gauge", "Bytes of all data files"),
    "kubepeft_training_step": ("gauge", "Optimizer steps done"),
    "kubepeft_training_total_steps": ("gauge", "Optimizer steps of the whole run"),
    "kubepeft_training_epoch": ("gauge", "Passes over the training data done"),
    "kubepeft_training_loss": ("gauge", "Training loss, nats per token"),
    "kubepeft_training_eval_loss": ("gauge", "Eval loss, nats per token"),
    "kubepeft_training_learning_rate": ("gauge", "Learning rate"),
    "kubepeft_training_tokens": ("counter", "Tokens trained on, padding left out"),
    "kubepeft_training_tokens_per_second": ("gauge", "Tokens trained on per second, padding left out"),
    "kubepeft_training_eta_seconds": ("gauge", "Seconds to the end of training at the present pace"),
    "kubepeft_training_trainable_parameters": ("gauge", "Parameters of the adapter"),
    "kubepeft_training_parameters": ("gauge", "Parameters of model and adapter"),
    "kubepeft_training_resumed_from_step": ("gauge", "Step of the checkpoint that training went on from"),
    "kubepeft_training_micro_batch": ("gauge", "Examples per worker and micro-batch"),
    "kubepeft_inference_rows": ("gauge", "Lines of this shard"),
    "kubepeft_inference_completed": ("counter", "Lines answered"),
    "kubepeft_inference_failed": ("counter", "Lines that can't be answered"),
    "kubepeft_inference_tokens": ("counter", "Tokens generated"),
    "kubepeft_inference_tokens_per_second": ("gauge", "Tokens generated per second"),
    "kubepeft_memory_bytes": ("gauge", "Most memory taken so far: of the GPU, or of the process where there is none"),
    "kubepeft_out_of_memory_restarts": ("counter", "Restarts with a smaller micro-batch"),
}
"""Metric name → (Prometheus type, help). A counter's sample carries the suffix _total."""

STAGE_METRIC = "kubepeft_stage"
"""1 for the label stage="prepare|train|infer" that runs here."""

PAGE_LIMIT = 256 * 1024
"""Most bytes of a page that a reader looks at."""

_SAMPLES = {f"{name}_total" if kind == "counter" else name: name for name, (kind, _) in FIGURES.items()}


def parse(page: str) -> dict[str, float]:
    """The known figures of a metrics page by their name in FIGURES; whatever else stands there is passed over."""
    found = {}
    for line in page[:PAGE_LIMIT].splitlines():
        sample, _, rest = line.partition(" ")
        name = _SAMPLES.get(sample)
        if name is None:
            continue
        try:
            value = float(rest.split(" ")[0])
        except ValueError:
            continue
        if abs(value) < 1e15:  # leaves out NaN and the infinities too
            found[name] = value
    return found
