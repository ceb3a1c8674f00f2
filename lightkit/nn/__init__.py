"""Modules with the signatures of torch.nn, on lightkit's kernels."""

from lightkit.nn.cross_entropy import CrossEntropyLoss
from lightkit.nn.fused_sequential import FusedSequential, can_fuse
from lightkit.nn.linear_cross_entropy import LinearCrossEntropyLoss

__all__ = ["CrossEntropyLoss", "FusedSequential", "LinearCrossEntropyLoss", "can_fuse"]
