"""Smaller and faster models: pruning, quantization, sparsity and distillation, in any training."""

from lightkit.compress.calibration import calibrate
from lightkit.compress.distil import Distil
from lightkit.compress.prune import Prune
from lightkit.compress.quantization import apply_quantization
from lightkit.compress.quantize import Quantize
from lightkit.compress.save_widths import SaveWidths
from lightkit.compress.scheme import QuantizationScheme
from lightkit.compress.sparsify import Sparsify
from lightkit.compress.weight_formats import QUANTIZATION_KEY
from lightkit.compress.widths import WIDTHS_KEY, apply_widths

__all__ = [
    "QUANTIZATION_KEY",
    "WIDTHS_KEY",
    "Distil",
    "Prune",
    "QuantizationScheme",
    "Quantize",
    "SaveWidths",
    "Sparsify",
    "apply_quantization",
    "apply_widths",
    "calibrate",
]
