"""FineTune and BatchInference: what users write (`spec`) and see (`status`).

Everything that a user can get wrong without a model or a data file at hand is refused here, in the same words as on the API server.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field
from pydantic.alias_generators import to_camel

from kubepeft.types.base import AnnotationMap, LabelMap, Name, Rule, ShortText, Type
from kubepeft.types.method import Method
from kubepeft.types.pod import Pod
from kubepeft.types.status import BatchInferenceStatus, FineTuneStatus
from kubepeft.types.training import Training

GROUP = "kubepeft.io"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"


def one_of_schemes(*schemes: str) -> Rule:
    """A URI must begin with one of these schemes on a cluster."""
    named = ", ".join(f"{scheme}://" for scheme in schemes)
    prefixes = tuple(f"{scheme}://" for scheme in schemes)
    return Rule(
        message=f"must begin with one of {named} (file:// and plain paths work only with kubepeft run)",
        cel=f"self.matches('^({'|'.join(schemes)})://.')",
        check=lambda uri: uri.startswith(prefixes) and not uri.endswith("://"),
        cluster_only=True,
    )


ModelUri = Annotated[str, Field(min_length=1, max_length=1024), one_of_schemes("hf", "s3", "pvc")]
DataUri = Annotated[str, Field(min_length=1, max_length=1024), one_of_schemes("s3", "https", "hf", "pvc")]
OutputUri = Annotated[str, Field(min_length=1, max_length=1024), one_of_schemes("s3", "pvc")]


class Model(Type):
    """The base model."""

    uri: ModelUri = Field(description="hf://ORG/NAME[@REVISION], s3://BUCKET/PREFIX or pvc://CLAIM/PATH")
    task: Literal["CAUSAL_LM", "SEQ_2_SEQ_LM"] = Field("CAUSAL_LM", description="PEFT's task type")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="type of the frozen weights; auto is bfloat16 where the hardware has it, else float32"
    )
    quantization: Literal["none", "int8", "nf4"] = Field(
        "none", description="load the frozen weights quantized by bitsandbytes"
    )
    trust_remote_code: bool = Field(
        False, description="run Python code that lies beside the model; off unless said here"
    )


class Data(Type):
    """The training data."""

    train: DataUri = Field(description="a file, a prefix or a glob; jsonl, json, csv or parquet")
    eval: DataUri | None = Field(None, description="data to evaluate on")
    eval_fraction: float | None = Field(
        None, gt=0, lt=1, description="share of the training data kept for evaluation, in place of eval"
    )
    format: Literal["auto", "messages", "prompt-completion", "instruction", "text"] = Field(
        "auto", description="what a row is; auto looks at the columns and says what it took"
    )
    columns: Annotated[dict[str, Annotated[str, Field(min_length=1, max_length=256)]], Field(max_length=32)] = Field(
        {}, description="their column names → ours, where they differ"
    )
    loss: Literal["completion", "all"] | None = Field(
        None, description="which tokens are learned: completion where the format has one, else all"
    )
    max_length: int = Field(1024, ge=8, le=1048576, description="most tokens of one example")
    too_long: Literal["truncate", "drop", "fail"] = Field("truncate", description="what happens to a longer one")
    packing: Literal["auto", "always", "never"] = Field(
        "auto",
        description="lay the examples of a micro-batch end to end without padding; auto does so where it is exact",
    )
    max_bad_rows: int = Field(0, ge=0, description="how many bad rows are left out before the run is refused")
    rules: ClassVar = (
        Rule(
            message="give at most one of eval and evalFraction",
            cel="!(has(self.eval) && has(self.evalFraction))",
            check=lambda self: self.eval is None or self.eval_fraction is None,
        ),
    )


class Output(Type):
    """Where results go."""

    uri: OutputUri | None = Field(
        None,
        description="s3://BUCKET/PREFIX or pvc://CLAIM/PATH; the installation's bucket / namespace / name where none is given",
    )
    merged: bool = Field(False, description="also write the merged model")
    keep_checkpoints: int = Field(1, ge=0, le=1000, description="checkpoints kept after success")
    overwrite: bool = Field(False, description="replace what another spec has published there")


class Generation(Type):
    """How tokens are chosen: fields of transformers.GenerationConfig, in camelCase."""

    max_new_tokens: int = Field(256, ge=1, le=1048576, description="most tokens of one answer (transformers: 20)")
    min_new_tokens: int | None = Field(None, ge=1, description="fewest tokens of one answer")
    do_sample: bool = Field(False, description="sample; otherwise the likeliest token is taken")
    temperature: float | None = Field(
        None, gt=0, le=100, description="with doSample: flattens (above 1) or sharpens (below 1)"
    )
    top_p: float | None = Field(
        None, gt=0, le=1, description="with doSample: the smallest set of tokens with this probability"
    )
    top_k: int | None = Field(None, ge=1, description="with doSample: the k likeliest tokens")
    min_p: float | None = Field(
        None, ge=0, le=1, description="with doSample: tokens with this share of the likeliest one's probability"
    )
    repetition_penalty: float | None = Field(None, gt=0, description="above 1, repeats become less likely")
    no_repeat_ngram_size: int | None = Field(None, ge=1, description="no n-gram of this size appears twice")
    num_beams: int = Field(1, ge=1, le=64, description="beams of beam search")
    length_penalty: float | None = Field(None, description="with numBeams above 1: above 0 favours longer answers")
    stop_strings: Annotated[list[ShortText], Field(max_length=16)] = Field(
        [], description="an answer ends at the first of these"
    )
    seed: int = Field(42, ge=0, le=2**32 - 1, description="seed of sampling")
    rules: ClassVar = (
        Rule(
            message="temperature, topP, topK and minP need doSample: true",
            cel="self.doSample || !(has(self.temperature) || has(self.topP) || has(self.topK) || has(self.minP))",
            check=lambda self: (
                self.do_sample or (self.temperature, self.top_p, self.top_k, self.min_p).count(None) == 4
            ),
        ),
    )


class Inference(Generation):
    """The last stage of a FineTune: a BatchInference made for it."""

    input: DataUri = Field(description='lines of {"id","prompt"}, {"id","messages"} or OpenAI batch requests')
    shards: int = Field(1, ge=1, le=1000, description="pods that share the input")
    gpus: int | None = Field(
        None, ge=0, le=1, description="per pod; as many as in training, at most 1, where none is given"
    )
    rules: ClassVar = Generation.rules


class Cache(Type):
    """Keeps base models between pods."""

    claim: Name = Field(description="a PersistentVolumeClaim of the namespace")


class Credentials(Type):
    """Secrets of the namespace whose keys become the pods' environment; none needed with workload identity."""

    s3: Name | None = Field(
        None, description="AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and, where needed, AWS_ENDPOINT_URL, AWS_REGION …"
    )
    hugging_face: Name | None = Field(None, description="HF_TOKEN")


