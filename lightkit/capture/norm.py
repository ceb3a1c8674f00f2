"""Convolutions and batch norms, with what follows them, that lightkit's kernels compute.

Sequences are images of height 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import prod

import torch
from torch import Tensor

from lightkit.capture.graph import Graph
from lightkit.capture.node import Node
from lightkit.capture.step import Step
from lightkit.ops import _thresholds
from lightkit.ops.activation import Activation
from lightkit.ops.conv2d import conv2d, conv2d_is_faster
from lightkit.ops.norm_act import norm_act, norm_act_is_faster

_POOL = ((2, 2), (2, 2), (0, 0), (1, 1))


class ConvStep(Step):
    """Computes a convolution by `lightkit.ops.conv2d`."""

    replacement = "lightkit.ops.conv2d"

    def run(self, nodes: Sequence[Node]) -> Tensor:
        """Returns the output, in channels-last memory."""
        node = nodes[self.indices[0]]
        return _like(node, _convolve(node)[0])


def _as_images(tensor: Tensor) -> Tensor:
    """Returns sequences as images of height 1, and images as they are."""
    return tensor.unsqueeze(2) if tensor.dim() == 3 else tensor


def _like(node: Node, images: Tensor) -> Tensor:
    """Returns images as sequences, or the means of images as vectors, if those are the values of ``node``."""
    if len(node.shape) == 3:
        return images.squeeze(2)
    return images.flatten(1) if len(node.shape) < images.dim() else images


def _convolve(node: Node, statistics: bool = False) -> tuple[Tensor, Tensor | None]:
    """Returns the output of a convolution as images, and its statistics on request."""
    weight, bias = node.tensors
    assert weight is not None
    arguments = (_as_images(node.operand()), _as_images(weight), bias, *node.settings)
    return conv2d(*arguments, statistics=True) if statistics else (conv2d(*arguments), None)


class NormStep(Step):
    """Computes a batch norm, a sum, an activation function and a pool by `lightkit.ops.norm_act`.

    Args:
        indices: the indices of the operations.
        norm: the index of the batch norm; None for none.
        conv: the index of the convolution before all of them that `lightkit.ops.conv2d` computes; None for none.
        residual: the index of the sum, and the place of its operand that is not the batch norm or the convolution; None
            for no sum.
        activation: the activation function; None for none.
        pool: ``"max"`` for a 2x2 max-pool of stride 2, ``"mean"`` for the mean of each image; None for no pool.
    """

    def __init__(
        self,
        indices: tuple[int, ...],
        norm: int | None,
        conv: int | None,
        residual: tuple[int, int] | None,
        activation: Activation | None,
        pool: str | None,
    ) -> None:
        super().__init__(indices)
        self.replacement = "lightkit.ops.norm_act" if conv is None else "lightkit.ops.conv2d, lightkit.ops.norm_act"
        self._norm, self._conv, self._residual = norm, conv, residual
        self._activation, self._pool = activation, pool

    def run(self, nodes: Sequence[Node]) -> Tensor:
        """Returns the output, in channels-last memory."""
        residual = None
        if self._residual is not None:
            residual = _as_images(nodes[self._residual[0]].operand(self._residual[1]))
        if self._norm is None:
            assert self._conv is not None
            return apply_activation(_convolve(nodes[self._conv])[0], self._activation, residual, self._pool)
        norm = nodes[self._norm]
        mean, variance, weight, bias = norm.tensors
        training, momentum, eps = norm.settings
        if self._conv is None:
            x, statistics = _as_images(norm.operand()), None
        else:
            x, statistics = _convolve(nodes[self._conv], statistics=training)
        output = norm_act(
            *(x, weight, bias, mean, variance, residual),
            training=training,
            momentum=momentum,
            eps=eps,
            activation=self._activation,
            pool=self._pool,
            statistics=statistics,
        )
        return _like(nodes[self.indices[-1]], output)


def apply_activation(
    x: Tensor, activation: Activation | None, residual: Tensor | None = None, pool: str | None = None
) -> Tensor:
    """Returns ``pool(activation(x + residual))`` by `lightkit.ops.norm_act`, with a normalization that changes nothing.

    Args:
        x: ``(N, C, H, W)`` or ``(N, C)``.
        activation: the activation function; None for none.
        residual: of the shape of ``x``; None for none.
        pool: as in `lightkit.ops.norm_act`.
    """
    mean, variance = _identity(x.shape[1], x.dtype)
    return norm_act(
        *(x, None, None, mean, variance, residual), training=False, eps=0.0, activation=activation, pool=pool
    )


@lru_cache(maxsize=256)
def _identity(channels: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns the mean and the variance with which a normalization changes nothing."""
    with torch.inference_mode(False):
        return torch.zeros(channels, dtype=dtype), torch.ones(channels, dtype=dtype)


