"""Functions on the native kernels, each with the signature of its counterpart in torch."""

import warnings

from lightkit.ops.conv_relu_pool import conv_relu_pool, conv_relu_pool_reference
from lightkit.ops.cross_entropy import cross_entropy, cross_entropy_reference
from lightkit.ops.layer_chain import ChainLayer, layer_chain, layer_chain_reference
from lightkit.ops.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from lightkit.ops.patch import patch_cross_entropy

__all__ = [
    "ChainLayer",
    "conv_relu_pool",
    "conv_relu_pool_reference",
    "cross_entropy",
    "cross_entropy_reference",
    "layer_chain",
    "layer_chain_reference",
    "linear_cross_entropy",
    "linear_cross_entropy_reference",
    "patch_cross_entropy",
]


def __getattr__(name: str) -> object:
    if name == "substitute_cross_entropy":
        warnings.warn(
            "lightkit.ops.substitute_cross_entropy is now lightkit.ops.patch_cross_entropy",
            DeprecationWarning,
            stacklevel=2,
        )
        return patch_cross_entropy
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
