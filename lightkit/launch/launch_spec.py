"""The specification of a job on several machines, and the parsers of its options."""

from __future__ import annotations

import re
from dataclasses import dataclass

from lightkit.errors import ConfigError

# The port of torchrun's own rendezvous, where none is named.
DEFAULT_PORT = 29400

# The strictest rule is that of Kubernetes, which appends the node's index to the name.
_NAME = re.compile(r"[a-z]([a-z0-9-]{0,48}[a-z0-9])?")
_INTERFACE = re.compile(r"[A-Za-z0-9_.:@-]{1,15}")


@dataclass(frozen=True)
class LaunchSpec:
    """A training job on several nodes.

    Args:
        arguments: the arguments of ``lightkit.train``.
        nodes: the largest number of nodes.
        min_nodes: the smallest number of nodes with which the job runs; less than ``nodes`` if the job may continue
            after a loss of nodes.
        processes: the number of processes on each node.
        port: the port of the rendezvous on the first node.
        max_restarts: the number of times that torchrun restarts the processes after a failure.
        interface: the network interface between the nodes; None for the interface that leads to the first node.
        name: the name of the job.

    Raises:
        ConfigError: a value is out of range.
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
        """True if the job continues with fewer nodes than ``nodes``."""
        return self.min_nodes < self.nodes


def parse_nodes(text: str) -> tuple[int, int]:
    """Returns the smallest and the largest number of nodes that ``text`` names: ``N`` or ``MIN:MAX``.

    Raises:
        ConfigError: ``text`` has another form.
    """
    least, _, most = text.partition(":")
    try:
        return int(least), int(most or least)
    except ValueError:
        raise ConfigError(f"--nodes {text}: expected a number, or MIN:MAX") from None


def parse_endpoint(text: str) -> tuple[str, int]:
    """Returns the host and the port that ``text`` names: ``HOST`` with the port `DEFAULT_PORT`, or ``HOST:PORT``.

    Raises:
        ConfigError: ``text`` has another form, such as an IPv6 address, or the port is not from 1 to 65535.
    """
    match = re.fullmatch(r"(?P<host>[A-Za-z0-9_.-]+)(?::(?P<port>\d{1,5}))?", text)
    if match is None or not 0 < int(match["port"] or DEFAULT_PORT) < 65536:
        raise ConfigError(
            f"--endpoint {text}: expected HOST or HOST:PORT, of the first node, by its name or an address of IPv4"
        )
    return match["host"], int(match["port"] or DEFAULT_PORT)
