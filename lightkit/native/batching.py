"""Batching rules of the native ops, for `torch.func.vmap` and for gradients with ``is_grads_batched=True``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as pytree

# The ops that do not write to their arguments. Within torch.func the functions of `lightkit.ops` take torch's
# operations; backward, and callers of an op itself, reach these rules.
_OPS = (
    "cross_entropy",
    "_cross_entropy_forward",
    "linear_cross_entropy",
    "_linear_cross_entropy_forward",
    "_linear_cross_entropy_backward",
    "layer_chain",
    "_layer_chain_forward",
    "_layer_chain_backward",
    "dropout",
    "conv2d",
    "_conv2d_backward",
    "_norm_act_backward",
    "int8_chain",
    "int8_chain_pack",
)


def register() -> None:
    """Registers a batching rule with torch for every op of `_OPS` that the native library defines."""
    for name in filter(functools.partial(hasattr, torch.ops.lightkit), _OPS):
        torch.library.register_vmap(f"lightkit::{name}", _one_by_one(name), lib=_library)


def _one_by_one(name: str) -> Callable[..., Any]:
    """Returns a batching rule that calls the op ``name`` once for each element of the batch and stacks the results."""

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        op = getattr(torch.ops.lightkit, name).default
        leaves, spec = pytree.tree_flatten(args)
        dims = pytree.tree_leaves(in_dims)
        # For an empty batch, a call with an element of zeros gives the shapes of the results.
        if info.batch_size == 0:
            leaves = [
                leaf if dim is None else leaf.new_zeros((1, *leaf.movedim(dim, 0).shape[1:])).movedim(0, dim)
                for leaf, dim in zip(leaves, dims, strict=True)
            ]
        results = []
        for index in range(max(1, info.batch_size)):
            element = [leaf if dim is None else leaf.select(dim, index) for leaf, dim in zip(leaves, dims, strict=True)]
            results.append(op(*pytree.tree_unflatten(element, spec)))
        found, out_spec = pytree.tree_flatten(results[0])
        columns = zip(*map(pytree.tree_leaves, results), strict=True)
        stacked = [torch.stack(column)[: info.batch_size] for column in columns]
        return pytree.tree_unflatten(stacked, out_spec), pytree.tree_unflatten([0] * len(found), out_spec)

    return rule


# The rules are registered while this object lives.
_library = torch.library.Library("lightkit", "FRAGMENT")
