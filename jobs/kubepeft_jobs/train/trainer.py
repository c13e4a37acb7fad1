"""transformers' Trainer with two changes: where the loss is computed, and what the evaluation loss means.

The loss is the cross entropy of the tokens that carry loss, in fp32, over the number of such tokens in the whole
optimizer step (all micro-batches, all workers). The LM head runs only at positions with loss. Evaluation gives the mean
over the evaluation set's tokens, whatever the batch size or the number of workers. The rest (optimizer, schedule,
accumulation, checkpoints, resuming, callbacks) is Trainer's, and stays so.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from torch.utils.data import DataLoader, Subset
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_callback import TrainerControl
from transformers.trainer_utils import EvalLoopOutput

from kubepeft_jobs.train.attention import base_model, packed_forward_kwargs
from kubepeft_jobs.train.batching import IGNORE_INDEX, Batch

_LOGITS_PER_CHUNK = {"cpu": 2**20}
_LOGITS_PER_CHUNK_ELSEWHERE = 2**26
"""Logits turned to fp32 at a time: 4 MiB on a CPU, to stay in its cache; 256 MiB on a GPU, to keep kernels large."""


class _SumOfCrossEntropy(torch.autograd.Function):
    """Σ cross entropy over rows of logits, in fp32, with the gradient made in the same pass.

    Autograd would keep the logits in fp32, their log-softmax and two gradients, 14 bytes a logit beside the bf16
    logits themselves; here it is one gradient in the logits' dtype. The idea is Liger Kernel's fused cross entropy
    (https://arxiv.org/abs/2410.10989).
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor, label_smoothing: float) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float32, device=logits.device)
        grad = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        vocabulary = logits.shape[-1]
        rows = max(1, _LOGITS_PER_CHUNK.get(logits.device.type, _LOGITS_PER_CHUNK_ELSEWHERE) // vocabulary)
        for start in range(0, logits.shape[0], rows):
            log_probabilities = logits[start : start + rows].float().log_softmax(dim=-1)
            target = targets[start : start + rows, None]
            counts = target != IGNORE_INDEX
            target = target.where(counts, 0)
            loss = (label_smoothing - 1) * log_probabilities.gather(1, target)
            if label_smoothing:
                loss -= label_smoothing / vocabulary * log_probabilities.sum(dim=-1, keepdim=True)
            total += loss.where(counts, 0).sum()
            if grad is not None:  # softmax - (1 - ε) one-hot - ε / vocabulary
                chunk = log_probabilities.exp_()
                chunk.scatter_add_(1, target, torch.full_like(loss, label_smoothing - 1))
                if label_smoothing:
                    chunk -= label_smoothing / vocabulary
                grad[start : start + rows] = chunk.mul_(counts)
        ctx.save_for_backward(grad)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (grad,) = ctx.saved_tensors
        return grad * grads[0], None, None


def sum_of_cross_entropy(logits: torch.Tensor, targets: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
    """Sum of the cross entropy in nats, a fp32 scalar: logits (…, vocabulary) of any dtype, targets (…) int64 or -100.

    The same as torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum"), in little memory.
    """
    vocabulary = logits.shape[-1]
    total = _SumOfCrossEntropy.apply(logits.reshape(-1, vocabulary), targets.reshape(-1), label_smoothing)
    return total


def keeps_own_loss(model: torch.nn.Module) -> str | None:
    """Why the model's own loss must be used: it is more than the cross entropy of its logits. None if it is not."""
    if getattr(base_model(model).config, "output_router_logits", False):
        return "the router's balancing loss belongs to it"
    for config in getattr(model, "peft_config", {}).values():
        if config.peft_type.value == "CPT":
            return "CPT weighs its tokens"
    return None


def _takes_logits_to_keep(model: torch.nn.Module) -> bool:
    """Whether the LM head can be told the positions: the forward has the argument, and a row starts at its first token."""
    if any(config.is_prompt_learning for config in getattr(model, "peft_config", {}).values()):
        return False
    return "logits_to_keep" in inspect.signature(base_model(model).forward).parameters


class PeftTrainer(Trainer):
    """A Trainer for batches of `batching`'s collators. Packed batches need `attention.use_packed_attention(model)`.

    `args.label_smoothing_factor` is honoured, with torch's definition. `compute_metrics` is not supported: the
    evaluation never has all logits at once. A model whose own loss is more than cross entropy keeps it (see
    `keeps_own_loss`); there the evaluation is its per-batch loss, weighted by tokens.
    `tokens_seen` counts the tokens (padding excluded) that this process has trained on since it started.
    """

    control: TrainerControl

    def __init__(
        self, model: PreTrainedModel | PeftModel, args: TrainingArguments, *more: Any, **settings: Any
    ) -> None:
        args.remove_unused_columns = False  # the collators read columns that no model's forward names
        super().__init__(model, args, *more, **settings)
        if self.compute_metrics is not None or self.compute_loss_func is not None:
            raise ValueError("PeftTrainer has its own loss and no compute_metrics")
        self._own_loss = keeps_own_loss(model) is not None
        self._selects_logits = _takes_logits_to_keep(model)
        self._is_encoder_decoder = bool(base_model(model).config.is_encoder_decoder)
        if not self._own_loss:
            self.model_accepts_loss_kwargs = True  # so that Trainer counts an optimizer step's tokens
        self.tokens_seen = 0

    def leave_autocast(self) -> None:
        """Gives the trained model its own forward back, which Trainer leaves under the autocast of bf16 or fp16: whoever loads
        the adapter computes without, and would see other logits."""
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)

    def _sum_of_losses(self, model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, Any]:
        """The batch's summed loss and the model's output."""
        inputs = {name: value for name, value in batch.items() if name not in ("shift_labels", "num_tokens")}
        targets = batch["shift_labels"]
        positions = inputs.pop("logits_to_keep", None)
        if self._is_encoder_decoder:
            outputs = model(**inputs)  # the labels make the decoder's inputs
        else:
            del inputs["labels"]
            if self._selects_logits:
                inputs |= {"logits_to_keep": positions, "use_cache": False}
                targets = targets[:, positions]
            if "cu_seq_lens_q" in inputs:
                inputs |= packed_forward_kwargs(inputs)
            outputs = model(**inputs)
        logits = outputs.logits[:, -targets.shape[1] :] if targets.shape[1] else outputs.logits[:, :0]
        return sum_of_cross_entropy(logits, targets, self.args.label_smoothing_factor), outputs

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The batch's share of the optimizer step's mean loss, scaled as Trainer's own is for several workers."""
        if self.model.training:
            self.tokens_seen += inputs["num_tokens"]
        if self._own_loss:
            return super().compute_loss(model, self._own_loss_inputs(inputs), return_outputs, num_items_in_batch)
        total, outputs = self._sum_of_losses(model, inputs)
        items = (inputs["shift_labels"] != IGNORE_INDEX).sum() if num_items_in_batch is None else num_items_in_batch
        loss = total / torch.as_tensor(items, device=total.device).clamp(min=1)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # DDP averages the workers' gradients
        return (loss, outputs) if return_outputs else loss

    def _own_loss_inputs(self, batch: Batch) -> Batch:
        inputs = {n: v for n, v in batch.items() if n not in ("shift_labels", "num_tokens", "logits_to_keep")}
        return inputs | (packed_forward_kwargs(inputs) if "cu_seq_lens_q" in inputs else {})

    def _track_num_input_tokens(self, inputs: Batch) -> None:
        if self.args.include_num_input_tokens_seen != "no":
            tokens = torch.tensor(inputs["num_tokens"], device=self.args.device, dtype=torch.int64)
            self.state.num_input_tokens_seen += int(self.accelerator.gather(tokens).sum())

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """This worker's share of the evaluation set, longest examples first; no example is seen twice."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, str):
            dataset = self.eval_dataset[dataset]
        order: Sequence[int] = range(len(dataset))
        if self.args.length_column_name in getattr(dataset, "column_names", []):
            lengths = dataset[self.args.length_column_name][:]
            order = sorted(order, key=lambda index: -lengths[index])
        return DataLoader(
            Subset(dataset, order[self.args.process_index :: self.args.world_size]),
            batch_size=self.args.eval_batch_size,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory and self.args.device.type == "cuda",
        )

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """The mean loss over the evaluation set's tokens, as `<prefix>_loss`; no predictions are kept.

        Trainer's own loop takes the mean of the batches' means, so that its figure depends on the batch size.
        """
        model = self.model
        if not self.accelerator._models:  # evaluate() without train(): Trainer does the same
            model = self.accelerator.prepare_model(model, evaluation_mode=True)
        model.eval()
        totals = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        self.callback_handler.eval_dataloader = dataloader
        with torch.no_grad():
            for batch in dataloader:
                inputs = self._prepare_inputs(batch)
                items = (inputs["shift_labels"] != IGNORE_INDEX).sum()
                if self._own_loss:
                    total = Trainer.compute_loss(self, model, self._own_loss_inputs(inputs)) * items
                else:
                    total, _ = self._sum_of_losses(model, inputs)
                totals += torch.stack((total.double(), items.double()))
                self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        totals = self.accelerator.reduce(totals, reduction="sum")
        metrics = {f"{metric_key_prefix}_loss": float(totals[0] / totals[1].clamp(min=1))}
        return EvalLoopOutput(
            predictions=(), label_ids=None, metrics=metrics, num_samples=self.num_examples(dataloader)
        )
