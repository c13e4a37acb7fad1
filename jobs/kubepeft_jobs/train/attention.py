"""Attention over a packed row that never crosses from one example into another, and the proof that a model keeps to it.

The attention function is registered with transformers under the name `kubepeft_packed`. It takes the boundaries that
`batching.PackedCollator` makes, and builds no mask over the whole row. A batch without boundaries (padded batches,
generation) goes to transformers' own SDPA function, so a model may stay switched to it.
Nothing here decides what to do when packing is not exact.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from kubepeft_jobs.train.batching import PackedCollator

PACKED_ATTENTION = "kubepeft_packed"

_NOT_SUPPORTED = ("softcap", "position_bias", "s_aux")
"""Arguments that change the scores in a way that SDPA cannot: capped scores, biases by position, sinks."""

_LAYER_TYPES = {"full_attention", "sliding_attention", "linear_attention", "conv", "mamba"}
"""What the probe can judge. Chunked and compressed layers change only after thousands of tokens, so no short probe
sees them; recurrent layers run over the boundaries from the first token on, so the probe does."""


def packed_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: query (1, heads, T, d), key and value (1, kv heads, T, d) → (1, T, heads, d).

    With `cu_seq_lens_q` each example attends within itself alone and `attention_mask` is not read. The attention is
    the layer's own otherwise: causal or not, grouped heads, `sliding_window` tokens back counting the token itself,
    dropout, scaling. On CUDA in half precision without dropout it is one call of torch.nn.attention.varlen, elsewhere
    one call of SDPA an example.

    Raises ValueError for what SDPA cannot do: capped scores, biases by position, attention sinks.
    """
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal,
            sliding_window=sliding_window, **kwargs,
        )  # fmt: skip
    for name in _NOT_SUPPORTED:
        if kwargs.get(name) is not None:
            raise ValueError(f"packed attention cannot do {name!r}")
    if sliding_window is None and _layer_type(module) == "sliding_attention":
        raise ValueError("the layer has a sliding window, but does not hand it to its attention function")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if query.is_cuda and torch.is_autocast_enabled("cuda"):
        # As autocast does for SDPA. Layers of a 4-bit base, whose norms are in fp32, hand over fp32.
        half = torch.get_autocast_dtype("cuda")
        query, key, value = query.to(half), key.to(half), value.to(half)
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and dropout == 0.0:
        assert max_length_q is not None
        return _varlen(query, key, value, scaling, causal, sliding_window, cu_seq_lens_q, max_length_q), None

    dtype = query.dtype
    if query.device.type == "cpu" and dtype == torch.bfloat16:
        # SDPA's bf16 kernel for the CPU takes about twice as long as its fp32 kernel at lengths below 500.
        query, key, value = query.float(), key.float(), value.float()
    lengths = cu_seq_lens_q.diff().tolist()
    outputs = []
    # split, not slices: the gradient of a slice is a row of zeros as long as all examples together
    examples = zip(*(states.split(lengths, dim=2) for states in (query, key, value)), strict=True)
    for length, (queries, keys, values) in zip(lengths, examples, strict=True):
        mask = _window_mask(length, sliding_window, causal, query.device)
        outputs.append(
            scaled_dot_product_attention(
                queries,
                keys,
                values,
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=causal and mask is None,
                scale=scaling,
                enable_gqa=query.shape[1] != key.shape[1],
            ).transpose(1, 2)
        )
    return torch.cat(outputs, dim=1).to(dtype), None


def _layer_type(module: torch.nn.Module) -> str | None:
    types = getattr(getattr(module, "config", None), "layer_types", None)
    index = getattr(module, "layer_idx", None)
    return types[index] if types and index is not None and index < len(types) else None


def _window_mask(length: int, window: int | None, causal: bool, device: torch.device) -> torch.Tensor | None:
    """True where query i may see key j: i - window < j (≤ i if causal). None where that is the plain pattern."""
    if window is None or length <= window:
        return None
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)[None]
    return (distance < window) & (distance >= 0 if causal else distance > -window)


