"""Frozen fp32 linear layers through oneDNN on CPUs where MKL's fp32 GEMM leaves speed unused.

Only the modules' `forward` is replaced, on the instance, so weights, state_dict, saving and merging stay what they
are. No copy of a weight is made or kept: a merge, an unmerge or a move to another device is seen at the next call.
Whatever the kernel is not for (another device or dtype, autocast, a weight that is trained) takes the module's own
forward.
"""

from typing import Any

import torch
from torch import nn


def _onednn_gemm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x @ weight.T + bias; `weight` may be a transposed view."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _FrozenLinear(torch.autograd.Function):
    """y = x Wᵀ + b with a gradient for x alone."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(weight)
        return _onednn_gemm(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, None, None]:
        (weight,) = ctx.saved_tensors
        if not ctx.needs_input_grad[0]:
            return None, None, None
        return _onednn_gemm(grads[0].contiguous(), weight.t(), None), None, None


def _applies(module: nn.Linear, x: torch.Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and module.weight.device.type == "cpu"
        and x.dtype == module.weight.dtype == torch.float32
        and not module.weight.requires_grad
        and (module.bias is None or not module.bias.requires_grad)
        and not torch.is_autocast_enabled("cpu")
        and x.numel() > 0
    )


def onednn_is_faster() -> bool:
    """Whether fp32 products of training go faster through oneDNN: twice as fast with AVX-512, where MKL leaves half of the
    speed unused; with AVX2 alone they are equal, and the few-row ones of small batches slower. A rule and no measurement,
    so that a resumed run computes as the interrupted one did."""
    return torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"


def use_onednn(model: nn.Module) -> int:
    """Sends the frozen fp32 nn.Linear layers on the CPU through oneDNN; returns how many.

    Layers that are trained, on another device, of another dtype or of a class derived from nn.Linear are left alone.
    `stop_using_onednn` undoes it.
    """
    if not torch.backends.mkldnn.is_available():
        return 0
    count = 0
    for module in model.modules():
        if type(module) is not nn.Linear or "forward" in vars(module):
            continue
        if module.weight.device.type != "cpu" or module.weight.dtype != torch.float32 or module.weight.requires_grad:
            continue
        module.forward = _OnednnForward(module)  # type: ignore[method-assign, assignment]
        count += 1
    return count


class _OnednnForward:
    """The replaced forward of one module; a class so that it pickles and so that it can be told from others."""

    def __init__(self, module: nn.Linear) -> None:
        self.module = module

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        module = self.module
        if not _applies(module, x):
            return nn.Linear.forward(module, x)
        return _FrozenLinear.apply(x, module.weight, module.bias)


def stop_using_onednn(model: nn.Module) -> None:
    """Gives every layer its own forward back."""
    for module in model.modules():
        if isinstance(vars(module).get("forward"), _OnednnForward):
            del module.forward
