"""The training arguments a manifest may set: an allowlist of transformers.TrainingArguments, in camelCase.

Nothing that names a path, a hub, a token or a launcher is here. Where the default differs from transformers' the description says so.
Reference of every field: https://huggingface.co/docs/transformers/main_classes/trainer#transformers.TrainingArguments.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from kubepeft.types.base import FreeForm, Rule, ShortText, Type

OURS = frozenset({"early_stopping_patience", "early_stopping_threshold"})
"""Fields that are not TrainingArguments' own: they configure transformers.EarlyStoppingCallback."""


class Training(Type):
    """Arguments of the training run."""

    num_train_epochs: float = Field(3.0, gt=0, le=10000, description="passes over the training data")
    max_steps: int | None = Field(None, ge=1, description="optimizer steps, in place of numTrainEpochs")
    per_device_train_batch_size: int = Field(
        4,
        ge=1,
        le=4096,
        description="examples per GPU and micro-batch (transformers: 8); halved when GPU memory runs out, with more accumulation in turn",
    )
    per_device_eval_batch_size: int = Field(8, ge=1, le=4096, description="examples per GPU in evaluation")
    gradient_accumulation_steps: int = Field(1, ge=1, le=65536, description="micro-batches per optimizer step")
    learning_rate: float = Field(2e-4, gt=0, le=10, description="peak learning rate (transformers: 5e-5)")
    lr_scheduler_type: Literal[
        "linear",
        "cosine",
        "cosine_with_restarts",
        "cosine_with_min_lr",
        "polynomial",
        "constant",
        "constant_with_warmup",
        "inverse_sqrt",
        "warmup_stable_decay",
    ] = Field("linear", description="shape of the learning rate over time")
    lr_scheduler_kwargs: FreeForm | None = Field(
        None, description="further arguments of that scheduler, in its own names"
    )
    warmup_steps: float = Field(0, ge=0, description="steps of warm-up; below 1, a share of all steps")
    optim: Literal[
        "adamw_torch_fused",
        "adamw_torch",
        "adafactor",
        "sgd",
        "adagrad",
        "rmsprop",
        "adamw_bnb_8bit",
        "paged_adamw_32bit",
        "paged_adamw_8bit",
        "lion_32bit",
        "lion_8bit",
    ] = Field("adamw_torch_fused", description="optimizer")
    weight_decay: float = Field(0.0, ge=0, le=1, description="decoupled weight decay")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="first moment's decay")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="second moment's decay")
    adam_epsilon: float = Field(1e-8, gt=0, le=1, description="Adam's epsilon")
    max_grad_norm: float = Field(1.0, ge=0, description="gradients are clipped to this norm; 0 does not clip")
    label_smoothing_factor: float = Field(0.0, ge=0, lt=1, description="label smoothing")
    neftune_noise_alpha: float | None = Field(
        None, gt=0, description="noise on embeddings (https://arxiv.org/abs/2310.05914)"
    )
    gradient_checkpointing: bool = Field(False, description="compute activations twice to save memory")
    tf32: bool | None = Field(None, description="allow TF32 on GPUs that have it")
    seed: int = Field(42, ge=0, le=2**32 - 1, description="seed of weights, order and dropout")
    data_seed: int | None = Field(None, ge=0, le=2**32 - 1, description="seed of the order alone")
    full_determinism: bool = Field(False, description="deterministic GPU kernels, slower")
    logging_first_step: bool = Field(True, description="log the first step too (transformers: false)")
    logging_steps: float = Field(
        10, gt=0, description="log every so many steps; below 1, a share of all steps (transformers: 500)"
    )
    eval_strategy: Literal["no", "steps", "epoch"] | None = Field(
        None, description="when to evaluate; steps where there is eval data (transformers: no)"
    )
    eval_steps: float = Field(0.1, gt=0, description="evaluate every so many steps; below 1, a share of all steps")
    save_strategy: Literal["no", "steps", "epoch"] = Field("steps", description="when to keep a checkpoint")
    save_steps: float = Field(
        0.1, gt=0, description="checkpoint every so many steps; below 1, a share of all steps (transformers: 500)"
    )
    save_total_limit: int = Field(2, ge=1, le=1000, description="checkpoints kept while training (transformers: all)")
    load_best_model_at_end: bool | None = Field(
        None,
        description="publish the best checkpoint by eval loss; true where earlyStoppingPatience is set (transformers: false)",
    )
    early_stopping_patience: int | None = Field(
        None,
        ge=1,
        description="stop after so many evaluations without a better eval loss (transformers.EarlyStoppingCallback)",
    )
    early_stopping_threshold: float = Field(
        0.0, ge=0, description="what counts as better (transformers.EarlyStoppingCallback)"
    )
    dataloader_num_workers: int = Field(0, ge=0, le=64, description="processes that load data")
    dataloader_drop_last: bool = Field(False, description="leave out the last incomplete batch")
    report_to: Annotated[list[Literal["wandb", "mlflow", "tensorboard"]], Field(max_length=3)] = Field(
        [], description="experiment trackers; their settings and keys come as pod.env"
    )
    run_name: ShortText | None = Field(
        None, description="name of the run in the trackers; the object's name where none is given"
    )

    rules: ClassVar = (
        Rule(
            message='earlyStoppingPatience and loadBestModelAtEnd need evaluation: evalStrategy can\'t be "no"',
            cel="!(has(self.evalStrategy) && self.evalStrategy == 'no' && "
            "(has(self.earlyStoppingPatience) || has(self.loadBestModelAtEnd) && self.loadBestModelAtEnd))",
            check=lambda self: not (self.eval_strategy == "no" and self.keeps_best()),
        ),
    )

    def keeps_best(self) -> bool:
        """Whether the published adapter is the best checkpoint rather than the last."""
        if self.load_best_model_at_end is None:
            return self.early_stopping_patience is not None
        return self.load_best_model_at_end
