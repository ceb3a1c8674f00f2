"""All nodes of a job to be meet, try every way between them, and say what is wrong.

They meet at a store like the one that torchrun's rendezvous uses, on the same port. Everything has an end: who does not
come is named, and a watchdog ends whatever a library does not.
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
from typing import Any

from rich.table import Table

from lightkit.errors import LightkitError
from lightkit.launch import addresses, diagnosis
from lightkit.launch.addresses import CONNECT
from lightkit.launch.facts import Facts, collect

# Seconds for the all_reduces, which no other traffic should disturb.
_REDUCE = 20.0

# Seconds that node 0 waits for the others to have read everything.
_LEAVE = 5.0

_NUMBERS = 2_000_000
_REPEATS = 5


class CheckError(LightkitError):
    """The nodes did not meet; says who is missing, or why."""


@dataclass(frozen=True)
class Meeting:
    """Where the nodes meet, and as which of them this one comes.

    Args:
        host: the endpoint's, of node 0.
        port: the endpoint's.
        rank: of this node.
        nodes: how many there are.
        interface: of the network between them; None for the one that leads to node 0.
        timeout: seconds in which all must have come.
        is_served: whether somebody else, torchrun, holds a store there.
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
        """As torchrun takes it."""
        return f"{self.host}:{self.port}"

    def host_is_loopback(self) -> bool:
        """Whether the endpoint is, on each machine, that machine."""
        return any(map(addresses.is_loopback, addresses.resolve(self.host, self.timeout / 2)))


def check(meeting: Meeting) -> tuple[list[Facts], list[str]]:
    """Takes part for one node; returns what all nodes said, and the faults.

    Raises:
        LightkitError: this node cannot take part, or others did not come.
    """
    # Before the clock runs: from a slow file system it takes its time, which is no node's not coming.
    import torch  # noqa: F401

    end = time.monotonic() + meeting.timeout
    # The phases after the meeting have limits of their own.
    limit = meeting.timeout + 3 * CONNECT + _REDUCE + _LEAVE
    with _watchdog(limit, f"the check of node {meeting.rank} did not end within {limit:g} s"):
        if meeting.rank > 0 and meeting.host_is_loopback():
            raise CheckError(
                f"the endpoint {meeting.endpoint} is node {meeting.rank} itself, and no way to node 0: pass an address "
                "of node 0 in the network that the nodes share"
            )
        mine = collect(meeting.rank, meeting.nodes, meeting.host, meeting.interface, meeting.timeout / 2)
        with _Listener() as listener:
            mine.port, mine.token = listener.port, listener.token
            store = _meet(meeting, end)
            _agree(store, meeting, end)
            facts = _exchange(store, "facts", mine, end, f"within {meeting.timeout:g} s")
            faults = list(diagnosis.before_connecting(facts, meeting.host))
            _connect_to_all(mine, facts)
            facts = _exchange(store, "connections", mine, time.monotonic() + 3 * CONNECT, "to the end of the check")
        faults += diagnosis.of_connections(facts)
        # All nodes have the same facts here, and come to the same decision.
        if not any(node.unreachable or addresses.is_loopback(node.address) for node in facts):
            _all_reduce(store, mine, meeting.nodes)
            facts = _exchange(store, "reduce", mine, time.monotonic() + _REDUCE, "to the end of the all_reduce")
            faults += diagnosis.of_all_reduce(facts)
        _leave(store, meeting)
    return facts, faults


def _meet(meeting: Meeting, end: float) -> Any:
    """The store that all nodes meet at."""
    from torch.distributed import PrefixStore, TCPStore

    options = {"wait_for_workers": False, "timeout": timedelta(seconds=max(end - time.monotonic(), 1.0))}
    serves = meeting.rank == 0 and not meeting.is_served
    if serves:
        resolved = addresses.resolve(meeting.host)
        if not any(map(addresses.is_own, resolved)):
            raise CheckError(
                f"the endpoint {meeting.endpoint} ({', '.join(resolved)}) is no address of node 0, which has "
                f"{', '.join(a for a in addresses.interfaces().values() if a)}: pass one of these as the endpoint "
                "everywhere, or start node 0 on that machine"
            )
    else:
        if (reason := addresses.wait_for(meeting.host, meeting.port, end)) is not None:
            raise CheckError(
                f"node {meeting.rank} does not reach node 0 at {meeting.endpoint} within {meeting.timeout:g} s: "
                f"{reason}; the check must run on node 0 too"
            )
    no_check = f"node {meeting.rank} cannot meet the others at {meeting.endpoint}: what answers there is no check"
    try:
        # A server of another kind leaves torch waiting for an answer.
        with _watchdog(max(end - time.monotonic(), 0) + CONNECT, no_check):
            store = TCPStore(meeting.host, meeting.port, is_master=serves, **options)
            store = PrefixStore("lightkit/check", store)
            is_first = store.add(f"came/{meeting.rank}", 1) == 1
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        if "EADDRINUSE" in reason:
            reason = "another program on node 0 uses the port; choose another one everywhere"
        elif not serves:
            raise CheckError(f"{no_check} ({reason})") from error
        raise CheckError(f"node {meeting.rank} cannot meet the others at {meeting.endpoint}: {reason}") from error
    if not is_first:
        raise CheckError(f"another node has come as node {meeting.rank} too: give each machine its own --node-rank")
    return store


