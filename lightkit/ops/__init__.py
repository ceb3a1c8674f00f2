"""The kernels as functions, each with the signature of its counterpart in torch."""

from lightkit.ops.conv_relu_pool import conv_relu_pool, conv_relu_pool_reference
from lightkit.ops.cross_entropy import cross_entropy, cross_entropy_reference
from lightkit.ops.layer_chain import ChainLayer, layer_chain, layer_chain_reference
from lightkit.ops.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from lightkit.ops.substitute import substitute_cross_entropy

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
    "substitute_cross_entropy",
]