def evaluates(data: Data) -> bool:
    return data.eval is not None or data.eval_fraction is not None


class FineTuneSpec(Type):
    """What to fine-tune, on what, how, and where the results go."""

    model: Model
    method: Method = Method()
    data: Data
    training: Training = Training()
    output: Output = Output()
    inference: Inference | None = Field(None, description="answer these prompts with the adapter, as the last stage")
    gpus: int = Field(1, ge=0, le=16, description="per training pod; all on one node")
    pod: Pod = Pod()
    cache: Cache | None = None
    credentials: Credentials = Credentials()
    suspend: bool = Field(False, description="stop after saving a checkpoint, and go on from it when false again")
    backoff_limit: int = Field(
        3, ge=0, le=100, description="how often a stage is tried again after a failure that may pass"
    )
    active_deadline_seconds: int | None = Field(
        None, ge=1, description="longest life of the whole run, resumes included"
    )
    ttl_seconds_after_finished: int | None = Field(
        604800, ge=0, description="the Jobs are removed this long after the end, the FineTune never"
    )
    rules: ClassVar = (
        Rule(
            message="earlyStoppingPatience, loadBestModelAtEnd and evalStrategy need data.eval or data.evalFraction",
            cel="has(self.data.eval) || has(self.data.evalFraction) || !has(self.training) || !(has(self.training.earlyStoppingPatience) || "
            "has(self.training.loadBestModelAtEnd) && self.training.loadBestModelAtEnd || "
            "has(self.training.evalStrategy) && self.training.evalStrategy != 'no')",
            check=lambda self: (
                evaluates(self.data)
                or not (self.training.keeps_best() or self.training.eval_strategy in ("steps", "epoch"))
            ),
        ),
        Rule(
            message="packing: always can't be with task SEQ_2_SEQ_LM, whose examples don't pack",
            cel="!(self.model.task == 'SEQ_2_SEQ_LM' && self.data.packing == 'always')",
            check=lambda self: not (self.model.task == "SEQ_2_SEQ_LM" and self.data.packing == "always"),
        ),
        Rule(
            message="packing: always can't be with promptTuning, which drops position ids",
            cel="!(has(self.method) && has(self.method.promptTuning) && self.data.packing == 'always')",
            check=lambda self: not (self.method.prompt_tuning and self.data.packing == "always"),
        ),
    )