def _agree(store: Any, meeting: Meeting, end: float) -> None:
    """Sees to it that all nodes wait for as many others: who does not leaves word for those that miss it."""
    try:
        if meeting.rank == 0:
            store.set("nodes", str(meeting.nodes))
        store.wait(["nodes"], timedelta(seconds=max(end - time.monotonic(), 0.1)))
        nodes = int(store.get("nodes"))
        if meeting.nodes != nodes:
            word = (
                f"node {meeting.rank} was told of {meeting.nodes} nodes and node 0 of {nodes}: pass the same --nodes "
                "everywhere"
            )
            store.set("disagreement", word)
            raise CheckError(word)
    except RuntimeError as error:
        raise CheckError(f"node 0 did not come within {meeting.timeout:g} s, or did not stay") from error


def _exchange(store: Any, phase: str, mine: Facts, end: float, until: str) -> list[Facts]:
    """Gives all nodes what this one knows, and returns what all of them know."""
    keys = [f"{phase}/{rank}" for rank in range(mine.nodes)]
    try:
        store.set(keys[mine.rank], json.dumps(asdict(mine)))
        store.wait(keys, timedelta(seconds=max(end - time.monotonic(), 0.1)))
        return [Facts(**json.loads(value)) for value in store.multi_get(keys)]
    except RuntimeError as error:
        raise CheckError(_missing(store, keys, until)) from error


def _missing(store: Any, keys: list[str], until: str) -> str:
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
    """Takes connections on a port of the kernel's choice, as gloo and NCCL do, and answers with the time."""

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
                # Closed.
                return
            with connection:
                try:
                    connection.settimeout(CONNECT)
                    connection.recv(1)
                    connection.sendall(json.dumps([self.token, time.time()]).encode())
                except OSError:
                    # The other node tells what it saw of that.
                    continue


def _connect_to_all(mine: Facts, facts: list[Facts]) -> None:
    others = [node for node in facts if node.rank != mine.rank]
    if not others:
        return
    with ThreadPoolExecutor(min(len(others), 32)) as pool:
        for node, (reason, clock) in zip(others, pool.map(_connect, others), strict=True):
            if reason is not None:
                mine.unreachable[str(node.rank)] = reason
            if node.rank == 0:
                mine.clock = clock


def _connect(node: Facts) -> tuple[str | None, float | None]:
    """Why a node is not reached, and by how many seconds this one's clock is ahead of its."""
    if addresses.is_loopback(node.address):
        # That would be this machine itself.
        return "it is known by a loopback address", None
    try:
        with socket.create_connection((node.address, node.port), timeout=CONNECT) as connection:
            connection.settimeout(CONNECT)
            before = time.time()
            connection.sendall(b"?")
            answer = connection.makefile("rb").read()
            after = time.time()
        token, their_time = json.loads(answer)
    except TimeoutError:
        return "no answer, as from behind a firewall", None
    except OSError as error:
        return error.strerror or str(error), None
    except ValueError:
        token = None
    if token != node.token:
        return "another program answered, so that the address is not its own", None
    return None, (before + after) / 2 - their_time


def _all_reduce(store: Any, mine: Facts, nodes: int) -> None:
    """Times gloo."""
    import torch
    import torch.distributed as dist

    # As the commands of lightkit.launch do.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", mine.interface)
    limit = timedelta(seconds=_REDUCE / 2)
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


def _median_seconds(tensor: Any) -> float:
    import torch.distributed as dist

    times = []
    for _ in range(_REPEATS + 1):
        started = time.perf_counter()
        dist.all_reduce(tensor)
        times.append(time.perf_counter() - started)
    # The first one connects.
    return statistics.median(times[1:])


def _leave(store: Any, meeting: Meeting) -> None:
    """Node 0 holds the store: it stays until the others need it no more."""
    store.set(f"left/{meeting.rank}", "")
    if meeting.rank == 0:
        with suppress(RuntimeError):
            store.wait([f"left/{rank}" for rank in range(meeting.nodes)], timedelta(seconds=_LEAVE))


@contextmanager
def _watchdog(seconds: float, message: str) -> Iterator[None]:
    """Ends the process after so long, whatever it waits for."""

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


def table(facts: list[Facts]) -> Table:
    """What the nodes said, a row each."""
    names = ["node", "host", "interface", "address", "python", "torch", "lightning", "lightkit", "GPUs", "clock"]
    columns = [*names, "reaches", "all_reduce"]
    rows = Table(*columns)
    for node in facts:
        reached = [str(other.rank) for other in facts if other.rank != node.rank]
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
            "0" if node.rank == 0 else "-" if node.clock is None else f"{node.clock:+.3f} s",
            f"{len(reached)} of {len(facts) - 1}",
            speed,
        )
    return rows
