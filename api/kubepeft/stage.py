"""The contract between whoever starts a stage (the operator, `kubepeft run`) and the process that runs it.

A stage's whole input is one of the documents below, as JSON in the environment variable KUBEPEFT_STAGE; its whole outcome is one
`Result`, as JSON in the file that KUBEPEFT_RESULT names, and an exit code of `kubepeft.errors`. Nothing else passes between them
that anything depends on. Stages are idempotent: started again, a stage reports what it published before.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter
from pydantic.alias_generators import to_camel

from kubepeft import digest
from kubepeft.types.method import Method
from kubepeft.types.objects import AdapterRef, BatchInferenceSpec, Data, FineTuneSpec, Generation, Model, Output
from kubepeft.types.pod import Pod
from kubepeft.types.training import Training

ENV_STAGE = "KUBEPEFT_STAGE"
"""The stage document, JSON."""
ENV_RESULT = "KUBEPEFT_RESULT"
"""Path of the file that receives the Result; a pod's terminationMessagePath."""
ENV_SHARD = "KUBEPEFT_SHARD"
"""Index of this process among the shards of an infer stage; a pod's completion index."""
ENV_ATTEMPT = "KUBEPEFT_ATTEMPT"
"""A name that no other attempt has, such as the pod's name and UID."""
ENV_PORT = "KUBEPEFT_METRICS_PORT"
"""Port of the metrics page; 9090 where it is not set, 0 for any free one."""
ENV_LIFELINE = "KUBEPEFT_LIFELINE"
"""Number of an open file descriptor: when its other end closes, whoever started this process is gone and it stops."""
ENV_PORT_FILE = "KUBEPEFT_METRICS_PORT_FILE"
"""Path of a file that receives the port of the metrics page."""

METRICS_PORT = 9090
RESULT_LIMIT = 2048
"""Most bytes of a Result: what fits a termination message with room to spare."""


