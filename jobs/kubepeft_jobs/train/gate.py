"""The parity gate: an adapter counts only if, loaded anew from what was uploaded, it answers as the trained model did.

Compared are logits on a few examples: they must equal the trained model's within a tolerance stated below, and differ from the
bare base's. So an adapter that is not applied, that is corrupted, or that lies on another base does not pass.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSeq2SeqLM, PeftModel, prepare_model_for_kbit_training

from kubepeft.errors import UserError
from kubepeft_jobs import base

log = logging.getLogger("kubepeft.gate")

AUTO_PEFT = {"CAUSAL_LM": AutoPeftModelForCausalLM, "SEQ_2_SEQ_LM": AutoPeftModelForSeq2SeqLM}

TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Difference allowed (see `difference`), by the type of the frozen weights. The same kernels run twice, so those seen are far smaller;
the room is for kernels that choose another order of summation, and for what PEFT rounds when it loads (AdaLoRA's weights, to the base's type)."""
EXAMPLES = 4
TOKENS = 128
"""How much of each example is compared."""


@dataclass(frozen=True)
class Reference:
    """Logits of the trained model and of the bare base on the gate's examples, fp32 on the CPU."""

    inputs: list[dict[str, torch.Tensor]]
    trained: list[torch.Tensor]
    bare: list[torch.Tensor]


def examples_of(dataset: Any, task: str, decoder_start: int | None) -> list[dict[str, torch.Tensor]]:
    """The first few examples of a prepared data set as model inputs, one row each, cut to TOKENS tokens.

    An encoder-decoder gets its decoder's input, which begins with the token `decoder_start`, not labels: some methods' models can't
    compute a loss once they are loaded.
    """
    found = []
    for row in dataset.select(range(min(EXAMPLES, len(dataset)))):
        inputs = {"input_ids": torch.tensor([row["input_ids"][:TOKENS]])}
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        if task == "SEQ_2_SEQ_LM":
            inputs["decoder_input_ids"] = torch.tensor([[decoder_start, *row["labels"][: TOKENS - 1]]])
        found.append(inputs)
    return found


def logits_of(model: torch.nn.Module, inputs: Sequence[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
    """Logits (1, length, vocabulary) of each input, fp32 on the CPU."""
    model.eval()
    device = next(model.parameters()).device
    with torch.no_grad():
        return [model(**{name: value.to(device) for name, value in one.items()}).logits.float().cpu() for one in inputs]


def reference(model: PeftModel, inputs: list[dict[str, torch.Tensor]]) -> Reference:
    """What the published adapter must answer, taken from the trained model while it is still loaded."""
    trained = logits_of(model, inputs)
    with model.disable_adapter():
        bare = logits_of(model, inputs)
    return Reference(inputs, trained, bare)


def difference(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> float:
    """How far two sets of logits lie apart: root mean square over an example, in standard deviations of the second set; the largest of all
    examples. Infinite where shapes differ or NaN appears. No maximum over logits, which grows with the vocabulary by rounding alone."""
    if any(a.shape != b.shape for a, b in zip(ours, theirs, strict=True)):
        return math.inf
    apart = [
        float((a - b).square().mean().sqrt() / b.std().clamp(min=1e-12)) for a, b in zip(ours, theirs, strict=True)
    ]
    return max(apart) if all(math.isfinite(one) for one in apart) else math.inf


def check(
    adapter: Path,
    base_dir: Path,
    known: Reference,
    *,
    task: str,
    dtype: torch.dtype,
    quantization: str,
    trust_remote_code: bool,
    device: Any,
    work: Path,
    where: str,
) -> None:
    """Load the adapter folder as its users will and compare.

    Args:
        adapter: a folder fetched from where it was uploaded.
        base_dir: the base model's files on this machine.
        where: what to call the adapter in errors.
    Raises:
        UserError: reason ParityFailed, saying which of the two comparisons failed and by how much.
    """
    loaded_from = base.with_local_base(adapter, base_dir, work / "gate")
    try:
        model = AUTO_PEFT[task].from_pretrained(
            str(loaded_from),
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            quantization_config=base.quantization_config(quantization, dtype),
            device_map={"": device} if str(device) != "cpu" else None,
        )
    except Exception as error:  # whatever keeps a user from loading it keeps it from being published
        raise UserError(
            "ParityFailed",
            f"the uploaded adapter can't be loaded: {type(error).__name__}: {error}",
            where=where,
            mend="nothing was published; run it again, and report it if it fails again",
        ) from error
    if quantization != "none":
        # As for training: norms, embeddings and head in fp32, or rounding alone would tell the two models apart.
        prepare_model_for_kbit_training(model.get_base_model(), use_gradient_checkpointing=False)
    compare(logits_of(model, known.inputs), known, TOLERANCE[dtype], where)


def compare(loaded: Sequence[torch.Tensor], known: Reference, tolerance: float, where: str) -> None:
    """The gate's two questions, on logits.

    Raises:
        UserError: reason ParityFailed, or AdapterChangesNothing when the trained model answers as the base does.
    """
    learned = difference(known.trained, known.bare)
    if learned == 0:
        raise UserError(
            "AdapterChangesNothing",
            "the trained model answers exactly as its base does",
            where=where,
            mend="train longer or with a higher training.learningRate",
        )
    apart = difference(loaded, known.trained)
    from_base = difference(loaded, known.bare)
    log.info(
        "parity gate", extra={"from_trained": apart, "from_base": from_base, "learned": learned, "tolerance": tolerance}
    )
    # An adapter that moved the logits less than the tolerance must still be told from the bare base.
    if apart > tolerance or apart >= learned / 2:
        raise UserError(
            "ParityFailed",
            f"loaded anew, the adapter's logits differ from the trained model's by {apart:.3g} standard deviations "
            f"(allowed {min(tolerance, learned / 2):.3g}; from the bare base they differ by {from_base:.3g})",
            where=where,
            mend="nothing was published; run it again, and report it if it fails again",
        )
    if from_base == 0:
        raise UserError(
            "ParityFailed",
            "loaded anew, the adapter is not applied: the logits are the bare base's",
            where=where,
            mend="nothing was published; run it again, and report it if it fails again",
        )
