"""A check of the network between all nodes of a job, before the job starts.

The nodes meet at a TCP store on the port of torchrun's rendezvous. Each node then connects to every other node, and all
nodes run an all_reduce. Each phase has a timeout. If nodes are missing at its end, the error names them; if a library
hangs, a watchdog ends the process.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from rich.table import Table

from lightkit.errors import LightkitError
from lightkit.launch import addresses, diagnosis
from lightkit.launch.addresses import CONNECT_TIMEOUT
from lightkit.launch.node_report import NodeReport, report_self

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import Store

# Seconds for the all_reduces.
_REDUCE_TIMEOUT = 20.0

# Seconds that node 0 keeps the store for the others.
_LEAVE_TIMEOUT = 5.0

# The all_reduce that measures the rate: float32 numbers, and timed repetitions.
_NUMBERS = 2_000_000
_REPEATS = 5


class CheckError(LightkitError):
    """An error of a check in which the nodes did not meet; the message names the missing nodes or the reason."""


@dataclass(frozen=True)
class CheckRendezvous:
    """The rendezvous of a check, and the rank of this node.

    Args:
        host: the host name or the address of node 0.
        port: the port on which node 0 serves the rendezvous.
        rank: the rank of this node.
        nodes: the number of nodes.
        interface: the interface of the network between the nodes; None for the interface that leads to node 0.
        timeout: the seconds in which all nodes must have started the check.
        is_served: True if torchrun serves a store at ``host`` and ``port``, so that node 0 does not.
    """

    host: str
    port: int
    rank: int
    nodes: int
    interface: str | None = None
    timeout: float = 30.0
    is_served: bool = False

    @property
    def endpoint(self) -> str:
        """The address ``HOST:PORT`` of the rendezvous, as torchrun's ``--rdzv-endpoint`` takes it."""
        return f"{self.host}:{self.port}"

    def host_is_loopback(self) -> bool:
        """Returns True if ``host`` resolves to a loopback address on this machine, which would connect to itself.

        Raises:
            ConfigError: ``host`` does not resolve within half of ``timeout``.
        """
        return any(map(addresses.is_loopback, addresses.resolve(self.host, self.timeout / 2)))


def check(rendezvous: CheckRendezvous) -> tuple[list[NodeReport], list[str]]:
    """Checks the network from this node, while all other nodes call this function too.

    Returns:
        The reports of all nodes by rank, and the faults as sentences with the remedy; all nodes get the same.

    Raises:
        LightkitError: this node cannot take part, or other nodes did not start the check within the timeout.
    """
    # Before the timeout begins: a slow file system must not look like a missing node.
    import torch  # noqa: F401

    end = time.monotonic() + rendezvous.timeout
    # The later phases have timeouts of their own.
    limit = rendezvous.timeout + 3 * CONNECT_TIMEOUT + _REDUCE_TIMEOUT + _LEAVE_TIMEOUT
    with _watchdog(limit, f"the check of node {rendezvous.rank} did not end within {limit:g} s"):
        if rendezvous.rank > 0 and rendezvous.host_is_loopback():
            raise CheckError(
                f"the endpoint {rendezvous.endpoint} is node {rendezvous.rank} itself, and not node 0: pass an address "
                "of node 0 in the network that the nodes share"
            )
        mine = report_self(
            rendezvous.rank, rendezvous.nodes, rendezvous.host, rendezvous.interface, rendezvous.timeout / 2
        )
        with _Listener() as listener:
            mine.port, mine.token = listener.port, listener.token
            store = _meet(rendezvous, end)
            _agree(store, rendezvous, end)
            reports = _exchange(store, "reports", mine, end, f"within {rendezvous.timeout:g} s")
            faults = list(diagnosis.before_connecting(reports, rendezvous.host))
            _connect_to_all(mine, reports)
            reports = _exchange(
                store, "connections", mine, time.monotonic() + 3 * CONNECT_TIMEOUT, "to the end of the check"
            )
        faults += diagnosis.of_connections(reports)
        # All nodes have the same reports here, and decide alike.
        if not any(node.unreachable or addresses.is_loopback(node.address) for node in reports):
            _all_reduce(store, mine, rendezvous.nodes)
            reports = _exchange(
                store, "reduce", mine, time.monotonic() + _REDUCE_TIMEOUT, "to the end of the all_reduce"
            )
            faults += diagnosis.of_all_reduce(reports)
        _leave(store, rendezvous)
    return reports, faults


