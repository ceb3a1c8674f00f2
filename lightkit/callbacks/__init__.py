"""Callbacks of Lightning."""

from lightkit.callbacks.averaged_weights import AveragedWeights
from lightkit.callbacks.checkpoint import Checkpoint
from lightkit.callbacks.fuse_kernels import FuseKernels
from lightkit.callbacks.lean_loop import LeanLoop
from lightkit.callbacks.print_summary import PrintSummary
from lightkit.callbacks.progress import Progress
from lightkit.callbacks.stochastic_weight_averaging import StochasticWeightAveraging
from lightkit.callbacks.test_recorder import TestRecorder
from lightkit.callbacks.throughput import Throughput

__all__ = [
    "AveragedWeights",
    "Checkpoint",
    "FuseKernels",
    "LeanLoop",
    "PrintSummary",
    "Progress",
    "StochasticWeightAveraging",
    "TestRecorder",
    "Throughput",
]
