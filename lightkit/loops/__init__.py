"""A training loop that runs most steps without Lightning's overhead, and CUDA graphs of forward and backward."""

from lightkit.loops.cuda_graphs import PassGraphs
from lightkit.loops.lean import LeanRun
from lightkit.loops.support import graph_unsupported_reason, unsupported_reason

__all__ = ["LeanRun", "PassGraphs", "graph_unsupported_reason", "unsupported_reason"]
