"""Consecutive convolutions, ReLUs, pools and linear layers that `lightkit.ops.layer_chain` computes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightkit.capture.graph import Graph
from lightkit.capture.node import Node
from lightkit.capture.step import Step
from lightkit.ops._dispatch import kernels_apply
from lightkit.ops.layer_chain import ChainLayer, is_faster, kernel_settings, layer_chain, run_kernel

_PLAIN = ((1, 1), (1, 1), 1)
_POOL = ((2, 2), (2, 2), (0, 0), (1, 1))


class ChainStep(Step):
    """Computes layers by `lightkit.ops.layer_chain`.

    Args:
        indices: the indices of the operations.
        layers: for each layer the index of the convolution or product, whether a ReLU follows, whether a pool does, and
            the scale of its rounded output, 0 for none.
        nodes: the operations.
    """

    replacement = "lightkit.ops.layer_chain"

    def __init__(
        self, indices: tuple[int, ...], layers: Sequence[tuple[int, bool, bool, float]], nodes: Sequence[Node]
    ) -> None:
        super().__init__(indices)
        self._layers = tuple(layers)
        self._settings, self._scales = kernel_settings(self._chain(nodes))

    def run(self, nodes: Sequence[Node]) -> Tensor:
        """Returns the output of the last layer."""
        input, last = nodes[self.indices[0]].operand(), nodes[self.indices[-1]]
        weights, biases = zip(*[nodes[layer[0]].tensors for layer in self._layers], strict=True)
        if weights[0].dtype == input.dtype == last.dtype and kernels_apply(input):
            # The recorders have looked at each tensor.
            output = run_kernel(input, weights, biases, self._settings, self._scales)
        else:
            # Under autocast, or within torch.func.
            output = layer_chain(input, self._chain(nodes))
        # A chain may end with the rounding of flattened values.
        return output.flatten(1) if output.dim() > len(last.shape) else output

    def _chain(self, nodes: Sequence[Node]) -> list[ChainLayer]:
        return [_layer(nodes[i], relu, pool, scale) for i, relu, pool, scale in self._layers]


def _layer(node: Node, relu: bool, pool: bool, output_scale: float) -> ChainLayer:
    weight, bias = node.tensors
    assert weight is not None
    padding = node.settings[1] if node.kind == "conv2d" else (0, 0)
    return ChainLayer(weight, bias, padding, relu, pool, output_scale)


def find_chain(graph: Graph, start: int) -> ChainStep | None:
    """Returns the longest chain that begins with an operation; None if torch is faster.

    A chain begins with a convolution: linear layers alone are faster in torch.
    """
    layers: list[tuple[int, bool, bool, float]] = []
    indices: list[int] = []
    # Operations that belong to the chain if another layer follows.
    waiting: list[int] = []
    node: Node | None = graph.nodes[start]
    while node is not None:
        if node.kind == "flatten" and layers:
            waiting.append(node.index)
            node = graph.only_reader(node.index)
            continue
        found = _find_layer(graph, node, is_first=not layers)
        if found is None:
            break
        relu, pool = found
        indices += [*waiting, node.index, *(after.index for after in (relu, pool) if after is not None)]
        rounding = _find_rounding(graph, indices[-1]) if relu is not None else []
        scale = graph.nodes[rounding[-1]].settings[0] if rounding else 0.0
        layers.append((node.index, relu is not None, pool is not None, scale))
        indices += rounding
        waiting = []
        node = graph.only_reader(indices[-1])
    return ChainStep(tuple(indices), layers, graph.nodes) if layers else None


def _find_rounding(graph: Graph, index: int) -> list[int]:
    """Returns the rounding behind an operation, after the flattening before a linear layer; [] if there is none."""
    node = graph.only_reader(index)
    flattened = [node.index] if node is not None and node.kind == "flatten" else []
    if flattened:
        node = graph.only_reader(flattened[0])
    return [*flattened, node.index] if node is not None and node.kind == "quantize" else []


def _find_layer(graph: Graph, node: Node, is_first: bool) -> tuple[Node | None, Node | None] | None:
    """Returns the ReLU and the pool behind a convolution or a linear layer; None if it is no layer of a chain."""
    if node.kind not in ("conv2d", "linear"):
        return None
    weight = node.tensors[0]
    assert weight is not None
    relu = graph.only_reader(node.index)
    relu = relu if relu is not None and relu.kind == "relu" else None
    if node.kind == "linear":
        return None if is_first or not is_faster(1, weight, node.dtype) else (relu, None)
    stride, _, dilation, groups = node.settings
    if relu is None or (stride, dilation, groups) != _PLAIN:
        return None
    pool = graph.only_reader(relu.index)
    pool = pool if pool is not None and pool.kind == "max_pool2d" and pool.settings == _POOL else None
    height, width = node.operands[0].shape[2:]
    return (relu, pool) if is_faster(height * width, weight, _torchs_dtype(node), pool is not None) else None


def _torchs_dtype(node: Node) -> torch.dtype:
    # Under autocast this is the dtype of the product.
    return node.dtype
