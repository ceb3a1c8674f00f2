"""The torchrun command of one node, as a line for a known node and as a script that runs on every node."""

from __future__ import annotations

import shlex

from lightkit.launch.launch_spec import LaunchSpec

# Seconds that an elastic job with its smallest number of nodes waits for another node.
_LAST_CALL_TIMEOUT = 10


def environment(interface: str) -> dict[str, str]:
    """Returns the environment of torchrun.

    Args:
        interface: the interface of the node, as text of the shell.
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
    """Returns the words of the torchrun command of one node; the values that differ between nodes are shell text.

    Args:
        spec: the job.
        host: the name or the address of the first node.
        address: the address of this node.
        is_host: 1 on the first node, 0 on the others.
        run_id: an id that is the same on all nodes, and another one for each job.
        join_timeout: seconds for all nodes to join; None for torchrun's ten minutes.
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
    """Returns the line of the shell that starts the job on one node; see `torchrun_words`."""
    variables = " ".join(f"{name}={shlex.quote(value)}" for name, value in environment(interface).items())
    is_host = str(int(node_rank == 0))
    words = torchrun_words(spec, host=host, address=address, is_host=is_host, run_id=shlex.quote(run_id))
    return f"{variables} {' '.join(words)}"


def node_script(spec: LaunchSpec, *, host: str, is_host: str, run_id: str, join_timeout: int | None = None) -> str:
    """Returns lines of the shell that start the job on any node, which finds its own interface and address.

    Args:
        spec: the job.
        host: the name or the address of the first node, as shell text.
        is_host: shell text that is 1 on the first node, 0 on the others.
        run_id: an id of the job, as shell text.
        join_timeout: seconds to wait for the first node, and for all nodes to join; None does not wait for the first
            node.
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