def _varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    causal: bool,
    window: int | None,
    boundaries: torch.Tensor,
    longest: int,
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn  # only where there is CUDA

    left = -1 if window is None else window - 1
    output = varlen_attn(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        boundaries,
        boundaries,
        longest,
        longest,
        scale=scaling,
        window_size=(left, 0 if causal else left),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(output, torch.Tensor)
    return output[None]


AttentionInterface.register(PACKED_ATTENTION, packed_attention_forward)
AttentionMaskInterface.register(PACKED_ATTENTION, sdpa_mask)


def base_model(model: torch.nn.Module) -> PreTrainedModel:
    """The transformers model inside a PEFT model, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def use_packed_attention(model: torch.nn.Module) -> bool:
    """Switches the model to `kubepeft_packed`; False if the model cannot be switched (it is then as it was)."""
    base = base_model(model)
    before = base.config._attn_implementation
    if not base._can_set_attn_implementation():
        return False
    base.set_attn_implementation(PACKED_ATTENTION)
    if base.config._attn_implementation != PACKED_ATTENTION:
        base.set_attn_implementation(before)
        return False
    return True


def packed_forward_kwargs(batch: dict[str, Any]) -> dict[str, Any]:
    """What a packed row needs beside the collator's tensors.

    transformers hands a mask of four dimensions to the layers as it is; without one it would build a dense mask over
    the whole row from `position_ids`. The packed attention function does not read it.
    """
    return {"attention_mask": torch.ones((1, 1, 1, 1), dtype=torch.bool, device=batch["input_ids"].device)}


@torch.no_grad()
def packing_is_exact(model: torch.nn.Module, vocab_size: int) -> tuple[bool, str]:
    """Whether the model gives packed examples the logits it gives them alone, and if not, why. Call it under the
    autocast of the training, so that the kernels are the same.

    A probe of a few short random examples, so that any architecture and PEFT method is judged by what it does. Twice:
    an example's logits must not move when its neighbours change (nothing crosses), and must be those of the example
    alone (positions, windows, per-row behaviour). Dropout is off, and trainable weights are moved away from their
    start for the while, because many adapters begin as the identity and would hide what they do. The model is left as
    it was: weights, modes, attention implementation, and random state.
    """
    base = base_model(model)
    if base.config.is_encoder_decoder:
        return False, "encoder-decoder models are not packed"
    for config in getattr(model, "peft_config", {}).values():
        if config.is_prompt_learning:
            return (
                False,
                f"{config.peft_type.value} puts its virtual tokens before a row, not before each example",
            )
        if getattr(config, "alora_invocation_tokens", None):
            return False, "aLoRA looks for its invocation tokens once a row, not once an example"
    strange = set(getattr(base.config, "layer_types", None) or ()) - _LAYER_TYPES
    if strange:
        return False, f"layers of type {', '.join(sorted(strange))} cannot be checked by a short probe"

    generator = torch.Generator().manual_seed(0)
    window = getattr(base.config, "sliding_window", None) or 0
    lengths = (5, window + 9 if window <= 64 else 23, 11)
    device = base.get_input_embeddings().weight.device

    def tokens(length: int) -> list[int]:
        return torch.randint(vocab_size, (length,), generator=generator).tolist()

    examples = [tokens(length) for length in lengths]
    changed = [tokens(lengths[0]), examples[1], tokens(lengths[2])]
    with _probing(model, generator):
        before = base.config._attn_implementation
        alone = [_logits(model, {"input_ids": torch.tensor([row], device=device)}) for row in examples]
        if not use_packed_attention(model):
            return False, f"{type(base).__name__} cannot take another attention function"
        try:
            packed = _packed_logits(model, examples, device)
            with_other_neighbours = _packed_logits(model, changed, device)
        except Exception as error:  # whatever a model raises on a packed row is the answer
            return False, f"{type(base).__name__} does not take packed rows ({type(error).__name__}: {error})"
        finally:
            base.set_attn_implementation(before)

    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else base.dtype
    tolerance = {torch.float32: 1e-3, torch.float16: 2e-2}.get(dtype, 6e-2)
    crossing = _difference(packed[1], with_other_neighbours[1])
    if not crossing <= tolerance / 3:
        return False, f"logits of an example move by {crossing:.1e} of their size when its neighbours change"
    worst = max(_difference(a, b) for a, b in zip(packed, alone, strict=True))
    if not worst <= tolerance:
        return (
            False,
            f"packed logits are off by {worst:.1e} of their size (at most {tolerance:g} in {dtype})",
        )
    return True, f"packed and unpacked logits agree to {worst:.1e} of their size"


def _difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Root mean square of the difference over that of `b`; nan where either is not finite."""
    return float((a - b).square().mean().sqrt() / b.square().mean().sqrt())


def _logits(model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    return model(**inputs, use_cache=False).logits[0].float()


def _packed_logits(model: torch.nn.Module, examples: list[list[int]], device: torch.device) -> tuple[torch.Tensor, ...]:
    batch = PackedCollator()([{"input_ids": row, "loss_spans": []} for row in examples])
    names = ("input_ids", "position_ids", "cu_seq_lens_q", "cu_seq_lens_k")
    inputs: dict[str, Any] = {name: batch[name].to(device) for name in names}
    inputs |= {name: batch[name] for name in ("max_length_q", "max_length_k")}
    return _logits(model, inputs | packed_forward_kwargs(inputs)).split([len(row) for row in examples])


@contextmanager
def _probing(model: torch.nn.Module, generator: torch.Generator) -> Iterator[None]:
    """Evaluation mode, trainable weights away from their start, warnings silent; everything put back afterwards."""
    modes = {module: module.training for module in model.modules()}
    trainable = {weight: weight.detach().clone() for weight in model.parameters() if weight.requires_grad}
    devices = sorted({weight.device.index for weight in model.parameters() if weight.is_cuda})
    with torch.random.fork_rng(devices=devices), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model.eval()
            for weight in trainable:
                noise = torch.randn(weight.shape, generator=generator, dtype=torch.float32)
                weight.add_(noise.to(weight), alpha=0.1)
            yield
        finally:
            for weight, value in trainable.items():
                weight.copy_(value)
            for module, training in modes.items():
                module.training = training
