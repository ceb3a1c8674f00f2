"""Optimizers with the signatures of torch.optim, on lightkit's kernels."""

from lightkit.optim.convert import convert
from lightkit.optim.sgd import SGD

__all__ = ["SGD", "convert"]