class Document(BaseModel):
    """JSON between processes: camelCase, and fields of a newer version are passed over."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, extra="ignore", frozen=True)

    def dumps(self) -> str:
        return self.model_dump_json(by_alias=True, exclude_none=True)


class StageBase(Document):
    """What every stage is told."""

    version: Literal["v1"] = "v1"
    name: str = Field(description="name of the object, for people")
    namespace: str = ""
    spec_digest: str = Field(description="kubepeft.digest.of_spec of the object")
    output_uri: str = Field(description="where the stage publishes")
    mounts: dict[str, str] = Field({}, description="claim → folder, for pvc:// URIs")
    cache_dir: str | None = Field(None, description="a folder that keeps base models between pods")
    image: str = Field("", description="the container image, for the lineage")
    gpus: int = Field(0, description="worker processes, one a GPU; 0 is one worker on the CPU")


class PrepareStage(StageBase):
    """Resolve the model, read and tokenize the data, publish prepared/<digest>/."""

    stage: Literal["prepare"] = "prepare"
    model: Model
    method: Method
    data: Data
    training: Training
    output: Output


class TrainStage(PrepareStage):
    """Train on what prepare left, publish adapter/."""

    stage: Literal["train"] = "train"  # type: ignore[assignment]
    prepared: PreparedRef


class InferStage(StageBase):
    """Answer one shard of the input with a published adapter, publish predictions/<name>/."""

    stage: Literal["infer"] = "infer"
    adapter_uri: str
    adapter_digest: str | None = Field(None, description="sha256 of the adapter's manifest.json, where it is known")
    input: str
    generation: Generation
    shards: int = 1
    model_uri: str | None = None
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    trust_remote_code: bool = False
    overwrite: bool = False


class PreparedRef(Document):
    """What prepare found and published; train refuses anything else."""

    digest: str = Field(description="name of the folder under prepared/")
    model_commit: str = Field(description="the base's commit, or the digest of its files where it has none")
    rows: int = 0
    eval_rows: int = 0
    tokens: int = 0


class TrainingResult(Document):
    """How training went."""

    step: int
    total_steps: int
    loss: float | None = None
    eval_loss: float | None = None
    base_eval_loss: float | None = None
    tokens_per_second: float | None = None
    trainable_parameters: int = 0
    total_parameters: int = 0
    out_of_memory_restarts: int = 0


class AdapterResult(Document):
    """The published adapter."""

    uri: str
    digest: str = Field(description="sha256 of its manifest.json")
    size_bytes: int
    report: str | None = None


class InferenceResult(Document):
    """Lines of the input: of this shard, or of all where this process wrote the summary."""

    total: int
    completed: int
    failed: int
    output: str
    whole: bool = Field(False, description="the counts are of the whole input: every shard is published")


class Result(Document):
    """The outcome of one attempt at a stage: the pod's termination message and an entry of status.attempts."""

    version: Literal["v1"] = "v1"
    stage: Literal["prepare", "train", "infer"]
    outcome: Literal["Succeeded", "Failed", "Saved"]
    exit_code: int
    reason: str = ""
    message: str = ""
    hint: str = ""
    spec_digest: str = ""
    started_at: str = ""
    finished_at: str = ""
    resumed_from_step: int | None = None
    found_published: bool = Field(False, description="an earlier attempt had published it already")
    prepared: PreparedRef | None = None
    training: TrainingResult | None = None
    adapter: AdapterResult | None = None
    inference: InferenceResult | None = None

    def dumps(self) -> str:
        """JSON of at most RESULT_LIMIT bytes: long words are cut, facts are not."""
        text = super().dumps()
        while len(text.encode()) > RESULT_LIMIT:
            longest = max(("message", "hint"), key=lambda field: len(getattr(self, field)))
            words = getattr(self, longest)
            if len(words) < 2:
                break
            self = self.model_copy(update={longest: words[: min(len(words) - 2, len(words) * 7 // 8)] + "…"})
            text = super().dumps()
        return text


Stage = Annotated[PrepareStage | TrainStage | InferStage, Field(discriminator="stage")]
_STAGE: TypeAdapter[PrepareStage | TrainStage | InferStage] = TypeAdapter(Stage)


def loads(text: str, *, local: bool = True) -> PrepareStage | TrainStage | InferStage:
    """The stage document in a JSON text.

    It comes from validated types, so URIs of every scheme are let through here.
    """
    return _STAGE.validate_json(text, context={"local": local})


def prepare_stage(
    name: str,
    spec: FineTuneSpec,
    output_uri: str,
    *,
    namespace: str = "",
    mounts: dict[str, str] | None = None,
    cache_dir: str | None = None,
    image: str = "",
) -> PrepareStage:
    """The first stage of a FineTune."""
    return PrepareStage(
        name=name,
        namespace=namespace,
        spec_digest=digest.of_spec(spec),
        output_uri=output_uri,
        mounts=mounts or {},
        cache_dir=cache_dir,
        image=image,
        gpus=0,
        model=spec.model,
        method=spec.method,
        data=spec.data,
        training=spec.training,
        output=spec.output,
    )


def train_stage(prepare: PrepareStage, prepared: PreparedRef, gpus: int, image: str = "") -> TrainStage:
    """The second stage, from the first and what it found."""
    fields = {
        name: getattr(prepare, name) for name in PrepareStage.model_fields if name not in ("stage", "gpus", "image")
    }
    return TrainStage(**fields, prepared=prepared, gpus=gpus, image=image or prepare.image)


def infer_stage(
    name: str,
    spec: BatchInferenceSpec,
    adapter_uri: str,
    output_uri: str,
    *,
    adapter_digest: str | None = None,
    namespace: str = "",
    mounts: dict[str, str] | None = None,
    cache_dir: str | None = None,
    image: str = "",
    gpus: int | None = None,
) -> InferStage:
    """The stage of a BatchInference."""
    generation = Generation.model_construct(**{field: getattr(spec, field) for field in Generation.model_fields})
    return InferStage(
        name=name,
        namespace=namespace,
        spec_digest=digest.of_spec(spec),
        output_uri=output_uri,
        mounts=mounts or {},
        cache_dir=cache_dir,
        image=image,
        gpus=spec.gpus if gpus is None else gpus,
        adapter_uri=adapter_uri,
        adapter_digest=adapter_digest,
        input=spec.input,
        generation=generation,
        shards=spec.shards,
        model_uri=spec.model_uri,
        dtype=spec.dtype,
        trust_remote_code=spec.trust_remote_code,
        overwrite=spec.overwrite,
    )


def batch_inference_of(name: str, spec: FineTuneSpec) -> BatchInferenceSpec | None:
    """The BatchInference that a FineTune's `inference` stands for, or None.

    It takes the FineTune's pod, cache and credentials; it trusts remote code where the FineTune does.
    """
    wish = spec.inference
    if wish is None:
        return None
    fields = {field: getattr(wish, field) for field in Generation.model_fields}
    return BatchInferenceSpec.model_construct(
        **fields,
        adapter=AdapterRef.model_construct(fine_tune=name),
        input=wish.input,
        shards=wish.shards,
        gpus=min(spec.gpus, 1) if wish.gpus is None else wish.gpus,
        dtype=spec.model.dtype,
        trust_remote_code=spec.model.trust_remote_code,
        overwrite=spec.output.overwrite,
        pod=spec.pod,
        cache=spec.cache,
        credentials=spec.credentials,
        backoff_limit=spec.backoff_limit,
        ttl_seconds_after_finished=spec.ttl_seconds_after_finished,
    )


def adapter_uri(output_uri: str) -> str:
    """The stable folder of the published adapter."""
    return f"{output_uri.rstrip('/')}/adapter"


def predictions_uri(output_uri: str, name: str) -> str:
    """The folder of a BatchInference's answers beside the adapter."""
    return f"{output_uri.rstrip('/')}/predictions/{name}"


__all__ = [
    "AdapterResult",
    "InferStage",
    "InferenceResult",
    "Pod",
    "PrepareStage",
    "PreparedRef",
    "Result",
    "TrainStage",
    "TrainingResult",
    "adapter_uri",
    "batch_inference_of",
    "infer_stage",
    "loads",
    "predictions_uri",
    "prepare_stage",
    "train_stage",
]