class AdapterRef(Type):
    """Which adapter to load."""

    fine_tune: Name | None = Field(
        None, description="a FineTune of the namespace; waited for until its adapter is published"
    )
    uri: OutputUri | None = Field(None, description="the folder of a published adapter")
    rules: ClassVar = (
        Rule(
            message="give exactly one of fineTune and uri",
            cel="has(self.fineTune) != has(self.uri)",
            check=lambda self: (self.fine_tune is None) != (self.uri is None),
        ),
    )


class BatchInferenceSpec(Generation):
    """Prompts, the adapter that answers them, and where the answers go."""

    adapter: AdapterRef
    input: DataUri = Field(description='lines of {"id","prompt"}, {"id","messages"} or OpenAI batch requests')
    output: OutputUri | None = Field(None, description="predictions/NAME beside the adapter where none is given")
    overwrite: bool = Field(False, description="replace what another spec has published there")
    shards: int = Field(1, ge=1, le=1000, description="pods that share the input")
    model_uri: ModelUri | None = Field(
        None,
        description="where to load the base from, where that differs from what the adapter names; it must be the same model",
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field("auto", description="type of the weights")
    trust_remote_code: bool = Field(
        False, description="run Python code that lies beside the base model; off unless said here"
    )
    gpus: int = Field(1, ge=0, le=1, description="per pod; more pods, by shards, rather than more GPUs a pod")
    pod: Pod = Pod()
    cache: Cache | None = None
    credentials: Credentials = Credentials()
    suspend: bool = Field(False, description="stop, and go on with the missing answers when false again")
    backoff_limit: int = Field(
        3, ge=0, le=100, description="how often a shard is tried again after a failure that may pass"
    )
    active_deadline_seconds: int | None = Field(None, ge=1, description="longest life of the whole run")
    ttl_seconds_after_finished: int | None = Field(
        604800, ge=0, description="the Job is removed this long after the end"
    )
    rules: ClassVar = Generation.rules


class Metadata(Type):
    """The part of Kubernetes' ObjectMeta that matters without a cluster; the rest is passed over."""

    model_config = ConfigDict(alias_generator=to_camel, extra="ignore", strict=True, frozen=True, defer_build=True)
    name: Name
    namespace: Name | None = None
    labels: LabelMap = {}
    annotations: AnnotationMap = {}


class FineTune(Type):
    """One fine-tuning run, from a data file to an adapter and, where asked for, predictions."""

    api_version: Literal["kubepeft.io/v1alpha1"]
    kind: Literal["FineTune"]
    metadata: Metadata
    spec: FineTuneSpec
    status: FineTuneStatus | None = None


class BatchInference(Type):
    """One batch of prompts answered with an adapter."""

    api_version: Literal["kubepeft.io/v1alpha1"]
    kind: Literal["BatchInference"]
    metadata: Metadata
    spec: BatchInferenceSpec
    status: BatchInferenceStatus | None = None


Object = FineTune | BatchInference
KINDS: dict[str, type[FineTune] | type[BatchInference]] = {"FineTune": FineTune, "BatchInference": BatchInference}