def _meet(rendezvous: CheckRendezvous, end: float) -> Store:
    """Returns the store at which all nodes meet; node 0 serves it unless torchrun does.

    Raises:
        CheckError: this node does not reach the store until ``time.monotonic()`` is ``end``, or another node has the
            same rank.
    """
    from torch.distributed import PrefixStore, TCPStore

    options = {"wait_for_workers": False, "timeout": timedelta(seconds=max(end - time.monotonic(), 1.0))}
    serves = rendezvous.rank == 0 and not rendezvous.is_served
    if serves:
        resolved = addresses.resolve(rendezvous.host)
        if not any(map(addresses.is_own, resolved)):
            raise CheckError(
                f"the endpoint {rendezvous.endpoint} ({', '.join(resolved)}) is no address of node 0, which has "
                f"{', '.join(a for a in addresses.interfaces().values() if a)}: pass one of these as the endpoint "
                "everywhere, or start node 0 on that machine"
            )
    else:
        if (reason := addresses.wait_for(rendezvous.host, rendezvous.port, end)) is not None:
            raise CheckError(
                f"node {rendezvous.rank} does not reach node 0 at {rendezvous.endpoint} within {rendezvous.timeout:g} "
                f"s: {reason}; the check must run on node 0 too"
            )
    cannot_meet = f"node {rendezvous.rank} cannot meet the others at {rendezvous.endpoint}"
    no_check = f"{cannot_meet}: what answers there is no check"
    try:
        # torch waits for ever for the answer of a server of another kind.
        with _watchdog(max(end - time.monotonic(), 0) + CONNECT_TIMEOUT, no_check):
            store = TCPStore(rendezvous.host, rendezvous.port, is_master=serves, **options)
            store = PrefixStore("lightkit/check", store)
            is_first = store.add(f"came/{rendezvous.rank}", 1) == 1
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        if "EADDRINUSE" in reason:
            reason = "another program on node 0 uses the port; choose another one everywhere"
        elif not serves:
            raise CheckError(f"{no_check} ({reason})") from error
        raise CheckError(f"{cannot_meet}: {reason}") from error
    if not is_first:
        raise CheckError(f"another node has come as node {rendezvous.rank} too: give each machine its own --node-rank")
    return store


def _agree(store: Store, rendezvous: CheckRendezvous, end: float) -> None:
    """Checks that this node and node 0 were given the same number of nodes; leaves a message for the others if not.

    Raises:
        CheckError: the numbers differ, or node 0 did not come until ``time.monotonic()`` was ``end``.
    """
    try:
        if rendezvous.rank == 0:
            store.set("nodes", str(rendezvous.nodes))
        store.wait(["nodes"], timedelta(seconds=max(end - time.monotonic(), 0.1)))
        nodes = int(store.get("nodes"))
        if rendezvous.nodes != nodes:
            message = (
                f"node {rendezvous.rank} was told of {rendezvous.nodes} nodes and node 0 of {nodes}: pass the same "
                "--nodes everywhere"
            )
            store.set("disagreement", message)
            raise CheckError(message)
    except RuntimeError as error:
        raise CheckError(f"node 0 did not come within {rendezvous.timeout:g} s, or did not stay") from error


def _exchange(store: Store, phase: str, mine: NodeReport, end: float, until: str) -> list[NodeReport]:
    """Sends the report of this node to all nodes, and returns the reports of all nodes by rank.

    Args:
        store: the store of the check.
        phase: the name of the phase, a prefix of the keys in the store.
        mine: the report of this node.
        end: the ``time.monotonic()`` until which the reports of all nodes must have come.
        until: the same limit in words, for the message of an error.

    Raises:
        CheckError: a report did not come.
    """
    keys = [f"{phase}/{rank}" for rank in range(mine.nodes)]
    try:
        store.set(keys[mine.rank], json.dumps(asdict(mine)))
        store.wait(keys, timedelta(seconds=max(end - time.monotonic(), 0.1)))
        return [NodeReport(**json.loads(value)) for value in store.multi_get(keys)]
    except RuntimeError as error:
        raise CheckError(_missing(store, keys, until)) from error


def _missing(store: Store, keys: list[str], until: str) -> str:
    try:
        if store.check(["disagreement"]):
            return store.get("disagreement").decode()
        came = [rank for rank, key in enumerate(keys) if store.check([key])]
    except RuntimeError:
        return f"node 0 did not stay {until}: see what it says there"
    missing = [str(rank) for rank in range(len(keys)) if rank not in came]
    known = ", ".join(f"{rank} ({json.loads(store.get(keys[rank]))['host']})" for rank in came)
    return (
        f"node {' and node '.join(missing)} of {len(keys)} did not come {until}; there were {known}. Start the same "
        "command there; if it runs there, what it says there is the reason"
    )


class _Listener:
    """A TCP server that sends its token and its time to each client, on a port that the kernel chooses.

    gloo and NCCL listen on such ports, too.
    """

    def __init__(self) -> None:
        self._server = socket.create_server(("", 0), backlog=128)
        self.port = self._server.getsockname()[1]
        self.token = secrets.token_hex(16)

    def __enter__(self) -> _Listener:
        threading.Thread(target=self._answer, daemon=True).start()
        return self

    def __exit__(self, *unused: object) -> None:
        self._server.close()

    def _answer(self) -> None:
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:
                # `__exit__` has closed the socket.
                return
            with connection:
                try:
                    connection.settimeout(CONNECT_TIMEOUT)
                    connection.recv(1)
                    connection.sendall(json.dumps([self.token, time.time()]).encode())
                except OSError:
                    # The other node reports the failure.
                    continue


