"""How much memory and time a training run will need, from a few numbers of the model and of the data. Pure; order of magnitude.

The sums are the published ones named at each function. What they leave out (fragmentation, kernels' work space, a model that is not
a plain transformer) is why every result is a range, not a number: measured runs should lie within it, not at its middle.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

WEIGHT_BYTES = {"float32": 4.0, "float16": 2.0, "bfloat16": 2.0, "int8": 1.0, "nf4": 0.516}
"""Bytes of one weight of a linear layer. nf4: 4.127 bits with double quantization (QLoRA, Dettmers et al. 2023, section 3)."""
TRAINED_BYTES = 16
"""Bytes of one trained parameter: fp32 weight, gradient and Adam's two moments (ZeRO, Rajbhandari et al. 2020, section 3.1)."""
LOGIT_BYTES = 10
"""Bytes of one logit: 16-bit, its fp32 copy and that copy's gradient."""
RUNTIME_BYTES = 800 << 20
"""A CUDA context with loaded kernels."""
SPREAD = (0.7, 1.4)
UTILIZATION = (0.15, 0.5)
"""Share of a device's peak that training reaches; 0.15 is a small model or a short batch, 0.5 a well-fed GPU."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """`parameters` counts all, `embedding_parameters` those of the input (and untied output) embedding among them."""

    parameters: int
    embedding_parameters: int
    layers: int
    hidden_size: int
    vocab_size: int


@dataclass(frozen=True, slots=True)
class Range:
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes on one device. `total` is the sum times SPREAD."""

    weights: int
    trained: int
    activations: int
    logits: int
    runtime: int
    total: Range


def training_memory(
    shape: ModelShape,
    trainable_parameters: int,
    micro_batch_tokens: int,
    *,
    dtype: Literal["float32", "float16", "bfloat16"],
    quantization: Literal["none", "int8", "nf4"] = "none",
    gradient_checkpointing: bool = False,
    loss_share: float = 1.0,
    gpu: bool = True,
) -> MemoryEstimate:
    """Memory of one training process. `micro_batch_tokens` counts padded tokens; `loss_share` is the share whose logits are computed.

    Activations: 34 · tokens · hidden bytes a layer in 16 bit, attention scores not kept (Korthikanti et al. 2022, equation 2,
    with the attention term recomputed as by SDPA and FlashAttention); with checkpointing 2 · tokens · hidden a layer and one whole layer.
    """
    width = WEIGHT_BYTES[dtype]
    linear = shape.parameters - shape.embedding_parameters
    weights = (
        linear * WEIGHT_BYTES[dtype if quantization == "none" else quantization] + shape.embedding_parameters * width
    )
    one_layer = 34 * micro_batch_tokens * shape.hidden_size * width / 2
    kept = micro_batch_tokens * shape.hidden_size * width * shape.layers
    activations = kept + one_layer if gradient_checkpointing else one_layer * shape.layers
    logits = micro_batch_tokens * loss_share * shape.vocab_size * LOGIT_BYTES
    trained, runtime = trainable_parameters * TRAINED_BYTES, RUNTIME_BYTES if gpu else 0
    total = weights + trained + activations + logits + runtime
    return MemoryEstimate(
        int(weights), trained, int(activations), int(logits), runtime, Range(total * SPREAD[0], total * SPREAD[1])
    )


def training_flops(
    shape: ModelShape,
    trainable_parameters: int,
    tokens: int,
    mean_length: float,
    *,
    gradient_checkpointing: bool = False,
) -> float:
    """Floating-point operations of training on `tokens` tokens (times epochs, by the caller).

    A token costs 2 operations a weight forward and 2 backward through the frozen weights, and 2 more for each trained weight
    (Kaplan et al. 2020, section 2.1); attention adds 4 · layers · hidden · length forward and twice that backward
    (PaLM, Chowdhery et al. 2022, appendix B), halved because it is causal. Checkpointing repeats the forward pass.
    """
    matrices = shape.parameters - shape.embedding_parameters + shape.vocab_size * shape.hidden_size
    attention = 2 * shape.layers * shape.hidden_size * mean_length
    forward = 2 * (matrices + trainable_parameters) + attention
    backward = 2 * matrices + 4 * trainable_parameters + 2 * attention
    return tokens * (forward * (2 if gradient_checkpointing else 1) + backward)


def training_seconds(flops: float, peak_flops_per_second: float) -> Range:
    """Time at the shares of the device's peak in UTILIZATION."""
    return Range(flops / (peak_flops_per_second * UTILIZATION[1]), flops / (peak_flops_per_second * UTILIZATION[0]))
