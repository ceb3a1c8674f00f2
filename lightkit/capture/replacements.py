"""Single functions of torch that lightkit computes at once, on values that are known."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightkit.capture.norm import apply_activation
from lightkit.ops import _thresholds
from lightkit.ops.activation import Activation
from lightkit.ops.dropout import dropout, dropout_is_faster

_PLAIN = (Tensor, torch.nn.Parameter)
_GELU_TANH = Activation("gelu_tanh")


def _dropout(input: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor | None:
    """Returns `lightkit.ops.dropout` of a tensor; None if torch computes it."""
    if not training or inplace or type(input) not in _PLAIN or not 0 < p < 1 or not dropout_is_faster(input):
        return None
    return dropout(input, p)


def _gelu(input: Any, approximate: str = "none") -> Tensor | None:
    """Returns the GELU approximated by tanh of the output of a linear layer or the like; None if torch computes it."""
    if (
        approximate != "tanh"
        or type(input) not in _PLAIN
        or input.numel() < _thresholds.MIN_GELU_TANH
        or input.shape[-1] < _thresholds.MIN_GELU_TANH_CHANNELS
        or not (input.is_cpu and input.is_contiguous() and input.dtype in (torch.float32, torch.float64))
        or torch.is_autocast_enabled("cpu")
    ):
        return None
    return apply_activation(input.view(-1, input.shape[-1]), _GELU_TANH).view(input.shape)


def _attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    """Returns the attention with `lightkit.ops.dropout` on its weights; None if torch computes it.

    Without dropout torch has a fused kernel. With it, torch computes the same products as this function.
    """
    if not 0 < dropout_p < 1 or enable_gqa or not all(type(t) in _PLAIN and t.is_cpu for t in (query, key, value)):
        return None
    scores = (query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ key.transpose(-2, -1)
    if is_causal:
        if attn_mask is not None:
            return None
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, float("-inf")) if attn_mask.dtype == torch.bool else scores + attn_mask
    weights = scores.softmax(-1)
    # The rows without any key are zero, as in torch.
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        weights = weights.masked_fill(~attn_mask.any(-1, keepdim=True), 0.0)
    return dropout(weights, dropout_p) @ value


def _or_torch(replacement: Callable[..., Tensor | None], function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def call(*args: Any, **kwargs: Any) -> Tensor:
        result = replacement(*args, **kwargs)
        return function(*args, **kwargs) if result is None else result

    return call


def _multi_head_attention() -> Callable[..., Any]:
    """Returns torch's function with other names for the functions that it calls.

    A mode receives a function of torch in Python as one call, and not those within it.
    """
    torchs = F.multi_head_attention_forward
    names = {
        **vars(F),
        "has_torch_function": lambda tensors: False,
        "scaled_dot_product_attention": _or_torch(_attention, F.scaled_dot_product_attention),
        "dropout": _or_torch(_dropout, F.dropout),
    }
    ours = types.FunctionType(torchs.__code__, names, torchs.__name__, torchs.__defaults__)
    ours.__kwdefaults__ = torchs.__kwdefaults__
    arguments = inspect.signature(torchs)

    def call(*args: Any, **kwargs: Any) -> Any:
        given = arguments.bind(*args, **kwargs).arguments
        return ours(*args, **kwargs) if given.get("training", True) and given["dropout_p"] > 0 else None

    return call


class Replacement(NamedTuple):
    """The way in which lightkit computes a function of torch.

    Attributes:
        compute: takes the arguments of the function, and returns its result; None if torch computes the call.
        name: the name of lightkit's function.
    """

    compute: Callable[..., Any]
    name: str


REPLACEMENTS: Mapping[Any, Replacement] = {
    F.gelu: Replacement(_gelu, "lightkit.ops.norm_act"),
    F.dropout: Replacement(_dropout, "lightkit.ops.dropout"),
    F.scaled_dot_product_attention: Replacement(_attention, "lightkit.ops.dropout"),
    F.multi_head_attention_forward: Replacement(_multi_head_attention(), "lightkit.ops.dropout"),
}