def _connect_to_all(mine: NodeReport, reports: list[NodeReport]) -> None:
    others = [node for node in reports if node.rank != mine.rank]
    if not others:
        return
    with ThreadPoolExecutor(min(len(others), 32)) as pool:
        for node, (reason, clock) in zip(others, pool.map(_connect, others), strict=True):
            if reason is not None:
                mine.unreachable[str(node.rank)] = reason
            if node.rank == 0:
                mine.clock_offset = clock


def _connect(node: NodeReport) -> tuple[str | None, float | None]:
    """Connects to the `_Listener` of another node.

    Returns:
        The reason why this machine does not reach the node, or None; and the seconds by which the clock of this machine
        is ahead of the node's clock, or None if the node did not answer.
    """
    if addresses.is_loopback(node.address):
        # The connection would reach this machine itself.
        return "it is known by a loopback address", None
    try:
        token, offset = _request_token(node)
    except TimeoutError:
        return "no answer; a firewall may drop packets", None
    except OSError as error:
        return error.strerror or str(error), None
    except (ValueError, TypeError):
        token, offset = None, None
    if token != node.token:
        return "another program answered: the address is not that node's own", None
    return None, offset


def _request_token(node: NodeReport) -> tuple[object, float]:
    with socket.create_connection((node.address, node.port), timeout=CONNECT_TIMEOUT) as connection:
        connection.settimeout(CONNECT_TIMEOUT)
        before = time.time()
        connection.sendall(b"?")
        answer = connection.makefile("rb").read()
        after = time.time()
    token, their_time = json.loads(answer)
    return token, (before + after) / 2 - their_time


def _all_reduce(store: Store, mine: NodeReport, nodes: int) -> None:
    """Measures gloo's all_reduce over all nodes, and adds the times or the error to ``mine``."""
    import torch
    import torch.distributed as dist

    # The commands of lightkit.launch set it too.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", mine.interface)
    limit = timedelta(seconds=_REDUCE_TIMEOUT / 2)
    try:
        dist.init_process_group("gloo", store=store, rank=mine.rank, world_size=nodes, timeout=limit)
        mine.milliseconds = 1e3 * _median_seconds(torch.zeros(1))
        numbers = torch.zeros(_NUMBERS)
        mine.megabytes_per_second = numbers.nbytes / 1e6 / _median_seconds(numbers)
    except RuntimeError as error:
        mine.error = str(error).partition("\n")[0]
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _median_seconds(tensor: Tensor) -> float:
    import torch.distributed as dist

    times = []
    for _ in range(_REPEATS + 1):
        started = time.perf_counter()
        dist.all_reduce(tensor)
        times.append(time.perf_counter() - started)
    # The first all_reduce connects the processes.
    return statistics.median(times[1:])


def _leave(store: Store, rendezvous: CheckRendezvous) -> None:
    """Tells the other nodes that this node has finished; node 0, which serves the store, waits for all of them."""
    store.set(f"left/{rendezvous.rank}", "")
    if rendezvous.rank == 0:
        with suppress(RuntimeError):
            store.wait([f"left/{rank}" for rank in range(rendezvous.nodes)], timedelta(seconds=_LEAVE_TIMEOUT))


@contextmanager
def _watchdog(seconds: float, message: str) -> Iterator[None]:
    """Prints ``message`` and ends the process with status 1 if the context takes longer than ``seconds``."""

    def end() -> None:
        print(f"error: {message}", file=sys.stderr, flush=True)
        os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def table(reports: list[NodeReport]) -> Table:
    """Returns a table with a row for each node: versions, GPUs, clock, reached nodes and the times of all_reduce."""
    names = ["node", "host", "interface", "address", "python", "torch", "lightning", "lightkit", "GPUs", "clock"]
    columns = [*names, "reaches", "all_reduce"]
    rows = Table(*columns)
    for node in reports:
        reached = [str(other.rank) for other in reports if other.rank != node.rank]
        reached = [rank for rank in reached if rank not in node.unreachable]
        speed = "-"
        if node.milliseconds is not None and node.megabytes_per_second is not None:
            speed = f"{node.milliseconds:.2f} ms, {node.megabytes_per_second:.0f} MB/s"
        rows.add_row(
            str(node.rank),
            node.host,
            node.interface,
            node.address,
            *node.versions.values(),
            str(node.gpus),
            "0" if node.rank == 0 else "-" if node.clock_offset is None else f"{node.clock_offset:+.3f} s",
            f"{len(reached)} of {len(reports) - 1}",
            speed,
        )
    return rows
