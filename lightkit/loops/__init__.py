"""The training loop between two of Lightning's own steps."""

from lightkit.loops.graphs import PassGraphs
from lightkit.loops.lean import LeanEpochLoop
from lightkit.loops.obstacle import graph_obstacle, obstacle

__all__ = ["LeanEpochLoop", "PassGraphs", "graph_obstacle", "obstacle"]
