"""The report of one node in a check of the network: its interfaces, and the other nodes that it reaches."""

from __future__ import annotations

import os
import platform
import socket
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version

from lightkit import __version__
from lightkit.errors import ConfigError
from lightkit.launch import addresses

# Variables that choose the network of gloo and NCCL; torchrun's processes inherit them.
VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "NCCL_IB_DISABLE", "NCCL_P2P_DISABLE", "TP_SOCKET_IFNAME")


@dataclass
class NodeReport:
    """The report of one node.

    Args:
        rank: the rank of the node.
        nodes: the number of nodes that was given to the node.
        host: the host name of the node.
        interface: the interface by which the node reaches the first node.
        address: the address of that interface, to which the other nodes connect.
        published: the address that gloo would publish for the node.
        endpoint: the addresses to which the endpoint's name resolves on the node.
        interfaces: the names of all interfaces of the node.
        variables: the values of those of `VARIABLES` that are set on the node, by name.
        versions: the versions of Python, torch, Lightning and lightkit by package.
        gpus: the number of GPUs of the node.
        port: the port on which the node listens in the check.
        token: the token that the node sends to those that connect to this port.
        unreachable: the reasons why the node does not reach other nodes, by the rank of the other node.
        clock_offset: the seconds by which the clock of the node is ahead of the first node's clock; None if unknown.
        error: the error message of the all_reduce; None without an error.
        milliseconds: the time of an all_reduce of one number; None if it was not measured.
        megabytes_per_second: the bytes of a large tensor divided by the time of its all_reduce; None if that was not
            measured.
    """

    rank: int
    nodes: int
    host: str
    interface: str
    address: str
    published: str
    endpoint: list[str]
    interfaces: list[str]
    variables: dict[str, str]
    versions: dict[str, str]
    gpus: int
    port: int = 0
    token: str = ""
    unreachable: dict[str, str] = field(default_factory=dict)
    clock_offset: float | None = None
    error: str | None = None
    milliseconds: float | None = None
    megabytes_per_second: float | None = None


def report_self(rank: int, nodes: int, endpoint: str, interface: str | None, seconds: float) -> NodeReport:
    """Returns the report of this node before it has connected to the others.

    Args:
        rank: the rank of this node.
        nodes: the number of nodes.
        endpoint: the name or the address of the first node.
        interface: the interface of the job's network; None for the first interface in GLOO_SOCKET_IFNAME if this
            machine has it, else for the interface that leads to the endpoint.
        seconds: the time in seconds in which the name must resolve.

    Raises:
        ConfigError: the interface does not exist, the name does not resolve, or no route leads to the endpoint.
    """
    import torch

    have = addresses.interfaces()
    # The variable may name several interfaces, of which gloo publishes each.
    first = os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]
    # An unknown name is a fault, which all nodes report: it must not end the check here.
    chosen = interface or (first if first in have else None)
    resolved = addresses.resolve(endpoint, seconds)
    name, address = addresses.interface_and_address(chosen, endpoint)
    return NodeReport(
        rank=rank,
        nodes=nodes,
        host=socket.gethostname(),
        interface=name,
        address=address,
        published=address if chosen else _address_of_own_name(),
        endpoint=resolved,
        interfaces=list(have),
        variables={name: os.environ[name] for name in VARIABLES if name in os.environ},
        versions={
            "python": platform.python_version(),
            "torch": torch.__version__,
            "lightning": _version("lightning"),
            "lightkit": __version__,
        },
        gpus=torch.cuda.device_count(),
    )


def _address_of_own_name() -> str:
    """Returns the address that gloo publishes without an interface: that of the machine's own name, else loopback."""
    try:
        found = addresses.resolve(socket.gethostname())[0]
    except ConfigError:
        return "127.0.0.1"
    return found if addresses.is_own(found) else "127.0.0.1"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
