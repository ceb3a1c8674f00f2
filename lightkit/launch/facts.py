"""What a node tells the others about itself in a check."""

from __future__ import annotations

import os
import platform
import socket
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version

from lightkit import __version__
from lightkit.errors import ConfigError
from lightkit.launch import addresses

# Variables that decide which way gloo and NCCL go; torchrun's processes inherit them.
VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "NCCL_IB_DISABLE", "NCCL_P2P_DISABLE", "TP_SOCKET_IFNAME")


@dataclass
class Facts:
    """One node, as it sees itself and the others.

    Args:
        rank: of the node.
        nodes: how many it was told there are.
        host: its name.
        interface: by which it reaches the first node.
        address: of that interface, which the others were asked to connect to.
        published: the address that gloo would publish.
        endpoint: the addresses that the endpoint's name stands for.
        interfaces: all it has.
        variables: those of `VARIABLES` that are set.
        versions: by package.
        gpus: how many.
        port: where it listens in the check.
        token: what it answers there.
        unreachable: by the other node's rank, why it was not reached.
        clock: seconds that its clock is ahead of the first node's; None if that is unknown.
        error: what went wrong in the all_reduce.
        milliseconds: of an all_reduce of one number.
        megabytes_per_second: of an all_reduce of many, counted as bytes reduced.
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
    clock: float | None = None
    error: str | None = None
    milliseconds: float | None = None
    megabytes_per_second: float | None = None


def collect(rank: int, nodes: int, endpoint: str, interface: str | None, seconds: float) -> Facts:
    """What this node knows before it has met the others.

    Raises:
        ConfigError: there is no such interface, or no way to the first node.
    """
    import torch

    have = addresses.interfaces()
    # It may name several, of which gloo publishes each.
    first = os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]
    # One that names nothing here is a fault that all nodes are to hear of.
    chosen = interface or (first if first in have else None)
    resolved = addresses.resolve(endpoint, seconds)
    name, address = addresses.interface_and_address(chosen, endpoint)
    return Facts(
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
    """What gloo takes without an interface: the machine's own name, else loopback."""
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
