"""Parameters and optimizer state on servers; workers push gradients and pull parameters [1]_.

A server is a process of its own, ``python -m lightkit.parameter_server``, or several of them with a part of the
parameters each; `Client` is a worker's side. Each worker has a TCP connection of its own to each server, so that who
dies, or sends what it should not, takes nobody along. Nothing here knows of Lightning: the strategy that does is
`lightkit.strategies.ParameterServer`.

Both sides of a connection prove that they know the secret before anything else is said (see
`lightkit.parameter_server.rendezvous`), and sign what they send, except the elements of tensors. Nothing is encrypted:
who can read the network between them can read the parameters, and who can change packets can change numbers in them.
Whoever has the secret can train the model badly, and take a worker's place when it is free; it cannot end the server.

References:
    .. [1] Li et al., Scaling distributed machine learning with the parameter server, OSDI 2014; Ho et al., More
       effective distributed ML via a stale synchronous parallel parameter server, NIPS 2013 (``bounded``).
"""

from lightkit.parameter_server.client import Client
from lightkit.parameter_server.job import MODES, Job, Table
from lightkit.parameter_server.server import Server

__all__ = ["MODES", "Client", "Job", "Server", "Table"]
