"""A parameter server: servers hold parameters and optimizer states, workers push gradients and pull parameters [1]_.

A server is a process, ``python -m lightkit.parameter_server``. Each of several servers holds a shard, a part of the
parameters. A worker trains through a `Client`, which opens one TCP connection to each server, so that the failure of
one peer leaves the other connections untouched. This package imports neither Lightning nor Hydra; the strategy for
Lightning is `lightkit.strategies.ParameterServer`.

Both sides of a connection prove that they know a shared secret (see `lightkit.parameter_server.rendezvous`), and sign
all that they send, except the elements of tensors. Nothing is encrypted: an attacker who reads the network reads the
parameters, and an attacker who changes packets changes elements of gradients. An attacker who knows the secret can
train the model badly and take the place of an absent worker; the attacker cannot end the server.

References:
    .. [1] Li et al., Scaling distributed machine learning with the parameter server, OSDI 2014; Ho et al., More
       effective distributed ML via a stale synchronous parallel parameter server, NIPS 2013 (``bounded``).
"""

from lightkit._util.deprecated import renamed
from lightkit.parameter_server.client import Client, Clipping
from lightkit.parameter_server.hyperparameters import group_options
from lightkit.parameter_server.server import Server
from lightkit.parameter_server.status import ServerStatus, WorkerStatus
from lightkit.parameter_server.training_spec import MODES, OptimizerSpec, TrainingSpec

__all__ = [
    "MODES",
    "Client",
    "Clipping",
    "OptimizerSpec",
    "Server",
    "ServerStatus",
    "TrainingSpec",
    "WorkerStatus",
    "group_options",
]

__getattr__ = renamed(
    __name__, {"Job": f"{__name__}.training_spec.TrainingSpec", "Table": f"{__name__}.training_spec.OptimizerSpec"}
)
