"""Optimizers with the signatures of torch.optim, on lightkit's kernels."""

from lightkit.optim.sgd import SGD

__all__ = ["SGD"]
