"""``python -m lightkit.launch``: starts a job on several machines, or checks the network between them."""

from __future__ import annotations

import argparse
import os
import sys
import time
from typing import NoReturn

from rich.console import Console

from lightkit.errors import ConfigError, LightkitError
from lightkit.launch import addresses
from lightkit.launch.launch_spec import DEFAULT_PORT, LaunchSpec, parse_endpoint, parse_nodes
from lightkit.native.versions import add_version_option
from lightkit.runtime.command_process import run_as_process

_HELP = """Start a training on several machines, or check the network between them first.

  torchrun    print the command that starts the job on this machine
  slurm       print a batch script
  kubernetes  print a manifest
  check       find the faults that would make the job hang; run it on every machine at once (also --check)
  address     print this machine's interface and address, for the scripts
"""

# Variables of torchrun, SLURM and an Indexed Job of Kubernetes with the rank of the node and the number of nodes.
_RANK = ("GROUP_RANK", "SLURM_NODEID", "JOB_COMPLETION_INDEX")
_NODES = ("GROUP_WORLD_SIZE", "SLURM_NNODES", "SLURM_JOB_NUM_NODES")


def main(arguments: list[str] | None = None) -> int:
    """Runs a command of ``python -m lightkit.launch``.

    Args:
        arguments: the words of the command line; None for those of this process.

    Returns:
        The exit status: 0, or 1 after an error or if the check found faults.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    position = words.index("--") if "--" in words else len(words)
    own, rest = words[:position], words[position + 1 :]
    # --check may stand anywhere.
    if "--check" in own:
        own.remove("--check")
        own.insert(0, "check")
    options = _parser().parse_args(own)
    try:
        if rest and options.command in ("check", "address"):
            raise ConfigError(f"{options.command} starts nothing, and takes no arguments of lightkit.train")
        return {"check": _check, "address": _address}.get(options.command, _print)(options, rest)
    except LightkitError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lightkit.launch",
        description=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_version_option(parser)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--interface", help="interface between the nodes (default: the one that leads to node 0)")
    job = argparse.ArgumentParser(add_help=False, parents=[common])
    job.add_argument("--nodes", default="1", help="N, or MIN:MAX for a job that continues after a loss of nodes")
    job.add_argument("--processes", type=int, default=1, help="processes on each node, one for each device (1)")
    job.add_argument("--max-restarts", type=int, default=3, help="restarts after a failure (3)")
    job.add_argument("--name", default="lightkit", help="name of the job")

    line = _add(
        commands,
        "torchrun",
        [job],
        "Print a torchrun command for this machine; the training's arguments come after --.",
    )
    line.add_argument("--endpoint", required=True, help="HOST:PORT of node 0")
    line.add_argument("--node-rank", type=int, help="rank of this node; node 0 serves the rendezvous")
    line.add_argument("--id", required=True, help="id of the job, the same on all nodes")

    slurm = _add(commands, "slurm", [job], "Print a script for sbatch; the training's arguments come after --.")
    slurm.add_argument("--port", type=int, default=DEFAULT_PORT, help="port of the rendezvous")
    slurm.add_argument("--gpus", type=int, default=0, help="GPUs of each node")
    slurm.add_argument("--cpus", type=int, help="CPUs of each node")
    slurm.add_argument("--time", help="time limit in SLURM's format")
    slurm.add_argument("--partition", help="partition")
    slurm.add_argument("--setup", help="first command on the first node, such as '. .venv/bin/activate'")

    kubernetes = _add(
        commands, "kubernetes", [job], "Print a manifest for kubectl; the training's arguments come after --."
    )
    kubernetes.add_argument("--port", type=int, default=DEFAULT_PORT, help="port of the rendezvous")
    kubernetes.add_argument("--image", required=True, help="container image with lightkit installed")
    kubernetes.add_argument("--gpus", type=int, default=0, help="GPUs of each pod")
    kubernetes.add_argument("--volume-claim", help="claim on a volume that all pods share, for the runs")
    kubernetes.add_argument("--namespace", help="namespace (default: that of kubectl's context)")

    check = _add(commands, "check", [common], "Find faults of the network; run it on every node at once.")
    check.add_argument("--endpoint", help="HOST:PORT of node 0")
    check.add_argument("--nodes", type=int, help="number of nodes (default: that of torchrun or SLURM)")
    check.add_argument(
        "--node-rank", type=int, help="rank of this node (default: that of torchrun, SLURM or Kubernetes)"
    )
    check.add_argument("--timeout", type=float, default=30.0, help="seconds for all nodes to come (30)")

    address = _add(commands, "address", [common], "Print this machine's interface and address in the job's network.")
    address.add_argument("--endpoint", required=True, help="HOST:PORT of node 0")
    address.add_argument("--timeout", type=float, default=60.0, help="seconds for the host's name to resolve (60)")
    address.add_argument("--wait", action="store_true", help="wait until node 0 listens, for --timeout seconds at most")
    return parser


def _add(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    parents: list[argparse.ArgumentParser],
    text: str,
) -> argparse.ArgumentParser:
    return commands.add_parser(name, parents=parents, description=text, allow_abbrev=False)


def _from_environment(names: tuple[str, ...], option: str, given: int | None) -> int:
    if given is not None:
        return given
    for name in names:
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    raise ConfigError(f"{option} is missing, and none of {', '.join(names)} is set")


def _spec(options: argparse.Namespace, arguments: list[str], port: int) -> LaunchSpec:
    least, most = parse_nodes(options.nodes)
    return LaunchSpec(
        arguments=tuple(arguments),
        nodes=most,
        min_nodes=least,
        processes=options.processes,
        port=port,
        max_restarts=options.max_restarts,
        interface=options.interface,
        name=options.name,
    )


def _print(options: argparse.Namespace, arguments: list[str]) -> int:
    from lightkit.launch import kubernetes, slurm, torchrun

    if options.command == "torchrun":
        host, port = parse_endpoint(options.endpoint)
        spec = _spec(options, arguments, port)
        rank = _node_rank(options, spec.nodes)
        interface, address = addresses.interface_and_address(options.interface, host)
        if spec.nodes > 1:
            _reject_loopback(host, address)
        line = torchrun.command_line(
            spec, host=host, address=address, interface=interface, node_rank=rank, run_id=options.id
        )
        print(line)
    elif options.command == "slurm":
        settings = slurm.Slurm(options.gpus, options.cpus, options.time, options.partition, options.setup)
        print(slurm.batch_script(_spec(options, arguments, options.port), settings), end="")
    else:
        target = kubernetes.Kubernetes(options.image, options.gpus, options.volume_claim, options.namespace)
        print(kubernetes.manifest(_spec(options, arguments, options.port), target), end="")
    return 0


def _node_rank(options: argparse.Namespace, nodes: int) -> int:
    rank = 0 if nodes == 1 else _from_environment(_RANK, "--node-rank", options.node_rank)
    if not 0 <= rank < nodes:
        raise ConfigError(f"--node-rank {rank}: with {nodes} nodes it is from 0 to {nodes - 1}")
    return rank


def _reject_loopback(host: str, address: str) -> None:
    if addresses.is_loopback(address):
        raise ConfigError(
            f"this machine reaches {host} by {address}, where no other machine reaches it: pass --interface, or an "
            "endpoint in the network that the nodes share"
        )


def _address(options: argparse.Namespace, _: list[str]) -> int:
    host, port = parse_endpoint(options.endpoint)
    end = time.monotonic() + options.timeout
    interface, address = addresses.interface_and_address(options.interface, host, options.timeout)
    _reject_loopback(host, address)
    if options.wait and not addresses.is_own(addresses.resolve(host, end - time.monotonic())[0]):
        if (reason := addresses.wait_for(host, port, end)) is not None:
            raise ConfigError(f"node 0 did not listen at {host}:{port} within {options.timeout:g} s: {reason}")
    print(interface, address)
    return 0


def _check(options: argparse.Namespace, _: list[str]) -> int:
    # Before the import of torch, whose own errors about failed connections would only repeat the faults.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from lightkit.launch.check import CheckRendezvous, check, table

    if options.endpoint is None and "MASTER_ADDR" in os.environ and os.environ.get("LOCAL_RANK", "0") != "0":
        # Under torchrun one process of each node suffices.
        return 0
    nodes = _from_environment(_NODES, "--nodes", options.nodes)
    if nodes < 1:
        raise ConfigError(f"--nodes {nodes}: expected at least 1")
    rank = _node_rank(options, nodes)
    is_served = False
    if options.endpoint is not None:
        host, port = parse_endpoint(options.endpoint)
    elif "MASTER_ADDR" in os.environ and "MASTER_PORT" in os.environ:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        is_served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    else:
        raise ConfigError("--endpoint is missing: HOST:PORT of node 0")
    if options.timeout <= 0:
        raise ConfigError(f"--timeout {options.timeout:g}: expected seconds, more than 0")
    reports, faults = check(CheckRendezvous(host, port, rank, nodes, options.interface, options.timeout, is_served))
    # If the rank came from the environment, all nodes write to one log, which needs the table once.
    if rank == 0 or options.node_rank is not None:
        console = Console() if sys.stdout.isatty() else Console(width=160)
        console.print(table(reports))
        for fault in faults:
            print(f"fault: {fault}")
        print(f"{len(faults)} faults" if faults else "all is well", flush=True)
    return 1 if faults else 0


def command() -> NoReturn:
    """Runs `main` and ends the process with the exit status."""
    run_as_process(main)


if __name__ == "__main__":
    command()
