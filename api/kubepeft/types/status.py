"""What the operator writes back: the status of a FineTune and of a BatchInference.

Written by the operator alone; readers must live with fields that are missing.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.alias_generators import to_camel

from kubepeft.types.base import Type

Time = Annotated[str, Field(max_length=64, json_schema_extra={"format": "date-time"})]
"""RFC 3339, UTC, whole seconds."""
Phase = Literal["Pending", "Queued", "Preparing", "Training", "Inferring", "Succeeded", "Failed", "Suspended"]


class StatusType(Type):
    """A part of a status: unknown fields of a newer version are passed over."""

    model_config = ConfigDict(alias_generator=to_camel, extra="ignore", strict=True, frozen=True, defer_build=True)


class Condition(StatusType):
    """A Kubernetes Condition (metav1.Condition)."""

    type: Annotated[str, Field(min_length=1, max_length=316)]
    status: Literal["True", "False", "Unknown"]
    reason: Annotated[str, Field(min_length=1, max_length=1024)]
    message: Annotated[str, Field(max_length=32768)]
    last_transition_time: Time
    observed_generation: int | None = None


class TrainingStatus(StatusType):
    """How far training is."""

    step: int | None = Field(None, description="optimizer steps done")
    total_steps: int | None = Field(None, description="optimizer steps of the whole run")
    loss: float | None = Field(None, description="training loss of the last log, nats per token")
    eval_loss: float | None = Field(None, description="eval loss of the last evaluation, nats per token")
    tokens_per_second: float | None = None
    eta_seconds: int | None = None
    trainable_parameters: int | None = None
    total_parameters: int | None = None


class AdapterStatus(StatusType):
    """The published adapter."""

    uri: str
    digest: str = Field(description="sha256 of its manifest.json")
    size_bytes: int


class Attempt(StatusType):
    """One pod's try at a stage."""

    stage: Literal["prepare", "train", "infer"]
    pod: str | None = None
    outcome: str = Field(description="Succeeded, Failed or Saved")
    reason: str | None = None
    message: str | None = None
    exit_code: int | None = None
    resumed_from_step: int | None = None
    started_at: Time | None = None
    finished_at: Time | None = None


class InferenceStatus(StatusType):
    """How far inference is; counts of input lines."""

    total: int | None = None
    completed: int | None = None
    failed: int | None = None
    output: str | None = None


class PreparedStatus(StatusType):
    """What the prepare stage left behind."""

    digest: str
    model_commit: str
    rows: int | None = None
    tokens: int | None = None


class CommonStatus(StatusType):
    """What both kinds say."""

    observed_generation: int | None = None
    phase: Phase | None = None
    spec_digest: str | None = Field(
        None, description="digest of the accepted spec; a later change of the spec is refused"
    )
    progress: str | None = Field(None, description='such as "42%"')
    conditions: Annotated[
        list[Condition],
        Field(
            max_length=16, json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]}
        ),
    ] = []
    attempts: Annotated[list[Attempt], Field(max_length=10)] = Field([], description="the last ten")
    start_time: Time | None = None
    completion_time: Time | None = None


class FineTuneStatus(CommonStatus):
    """Where a FineTune stands."""

    method: str | None = Field(None, description="PEFT's name of the method")
    eta: str | None = Field(None, description="time to the end of training, for people")
    output: str | None = Field(None, description="where the results go")
    prepared: PreparedStatus | None = None
    training: TrainingStatus | None = None
    adapter: AdapterStatus | None = None
    inference: InferenceStatus | None = None


class BatchInferenceStatus(CommonStatus):
    """Where a BatchInference stands."""

    adapter: AdapterStatus | None = None
    inference: InferenceStatus | None = None
