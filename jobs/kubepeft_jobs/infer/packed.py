"""Linear layers with frozen weights on CPU, through oneDNN with the weight laid out once for it. Inference only.

PyTorch's fp32 linear calls MKL, which is slower than oneDNN for the few rows of a decoding step, and its bf16 linear
lays the weight out anew at each call. (`train.linear` is the one for training: it leaves the weights as they are, for
there they are merged, saved and moved.)
"""

from collections import Counter

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

_ROWS = 32
"""Rows of the product that the layout is chosen for; other numbers of rows work as well."""


class _PackedForward:
    """y = x Wᵀ + b for `weight` (out, in); differs from the layer's own forward by rounding only."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _ROWS)
        self.bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return y


def can_pack(model: nn.Module) -> bool:
    """Whether this machine and the model's weights are what oneDNN takes."""
    weights = list(model.parameters())
    dtypes = {weight.dtype for weight in weights if weight.is_floating_point()}
    known = dtypes <= {torch.float32, torch.bfloat16}
    return (
        torch.backends.mkldnn.is_available()
        and all(weight.device.type == "cpu" for weight in weights)
        and known
        and (torch.bfloat16 not in dtypes or torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


def pack(model: nn.Module) -> None:
    """Gives every nn.Linear and Conv1D within `model` a forward of its own; there is no way back but loading again.

    The modules stay, with a weight of the same shape and dtype, for adapter layers and some models look at these.
    Its values are gone where nothing else shares them, or memory would hold each weight twice: NaN, so that code
    which computes with them beside the forward can't go unnoticed.
    """
    owners = Counter(weight.data_ptr() for _, weight in model.named_parameters(remove_duplicate=False))
    for module in model.modules():
        if not isinstance(module, nn.Linear | Conv1D) or type(module) not in (nn.Linear, Conv1D):
            continue
        weight: Tensor = module.weight.detach()
        packed = _PackedForward(weight if type(module) is nn.Linear else weight.t(), module.bias)
        module.forward = packed  # type: ignore[method-assign]
        if owners[weight.data_ptr()] == 1:
            module.weight = nn.Parameter(weight.new_full((1, 1), torch.nan).expand(weight.shape), requires_grad=False)
