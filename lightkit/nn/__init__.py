"""Modules on lightkit's kernels, with the signatures of torch.nn. Losses that need no kernel are torch's own."""

from torch.nn import BCEWithLogitsLoss, MSELoss

from lightkit.nn.cross_entropy import CrossEntropyLoss
from lightkit.nn.fused_sequential import FusedSequential, can_fuse, run_fused
from lightkit.nn.input_quantizer import InputQuantizer
from lightkit.nn.int8_layers import find_int8_chain
from lightkit.nn.linear_cross_entropy import LinearCrossEntropyLoss

__all__ = [
    "BCEWithLogitsLoss",
    "CrossEntropyLoss",
    "FusedSequential",
    "InputQuantizer",
    "LinearCrossEntropyLoss",
    "MSELoss",
    "can_fuse",
    "find_int8_chain",
    "run_fused",
]
