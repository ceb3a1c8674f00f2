"""The training loop between two of Lightning's own steps."""

from lightkit.loops.graphs import PassGraphs
from lightkit.loops.lean import LeanRun
from lightkit.loops.obstacle import graph_obstacle, obstacle

__all__ = ["LeanRun", "PassGraphs", "graph_obstacle", "obstacle"]
