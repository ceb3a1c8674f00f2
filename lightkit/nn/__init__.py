"""Modules with the signatures of torch.nn, on lightkit's kernels."""

from torch.nn import BCEWithLogitsLoss, MSELoss

from lightkit.nn.cross_entropy import CrossEntropyLoss
from lightkit.nn.fused_sequential import FusedSequential, can_fuse

# MSELoss and BCEWithLogitsLoss are torch's own: a kernel would move the same bytes.
__all__ = ["BCEWithLogitsLoss", "CrossEntropyLoss", "FusedSequential", "MSELoss", "can_fuse"]
