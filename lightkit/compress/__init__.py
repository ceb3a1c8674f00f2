"""Smaller and faster models: pruning, sparsity and distillation, in any training."""

from lightkit.compress.distil import Distil
from lightkit.compress.prune import Prune
from lightkit.compress.save_widths import SaveWidths
from lightkit.compress.sparsify import Sparsify
from lightkit.compress.widths import WIDTHS_KEY, apply_widths

__all__ = ["WIDTHS_KEY", "Distil", "Prune", "SaveWidths", "Sparsify", "apply_widths"]
