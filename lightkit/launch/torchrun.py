"""The torchrun command of a node: as a line for a known node, and as a script that any node can run."""

from __future__ import annotations

import shlex

from lightkit.launch.launch_spec import LaunchSpec

# Seconds that an elastic job with its smallest number of nodes waits for another node.
_LAST_CALL_TIMEOUT = 10


def environment(interface: str) -> dict[str, str]:
    """Returns the variables of the environment that torchrun needs, by name.

    Args:
        interface: the network interface of the node: its name, or shell text that expands to it.
    """
    return {
        # Without an interface, gloo publishes the address of the machine's own name, which may be loopback.
        "GLOO_SOCKET_IFNAME": interface,
        "NCCL_SOCKET_IFNAME": interface,
        # A restart needs a new store: the old one has the addresses of processes that are gone.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }


def torchrun_words(
    spec: LaunchSpec, *, host: str, address: str, is_host: str, run_id: str, join_timeout: int | None = None
) -> list[str]:
    """Returns the words of the torchrun command of a node, for the shell.

    ``host``, ``address``, ``is_host`` and ``run_id`` are put into the command unquoted, so that they may be shell text
    that expands to another value on each node.

    Args:
        spec: the job.
        host: the name or the address of the first node.
        address: the address of this node.
        is_host: ``1`` on the first node, ``0`` on the others.
        run_id: an id of the job: the same on all nodes, and different from the ids of other jobs.
        join_timeout: the seconds in which all nodes must join; None for torchrun's default of ten minutes.
    """
    nodes = f"{spec.min_nodes}:{spec.nodes}" if spec.is_elastic else str(spec.nodes)
    # is_host is explicit: torchrun would compare the host with the machine's own names, and may find no match.
    settings = f"is_host={is_host}" + (f",last_call_timeout={_LAST_CALL_TIMEOUT}" if spec.is_elastic else "")
    settings += f",join_timeout={join_timeout}" if join_timeout else ""
    return [
        "torchrun",
        f"--nnodes={nodes}",
        f"--nproc-per-node={spec.processes}",
        f"--max-restarts={spec.max_restarts}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={host}:{spec.port}",
        f"--rdzv-id={run_id}",
        f"--rdzv-conf={settings}",
        f"--local-addr={address}",
        "-m",
        "lightkit.train",
        *(shlex.quote(argument) for argument in spec.arguments),
    ]


def command_line(spec: LaunchSpec, *, host: str, address: str, interface: str, node_rank: int, run_id: str) -> str:
    """Returns a shell command in one line that starts the job on one node.

    Args:
        spec: the job.
        host: the name or the address of the first node.
        address: the address of this node.
        interface: the name of the network interface of this node.
        node_rank: the rank of this node.
        run_id: an id of the job: see `torchrun_words`.
    """
    variables = " ".join(f"{name}={shlex.quote(value)}" for name, value in environment(interface).items())
    is_host = str(int(node_rank == 0))
    words = torchrun_words(spec, host=host, address=address, is_host=is_host, run_id=shlex.quote(run_id))
    return f"{variables} {' '.join(words)}"


def node_script(spec: LaunchSpec, *, host: str, is_host: str, run_id: str, join_timeout: int | None = None) -> str:
    """Returns shell commands that start the job on any node; they find the interface and the address of the node.

    Args:
        spec: the job.
        host: the name or the address of the first node, as shell text.
        is_host: shell text that expands to 1 on the first node and to 0 on the others.
        run_id: an id of the job, as shell text: see `torchrun_words`.
        join_timeout: the seconds for which a node waits for the first node, and in which all nodes must join; None does
            not wait for the first node, and takes torchrun's default for the join.
    """
    options = f" --interface={spec.interface}" if spec.interface else ""
    options += f" --wait --timeout={join_timeout}" if join_timeout else ""
    variables = " ".join(f"{name}={value}" for name, value in environment('"$interface"').items())
    first, *words = torchrun_words(
        spec, host=host, address='"$address"', is_host=is_host, run_id=run_id, join_timeout=join_timeout
    )
    options_end = words.index("-m")
    command = " \\\n  ".join([first, *words[:options_end], " ".join(words[options_end:])])
    return (
        f'found=$(python -m lightkit.launch address --endpoint="{host}:{spec.port}"{options})\n'
        'read -r interface address <<< "$found"\n'
        f"export {variables}\n"
        f"exec {command}\n"
    )
