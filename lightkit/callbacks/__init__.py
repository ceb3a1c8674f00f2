"""Callbacks of Lightning."""

from lightkit.callbacks.checkpoint import Checkpoint
from lightkit.callbacks.fuse_kernels import FuseKernels
from lightkit.callbacks.lean_loop import LeanLoop
from lightkit.callbacks.progress import Progress
from lightkit.callbacks.test_recorder import TestRecorder
from lightkit.callbacks.throughput import Throughput

__all__ = ["Checkpoint", "FuseKernels", "LeanLoop", "Progress", "TestRecorder", "Throughput"]
