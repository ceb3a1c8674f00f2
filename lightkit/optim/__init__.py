"""Optimizers on lightkit's kernels, with the signatures of torch.optim."""

from lightkit.optim.adam import Adam, AdamW
from lightkit.optim.convert import convert
from lightkit.optim.fused import FusedStep
from lightkit.optim.sgd import SGD

__all__ = ["SGD", "Adam", "AdamW", "FusedStep", "convert"]
