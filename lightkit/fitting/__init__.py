"""``lightkit.fit`` and ``lightkit.load``: training, evaluation and prediction of arrays in a few lines."""

from lightkit.fitting.fit import fit
from lightkit.fitting.result import FitResult, load

__all__ = ["FitResult", "fit", "load"]
