"""Batch normalization folded into the convolution or linear map before it, in a recorded graph.

In evaluation a batch norm is a linear map of each channel, whose factor and offset a convolution can take into its
weight and bias [1]_. A batch norm stays if its input has another reader, or if no such layer is before it.

References:
    .. [1] Jacob et al., Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference,
       CVPR 2018, section 3.2.
"""

from __future__ import annotations

from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.nn.utils import fuse_conv_bn_weights, fuse_linear_bn_weights

_CONVOLUTIONS = tuple(getattr(torch.ops.aten, f"conv{n}d").default for n in (1, 2, 3))
_LINEAR = torch.ops.aten.linear.default
_BATCH_NORM = torch.ops.aten.batch_norm.default


def fold_batch_norms(module: GraphModule) -> int:
    """Folds the batch norms of a recorded graph in place; returns their number.

    Args:
        module: the graph of torch.export, ``ExportedProgram.module()``, of a model in evaluation mode.
    """
    norms = [node for node in module.graph.nodes if node.op == "call_function" and node.target is _BATCH_NORM]
    count = sum(_fold(module, norm, index) for index, norm in enumerate(norms))
    if count:
        module.graph.eliminate_dead_code()
        module.recompile()
    return count


def _fold(module: GraphModule, norm: Node, index: int) -> bool:
    layer, gamma, beta, mean, variance, training, _, epsilon, _ = norm.args
    if not isinstance(layer, Node) or training or len(layer.users) != 1:
        return False
    if layer.target not in (*_CONVOLUTIONS, _LINEAR):
        return False
    _, weight, *rest = layer.args
    bias = rest[0] if rest else layer.kwargs.get("bias")
    nodes = (weight, bias, mean, variance, gamma, beta)
    tensors = [_tensor(module, node) for node in nodes]
    if any(tensor is None and node is not None for tensor, node in zip(tensors, nodes, strict=True)):
        # The model computes the weight, as from two factors.
        return False
    if mean is None or variance is None:
        # Without running statistics the batch decides.
        return False
    if layer.target is _LINEAR and (gamma is None or beta is None or layer.meta["val"].dim() != 2):
        # The channels of a batch norm are the second dimension, those of a linear map the last.
        return False
    folded = _fused(layer.target is _LINEAR, *tensors, epsilon=epsilon)
    names = [f"folded_weight_{index}", f"folded_bias_{index}"]
    for name, tensor in zip(names, folded, strict=True):
        module.register_parameter(name, nn.Parameter(tensor.detach(), requires_grad=False))
    with module.graph.inserting_before(layer):
        layer.args = (layer.args[0], *(module.graph.get_attr(name) for name in names), *rest[1:])
    layer.kwargs = {name: value for name, value in layer.kwargs.items() if name != "bias"}
    norm.replace_all_uses_with(layer)
    module.graph.erase_node(norm)
    return True


def _fused(
    is_linear: bool,
    weight: Any,
    bias: Any,
    mean: Any,
    variance: Any,
    gamma: Any,
    beta: Any,
    epsilon: Any,
) -> tuple[Tensor, Tensor]:
    # float64: the deviation is rounded once.
    doubles = [None if t is None else t.detach().double() for t in (weight, bias, mean, variance, gamma, beta)]
    wide_weight, wide_bias, wide_mean, wide_variance, wide_gamma, wide_beta = doubles
    fuse: Any = fuse_linear_bn_weights if is_linear else fuse_conv_bn_weights
    fused = fuse(wide_weight, wide_bias, wide_mean, wide_variance, epsilon, wide_gamma, wide_beta)
    return tuple(tensor.to(weight.dtype) for tensor in fused)  # pyright: ignore[reportReturnType]


def _tensor(module: nn.Module, node: Any) -> Tensor | None:
    """Returns the parameter or buffer that a node reads; None for a computed tensor."""
    if not isinstance(node, Node) or node.op != "get_attr":
        return None
    value = reduce(getattr, str(node.target).split("."), module)
    return value if isinstance(value, Tensor) else None
