"""What the report of a training run shows, as plain data: it is made by the train stage and drawn by `page`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Sample:
    """One evaluation prompt, what the data answers, and what the model answers without and with the adapter."""

    prompt: str
    expected: str
    before: str
    after: str


@dataclass(frozen=True)
class Attempt:
    """One process's try at training."""

    started_at: str
    """RFC 3339, UTC."""
    from_step: int
    """Optimizer step it began at."""
    to_step: int
    note: str = ""
    """Such as "out of memory with micro-batch 8"."""


@dataclass(frozen=True)
class ReportData:
    """Everything that report.html shows."""

    name: str
    created_at: str
    """RFC 3339, UTC."""
    task: str
    """CAUSAL_LM or SEQ_2_SEQ_LM."""
    method: str
    """PEFT's name of the method."""
    method_config: dict[str, Any]
    """The adapter's configuration, as in adapter_config.json."""
    base: str
    """Logical id of the base model."""
    base_commit: str
    base_bytes: int
    """Size of the base's weights, in bytes."""
    adapter_uri: str
    adapter_bytes: int
    trainable_parameters: int
    total_parameters: int
    history: list[dict[str, float]]
    """transformers' TrainerState.log_history: entries with `step` and `epoch`, and of these: `loss`, `learning_rate`, `grad_norm`;
    `eval_loss`; `tokens_per_second`."""
    base_eval_loss: float | None
    """Nats per token of the bare base."""
    eval_loss: float | None
    """Nats per token with the published adapter."""
    seconds: float
    """Wall time of training."""
    prepared: dict[str, Any]
    """report.json of the prepare stage."""
    samples: list[Sample] = field(default_factory=list)
    attempts: list[Attempt] = field(default_factory=list)
    lineage: dict[str, Any] = field(default_factory=dict)
    """Digests, commits, package versions, image."""
    packing: str = ""
    """How micro-batches were laid out, and why."""
    vllm: str = ""
    """Whether vLLM can serve the adapter, and why not."""
    vllm_command: str | None = None
