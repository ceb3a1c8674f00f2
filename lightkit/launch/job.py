"""What a job on several machines is, and the torchrun command that starts its part on one of them."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass

from lightkit.errors import ConfigError

# What torchrun's own rendezvous takes where none is named.
DEFAULT_PORT = 29400

# Seconds that a job with fewer nodes than it may have waits for another one.
_LAST_CALL = 10

# What a name must be to serve Kubernetes, the strictest; a pod's has the number of the node behind it.
_NAME = re.compile(r"[a-z]([a-z0-9-]{0,48}[a-z0-9])?")
_INTERFACE = re.compile(r"[A-Za-z0-9_.:@-]{1,15}")


@dataclass(frozen=True)
class Job:
    """A training on several nodes.

    Args:
        arguments: of ``lightkit.train``.
        nodes: how many.
        min_nodes: with how many the job goes on when others are lost.
        processes: on each node.
        port: where the first node holds the rendezvous.
        max_restarts: how often processes are started again after one has failed.
        interface: of the network between the nodes, by name; None for the one that leads to the first node.
        name: of the job.

    Raises:
        ConfigError: values out of range.
    """

    arguments: tuple[str, ...]
    nodes: int
    min_nodes: int
    processes: int = 1
    port: int = DEFAULT_PORT
    max_restarts: int = 3
    interface: str | None = None
    name: str = "lightkit"

    def __post_init__(self) -> None:
        if not 1 <= self.min_nodes <= self.nodes:
            raise ConfigError(f"--nodes {self.min_nodes}:{self.nodes}: expected MIN:MAX with 1 <= MIN <= MAX")
        if self.processes < 1:
            raise ConfigError(f"--processes {self.processes}: expected at least 1 on each node")
        if not 0 < self.port < 65536:
            raise ConfigError(f"--port {self.port}: expected a number from 1 to 65535")
        if self.max_restarts < 0:
            raise ConfigError(f"--max-restarts {self.max_restarts}: expected 0 or more")
        if not _NAME.fullmatch(self.name):
            raise ConfigError(
                f"--name {self.name}: expected up to 50 small letters, digits and dashes, a letter first, no dash last"
            )
        if self.interface is not None and not _INTERFACE.fullmatch(self.interface):
            raise ConfigError(f"--interface {self.interface}: this is not the name of a network interface")
        if not self.arguments:
            raise ConfigError(
                "the arguments of lightkit.train are missing: they come after --, as in -- +experiment=cnn"
            )

    @property
    def is_elastic(self) -> bool:
        """Whether it goes on with fewer nodes."""
        return self.min_nodes < self.nodes


def parse_nodes(text: str) -> tuple[int, int]:
    """The least and the greatest number of nodes of ``N`` or ``MIN:MAX``.

    Raises:
        ConfigError: it is neither.
    """
    least, _, most = text.partition(":")
    try:
        return int(least), int(most or least)
    except ValueError:
        raise ConfigError(f"--nodes {text}: expected a number, or MIN:MAX") from None


def parse_endpoint(text: str) -> tuple[str, int]:
    """Host and port of ``HOST`` or ``HOST:PORT``.

    Raises:
        ConfigError: it is none of these.
    """
    match = re.fullmatch(r"(?P<host>[A-Za-z0-9_.-]+)(?::(?P<port>\d{1,5}))?", text)
    if match is None or not 0 < int(match["port"] or DEFAULT_PORT) < 65536:
        raise ConfigError(
            f"--endpoint {text}: expected HOST or HOST:PORT, of the first node, by its name or an address of IPv4"
        )
    return match["host"], int(match["port"] or DEFAULT_PORT)


def environment(interface: str) -> dict[str, str]:
    """The environment of torchrun, as text of the shell, for a node whose interface is given as such."""
    return {
        # Without a name, gloo publishes the address that the machine's own name stands for, which may be loopback.
        "GLOO_SOCKET_IFNAME": interface,
        "NCCL_SOCKET_IFNAME": interface,
        # A restart meets at a new store: the one of before holds the addresses of processes that are gone.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }


def torchrun(job: Job, *, host: str, address: str, is_host: str, run_id: str, patience: int | None = None) -> list[str]:
    """The words of the torchrun command for one node; what differs from node to node is given as text of the shell.

    Args:
        job: what to start.
        host: name or address of the first node.
        address: of this one.
        is_host: 1 on the first node, 0 on the others.
        run_id: the same on all nodes, and another one for each job.
        patience: seconds in which the nodes must have come; None for torchrun's own ten minutes.
    """
    nodes = f"{job.min_nodes}:{job.nodes}" if job.is_elastic else str(job.nodes)
    # Said outright: torchrun compares the host with the machine's own names, and may come to another result.
    settings = f"is_host={is_host}" + (f",last_call_timeout={_LAST_CALL}" if job.is_elastic else "")
    settings += f",join_timeout={patience}" if patience else ""
    return [
        "torchrun",
        f"--nnodes={nodes}",
        f"--nproc-per-node={job.processes}",
        f"--max-restarts={job.max_restarts}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={host}:{job.port}",
        f"--rdzv-id={run_id}",
        f"--rdzv-conf={settings}",
        f"--local-addr={address}",
        "-m",
        "lightkit.train",
        *(shlex.quote(argument) for argument in job.arguments),
    ]


def line(job: Job, *, host: str, address: str, interface: str, node_rank: int, run_id: str) -> str:
    """The one line for one node."""
    variables = " ".join(f"{name}={shlex.quote(value)}" for name, value in environment(interface).items())
    words = torchrun(job, host=host, address=address, is_host=str(int(node_rank == 0)), run_id=shlex.quote(run_id))
    return f"{variables} {' '.join(words)}"


def script(job: Job, *, host: str, is_host: str, run_id: str, patience: int | None = None) -> str:
    """Lines of the shell that do the same on whichever node they run: it finds out its own interface and address.

    With patience, it waits for the first node, and the job for all of them, so many seconds.
    """
    options = f" --interface={job.interface}" if job.interface else ""
    options += f" --wait --timeout={patience}" if patience else ""
    variables = " ".join(f"{name}={value}" for name, value in environment('"$interface"').items())
    first, *words = torchrun(job, host=host, address='"$address"', is_host=is_host, run_id=run_id, patience=patience)
    options_end = words.index("-m")
    command = " \\\n  ".join([first, *words[:options_end], " ".join(words[options_end:])])
    return (
        f'found=$(python -m lightkit.launch address --endpoint="{host}:{job.port}"{options})\n'
        'read -r interface address <<< "$found"\n'
        f"export {variables}\n"
        f"exec {command}\n"
    )