def find_norm(graph: Graph, start: int) -> Step | None:
    """Returns the step that begins with a convolution or a batch norm; None if torch is faster."""
    node = graph.nodes[start]
    if node.kind == "batch_norm":
        # Torch's sequences are contiguous: the kernel would copy them.
        return _norm_step(graph, node, None) if len(node.shape) != 3 else None
    if node.kind not in ("conv1d", "conv2d") or not _is_conv_faster(node):
        return None
    norm = graph.only_reader(start)
    if norm is not None and norm.kind == "batch_norm":
        step = _norm_step(graph, norm, start)
    else:
        step = _conv_step(graph, node)
    return step or ConvStep((start,))


def _is_conv_faster(node: Node) -> bool:
    weight, _ = node.tensors
    stride, padding, dilation, groups = node.settings
    assert weight is not None
    sizes = _sizes_of_images(node.operands[0].shape), _sizes_of_images(weight.shape)
    if node.kind == "conv1d" and prod(weight.shape) > _thresholds.MAX_CONV1D_WEIGHTS:
        return False
    return conv2d_is_faster(*sizes, stride, padding, dilation, groups, node.dtype)


def _sizes_of_images(shape: Sequence[int]) -> tuple[int, ...]:
    return (*shape[:2], 1, *shape[2:]) if len(shape) == 3 else tuple(shape)


class _Tail:
    """The sum, the activation function and the pool behind an operation.

    Args:
        graph: the operations.
        node: the operation.
        with_function: False ends the tail before the activation function.

    Attributes:
        indices: the indices of the operations of the tail.
        residual: the index of the sum, and the place of its operand that is not ``node``; None for no sum.
        activation: the activation function; None for none.
        pool: ``"max"`` for a 2x2 max-pool of stride 2, ``"mean"`` for the mean of each image; None for no pool.
    """

    def __init__(self, graph: Graph, node: Node, with_function: bool = True) -> None:
        self.indices: list[int] = []
        self.residual: tuple[int, int] | None = None
        self.activation: Activation | None = None
        self.pool: str | None = None
        after = graph.only_reader(node.index)
        if after is not None and after.kind == "add":
            self.residual = after.index, 1 if after.operands[0] is node else 0
            after = self._take(graph, after)
        if not with_function:
            return
        if after is not None and after.kind in ("relu", "activation"):
            self.activation = Activation("relu") if after.kind == "relu" else after.settings[0]
            after = self._take(graph, after)
        if after is not None and (after.kind == "mean" or (after.kind == "max_pool2d" and after.settings == _POOL)):
            self.pool = "mean" if after.kind == "mean" else "max"
            self._take(graph, after)

    def _take(self, graph: Graph, node: Node) -> Node | None:
        self.indices.append(node.index)
        return graph.only_reader(node.index)


def _norm_step(graph: Graph, norm: Node, conv: int | None) -> NormStep | None:
    tail = _Tail(graph, norm)
    shape = _sizes_of_images(norm.shape)
    if not norm_act_is_faster(shape, norm.dtype, tail.activation, tail.pool, tail.residual is not None):
        tail = _Tail(graph, norm, with_function=False)
        if not norm_act_is_faster(shape, norm.dtype, residual=tail.residual is not None):
            return None
    indices = (*(() if conv is None else (conv,)), norm.index, *tail.indices)
    return NormStep(indices, norm.index, conv, tail.residual, tail.activation, tail.pool)


def _conv_step(graph: Graph, conv: Node) -> NormStep | None:
    tail = _Tail(graph, conv)
    if tail.activation is None or tail.pool != "max" or tail.activation.name not in _thresholds.POOLED_ACTIVATIONS:
        return None
    if not norm_act_is_faster(conv.shape, conv.dtype, tail.activation, tail.pool, tail.residual is not None):
        return None
    return NormStep((conv.index, *tail.indices), None, conv.index, tail.residual, tail.activation, tail.pool)
