"""What is wrong with a job's network, out of what its nodes have said: one line a fault, with what to do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from lightkit.launch import addresses
from lightkit.launch.facts import Facts

# Seconds by which clocks may differ. torchrun compares the times that nodes wrote with its own clock, and gives a node
# up that was not heard of for 15.
_CLOCK = 5.0


def before_connecting(facts: list[Facts], host: str) -> Iterator[str]:
    """Faults that can be told from what each node knows of itself."""
    for node in facts:
        yield from _address_faults(node, host)
        yield from _variable_faults(node)
    first = facts[0]
    for node in facts[1:]:
        loopback = any(map(addresses.is_loopback, [*node.endpoint, *first.endpoint]))
        if set(node.endpoint) != set(first.endpoint) and not loopback:
            yield (
                f"{host} is {', '.join(node.endpoint)} on node {node.rank} and {', '.join(first.endpoint)} on node 0: "
                "mend its name service or /etc/hosts, or pass the address as the endpoint"
            )
    for package in first.versions:
        yield from _different({node.rank: node.versions[package] for node in facts}, package)
    yield from _different_gpus(facts)
    for address, count in Counter(node.address for node in facts if not addresses.is_loopback(node.address)).items():
        if count > 1:
            ranks = [str(node.rank) for node in facts if node.address == address]
            yield (
                f"nodes {' and '.join(ranks)} have the same address {address}: start the command once a node, and let "
                "each machine have an address of its own"
            )


def of_connections(facts: list[Facts]) -> Iterator[str]:
    """Faults of the ways between nodes, and of clocks."""
    by_rank = {node.rank: node for node in facts}
    for node in facts:
        for other, reason in node.unreachable.items():
            target = by_rank[int(other)]
            yield (
                f"node {node.rank} ({node.address}) does not reach node {other} ({target.address}:{target.port}): "
                f"{reason}; let node {other} take connections from it on every TCP port, as gloo and NCCL choose "
                "theirs anew each time"
            )
        if node.clock is not None and abs(node.clock) > _CLOCK:
            direction = "ahead of" if node.clock > 0 else "behind"
            yield (
                f"the clock of node {node.rank} is {abs(node.clock):.0f} s {direction} node 0's: torchrun would take "
                "nodes for lost; set the clocks by NTP"
            )


def of_all_reduce(facts: list[Facts]) -> Iterator[str]:
    """Faults of gloo itself."""
    for node in facts:
        if node.error is not None:
            yield (
                f"gloo failed on node {node.rank} though every port can be reached: {node.error}; name the interface "
                "by --interface, here and in the job"
            )


def _address_faults(node: Facts, host: str) -> Iterator[str]:
    several = node.nodes > 1
    # Debian lets a machine's own name be loopback for itself: with an interface named, that keeps nobody away.
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


def _variable_faults(node: Facts) -> Iterator[str]:
    for name, value in node.variables.items():
        words = [word for word in value.removeprefix("=").split(",") if word]
        if not name.endswith("SOCKET_IFNAME") or not words:
            continue
        if not name.startswith("NCCL"):
            # Each of them is opened.
            is_good = set(words) <= set(node.interfaces)
        elif value.startswith("="):
            is_good = not set(words).isdisjoint(node.interfaces)
        else:
            # Beginnings of names; "^" before those that are left out.
            is_good = value.startswith("^") or any(have.startswith(tuple(words)) for have in node.interfaces)
        if not is_good:
            yield f"{name}={value} on node {node.rank} names no interface of it: set it to one of {_others(node)}"


def _others(node: Facts) -> str:
    return ", ".join(name for name in node.interfaces if name != "lo") or "those that it lacks"


def _different(values: dict[int, str], package: str) -> Iterator[str]:
    """The nodes that have another version than most."""
    usual, _ = Counter(values.values()).most_common(1)[0]
    for rank, value in values.items():
        if value != usual:
            yield f"{package} is {value} on node {rank} and {usual} on the others: install the same version everywhere"


def _different_gpus(facts: list[Facts]) -> Iterator[str]:
    usual, _ = Counter(node.gpus for node in facts).most_common(1)[0]
    for node in facts:
        if node.gpus != usual:
            yield (
                f"node {node.rank} has {node.gpus} GPUs and the others {usual}: every node must have as many; look at "
                "nvidia-smi and CUDA_VISIBLE_DEVICES there"
            )
