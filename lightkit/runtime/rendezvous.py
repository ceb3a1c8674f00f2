"""The rendezvous of the processes of a job, by the environment variables of torch.distributed."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from lightkit.runtime.environment import is_started, rank
from lightkit.runtime.job_store import JobStore
from lightkit.runtime.keepalive import Keepalive

if TYPE_CHECKING:
    from torch.distributed import TCPStore


class Rendezvous:
    """The store by which the processes of a job communicate, and the `Keepalive` by which they watch each other.

    The process must have the environment variables that torchrun sets. The object must live as long as the process
    trains: in the process of rank 0 it may be the server of the store, which the process group of the training shares.
    Processes of a supervisor have no `Keepalive`, since the supervisor watches them.

    Attributes:
        jobs: the jobs, the result and the errors in the store.
    """

    def __init__(self) -> None:
        from torch.distributed import PrefixStore, rendezvous

        self._server = _new_store_after_restart()
        store = PrefixStore("lightkit", next(iter(rendezvous("env://")))[0])
        self.jobs = JobStore(store)
        # The supervisor watches the processes that it has started; nobody watches those of torchrun.
        self._keepalive = None if is_started() else Keepalive(store, rank(), os.environ["MASTER_ADDR"])

    def release(self) -> None:
        """Tells the other processes that this one ends as it should: see `Keepalive.release`."""
        if self._keepalive is not None:
            self._keepalive.release()


def _new_store_after_restart() -> TCPStore | None:
    """Makes a new store after a restart on one machine, and puts its port into ``MASTER_PORT``.

    The store of torchrun's agent still holds the addresses of the processes before the restart. Between machines,
    where the numbers of restarts may differ, `lightkit.runtime.restart_record` requires that torchrun makes the store.

    Returns:
        The store if this process, the one of rank 0, is its server; None in other processes and without a restart.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or attempt == "0":
        return None
    from torch.distributed import PrefixStore, TCPStore, rendezvous

    agents_store = PrefixStore(f"lightkit/restart/{attempt}", next(iter(rendezvous("env://")))[0])
    server = None
    if rank() == 0:
        server = TCPStore(os.environ["MASTER_ADDR"], 0, is_master=True, wait_for_workers=False)
        agents_store.set("port", str(server.port))
    os.environ["MASTER_PORT"] = agents_store.get("port").decode()
    return server
