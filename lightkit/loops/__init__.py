"""The training loop between two of Lightning's own steps."""

from lightkit.loops.lean import LeanEpochLoop
from lightkit.loops.obstacle import obstacle

__all__ = ["LeanEpochLoop", "obstacle"]
