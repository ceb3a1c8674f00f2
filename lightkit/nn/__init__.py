"""Loss modules with the signatures of torch.nn, on lightkit's kernels."""

from lightkit.nn.cross_entropy import CrossEntropyLoss

__all__ = ["CrossEntropyLoss"]
