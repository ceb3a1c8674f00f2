"""Optimizers on lightkit's kernels, with the signatures of torch.optim, and a learning-rate scheduler."""

from lightkit.optim.adam import Adam, AdamW
from lightkit.optim.convert import convert
from lightkit.optim.fused import FusedStep
from lightkit.optim.masks import masks_of, set_masks
from lightkit.optim.sgd import SGD
from lightkit.optim.warmup_cosine import WarmupCosine

__all__ = ["SGD", "Adam", "AdamW", "FusedStep", "WarmupCosine", "convert", "masks_of", "set_masks"]
