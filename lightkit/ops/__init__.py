"""Functions on the native kernels, each with the signature of its counterpart in torch."""

import warnings

from lightkit.ops.activation import ACTIVATIONS, Activation
from lightkit.ops.conv2d import conv2d, conv2d_is_faster, conv2d_reference
from lightkit.ops.conv_relu_pool import conv_relu_pool, conv_relu_pool_reference
from lightkit.ops.cross_entropy import cross_entropy, cross_entropy_reference
from lightkit.ops.dropout import dropout, dropout_mask, dropout_reference
from lightkit.ops.fake_quantize import fake_quantize_weights, fake_quantize_weights_reference
from lightkit.ops.int8_chain import Int8Chain, Int8Layer, int8_chain_reference
from lightkit.ops.layer_chain import ChainLayer, layer_chain, layer_chain_reference
from lightkit.ops.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from lightkit.ops.norm_act import norm_act, norm_act_is_faster, norm_act_reference
from lightkit.ops.patch import patch_cross_entropy
from lightkit.ops.patch_nll import patch_nll_loss

__all__ = [
    "ACTIVATIONS",
    "Activation",
    "ChainLayer",
    "Int8Chain",
    "Int8Layer",
    "conv2d",
    "conv2d_is_faster",
    "conv2d_reference",
    "conv_relu_pool",
    "conv_relu_pool_reference",
    "cross_entropy",
    "cross_entropy_reference",
    "dropout",
    "dropout_mask",
    "dropout_reference",
    "fake_quantize_weights",
    "fake_quantize_weights_reference",
    "int8_chain_reference",
    "layer_chain",
    "layer_chain_reference",
    "linear_cross_entropy",
    "linear_cross_entropy_reference",
    "norm_act",
    "norm_act_is_faster",
    "norm_act_reference",
    "patch_cross_entropy",
    "patch_nll_loss",
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
