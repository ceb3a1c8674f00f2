"""Parameters and optimizer state on servers; workers push gradients and pull parameters [1]_.

A server is a process of its own, ``python -m lightkit.parameter_server``, or several of them with a part of the
parameters each; `Client` is a worker's side. Connections are torch.distributed's (gloo), one pair of processes for
each worker and server, so that who dies takes nobody along. Nothing here knows of Lightning: the strategy that does is
`lightkit.strategies.ParameterServer`.

References:
    .. [1] Li et al., Scaling distributed machine learning with the parameter server, OSDI 2014; Ho et al., More
       effective distributed ML via a stale synchronous parallel parameter server, NIPS 2013 (``bounded``).
"""

from lightkit.parameter_server.client import Client
from lightkit.parameter_server.job import MODES, Job, Table
from lightkit.parameter_server.server import Server

__all__ = ["MODES", "Client", "Job", "Server", "Table"]
