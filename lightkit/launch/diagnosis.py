"""Diagnosis of a job's network from the reports of its nodes: one sentence for each fault, with the remedy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from lightkit.launch import addresses
from lightkit.launch.node_report import NodeReport

# Seconds by which clocks may differ. torchrun compares the timestamps of other nodes with its own clock, and drops a
# node whose timestamp is 15 seconds old.
_MAX_CLOCK_OFFSET = 5.0


def before_connecting(reports: list[NodeReport], host: str) -> Iterator[str]:
    """Yields the faults that the reports show before any node has connected to another one.

    They concern addresses, interfaces, variables of the environment, versions of packages and numbers of GPUs.

    Args:
        reports: the reports of all nodes by rank.
        host: the host of the endpoint, as the user wrote it.
    """
    for node in reports:
        yield from _address_faults(node, host)
        yield from _variable_faults(node)
    first = reports[0]
    for node in reports[1:]:
        loopback = any(map(addresses.is_loopback, [*node.endpoint, *first.endpoint]))
        if set(node.endpoint) != set(first.endpoint) and not loopback:
            yield (
                f"{host} is {', '.join(node.endpoint)} on node {node.rank} and {', '.join(first.endpoint)} on node 0: "
                "mend its name service or /etc/hosts, or pass the address as the endpoint"
            )
    for package in first.versions:
        yield from _different({node.rank: node.versions[package] for node in reports}, package)
    yield from _different_gpus(reports)
    for address, count in Counter(node.address for node in reports if not addresses.is_loopback(node.address)).items():
        if count > 1:
            ranks = [str(node.rank) for node in reports if node.address == address]
            yield (
                f"nodes {' and '.join(ranks)} have the same address {address}: start the command once a node, and let "
                "each machine have an address of its own"
            )


def of_connections(reports: list[NodeReport]) -> Iterator[str]:
    """Yields a fault for each connection from one node to another that fails, and for each clock that is wrong."""
    by_rank = {node.rank: node for node in reports}
    for node in reports:
        for other, reason in node.unreachable.items():
            target = by_rank[int(other)]
            yield (
                f"node {node.rank} ({node.address}) does not reach node {other} ({target.address}:{target.port}): "
                f"{reason}; let node {other} accept connections from it on every TCP port: gloo and NCCL "
                "choose new ports each time"
            )
        if node.clock_offset is not None and abs(node.clock_offset) > _MAX_CLOCK_OFFSET:
            direction = "ahead of" if node.clock_offset > 0 else "behind"
            yield (
                f"the clock of node {node.rank} is {abs(node.clock_offset):.0f} s {direction} node 0's: torchrun would "
                "drop nodes; set the clocks by NTP"
            )


def of_all_reduce(reports: list[NodeReport]) -> Iterator[str]:
    """Yields a fault for each node on which gloo's all_reduce failed."""
    for node in reports:
        if node.error is not None:
            yield (
                f"gloo failed on node {node.rank} though every port can be reached: {node.error}; name the interface "
                "by --interface, here and in the job"
            )


def _address_faults(node: NodeReport, host: str) -> Iterator[str]:
    several = node.nodes > 1
    # On Debian a machine's own name is loopback for itself: that is harmless if an interface is named.
    if several and any(map(addresses.is_loopback, node.endpoint)) and addresses.is_loopback(node.address):
        yield (
            f"the endpoint {host} is {', '.join(node.endpoint)} on node {node.rank}, which no other machine can reach: "
            "pass --interface, or an address of node 0 in the network that the nodes share"
        )
    elif several and addresses.is_loopback(node.address):
        yield (
            f"node {node.rank} would be known by {node.address}, which no other machine can reach: pass --interface, "
            f"one of {_others(node)}"
        )
    elif several and addresses.is_loopback(node.published):
        yield (
            f"node {node.rank} would publish {node.published}, the address of its own name {node.host}, which no other "
            f"machine can reach: set GLOO_SOCKET_IFNAME={node.interface}, or pass --interface, here and in the job"
        )


def _variable_faults(node: NodeReport) -> Iterator[str]:
    for name, value in node.variables.items():
        words = [word for word in value.removeprefix("=").split(",") if word]
        if not name.endswith("SOCKET_IFNAME") or not words:
            continue
        if not name.startswith("NCCL"):
            # gloo opens each of them.
            is_good = set(words) <= set(node.interfaces)
        elif value.startswith("="):
            is_good = not set(words).isdisjoint(node.interfaces)
        else:
            # NCCL compares prefixes of names; "^" excludes them.
            is_good = value.startswith("^") or any(have.startswith(tuple(words)) for have in node.interfaces)
        if not is_good:
            yield f"{name}={value} on node {node.rank} names no interface of it: set it to one of {_others(node)}"


def _others(node: NodeReport) -> str:
    return ", ".join(name for name in node.interfaces if name != "lo") or "those that it lacks"


def _different(values: dict[int, str], package: str) -> Iterator[str]:
    """Yields a fault for each node whose version of ``package`` differs from the most frequent version.

    Args:
        values: the version by rank.
        package: the name of the package.
    """
    usual, _ = Counter(values.values()).most_common(1)[0]
    for rank, value in values.items():
        if value != usual:
            yield f"{package} is {value} on node {rank} and {usual} on the others: install the same version everywhere"


def _different_gpus(reports: list[NodeReport]) -> Iterator[str]:
    usual, _ = Counter(node.gpus for node in reports).most_common(1)[0]
    for node in reports:
        if node.gpus != usual:
            yield (
                f"node {node.rank} has {node.gpus} GPUs and the others {usual}: every node must have as many; look at "
                "nvidia-smi and CUDA_VISIBLE_DEVICES there"
            )
