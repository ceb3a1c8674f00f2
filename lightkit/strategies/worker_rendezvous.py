"""Rendezvous of the workers of a parameter server: barriers and broadcasts at a TCP store, outside the training."""

from __future__ import annotations

import itertools
import json
import os
from datetime import timedelta
from typing import Any

from lightning.fabric.plugins import ClusterEnvironment
from torch.distributed import PrefixStore, TCPStore

from lightkit.errors import ConfigError

# Time for all processes of a job to come up.
_STARTUP_TIMEOUT = timedelta(minutes=10)

# The validation and the test of worker 0, which the others wait for, may take any time.
_NO_TIMEOUT = timedelta(days=365)

# Counts the rendezvous of this process; all workers run the same program, and count alike.
_rendezvous = itertools.count()


class WorkerRendezvous:
    """Barriers and broadcasts of all workers of a job.

    All workers must call the methods in the same order.

    Args:
        environment: the cluster environment, which has the address of the TCP store.
        rank: the rank of this worker; worker 0 serves the store, unless torchrun or lightkit.train does.
        world_size: the number of workers.
    """

    def __init__(self, environment: ClusterEnvironment, rank: int, world_size: int) -> None:
        self._rank, self._world_size = rank, world_size
        is_served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        store = TCPStore(
            environment.main_address,
            environment.main_port,
            is_master=rank == 0 and not is_served,
            wait_for_workers=False,
            timeout=_STARTUP_TIMEOUT,
            # Another strategy of this process may serve a store at the same address.
            multi_tenant=True,
        )
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._store = PrefixStore(f"lightkit/parameter_server/{attempt}/{next(_rendezvous)}", store)
        self._calls = 0

    def wait_for_all(self) -> None:
        """Waits for all workers.

        Raises:
            RuntimeError: a worker does not come within ten minutes.
        """
        key = self._next_key()
        if self._store.add(key, 1) == self._world_size:
            self._store.set(f"{key}/all", "")
        self._store.wait([f"{key}/all"], _STARTUP_TIMEOUT)

    def wait_for(self, src: int) -> None:
        """Waits until worker ``src`` makes the same call; after the training, other workers may be lost."""
        self.broadcast(None, src)

    def broadcast(self, value: Any, src: int) -> Any:
        """Returns the value of worker ``src``, for which the other workers wait.

        Args:
            value: the value to send, in worker ``src``; the method ignores it in other workers.
            src: the rank of the worker that sends.

        Raises:
            ConfigError: ``value`` does not consist of JSON's types and paths.
        """
        key = self._next_key()
        if self._rank == src:
            try:
                self._store.set(key, json.dumps(value, default=os.fspath))
            except TypeError as error:
                raise ConfigError(f"the workers of a parameter server broadcast JSON values alone: {error}") from None
        self._store.wait([key], _NO_TIMEOUT)
        return json.loads(self._store.get(key))

    def _next_key(self) -> str:
        self._calls += 1
        return f"meeting/{self._calls}"
