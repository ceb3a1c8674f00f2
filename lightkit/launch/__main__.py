"""``python -m lightkit.launch``: start a job on several machines, or check the network between them first."""

from __future__ import annotations

import argparse
import os
import sys
import time
from typing import NoReturn

from rich.console import Console

from lightkit.errors import ConfigError, LightkitError
from lightkit.launch import addresses
from lightkit.launch import job as jobs
from lightkit.runtime.command_process import run_as_process

_HELP = """Start a training on several machines, or check the network between them first.

  torchrun    print the command that starts the job's part on this machine
  slurm       print a batch script
  kubernetes  print a manifest
  check       on every machine at once: what would make the job hang (also --check)
  address     print this machine's interface and address, as the scripts need them
"""

# What tells a process its node and the number of nodes: torchrun, SLURM, an Indexed Job of Kubernetes.
_RANK = ("GROUP_RANK", "SLURM_NODEID", "JOB_COMPLETION_INDEX")
_NODES = ("GROUP_WORLD_SIZE", "SLURM_NNODES", "SLURM_JOB_NUM_NODES")


def main(arguments: list[str] | None = None) -> int:
    """Does what the command line says; returns the exit status: 0, or 1 after faults or one line on an error."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    place = words.index("--") if "--" in words else len(words)
    own, rest = words[:place], words[place + 1 :]
    # As an option it may stand anywhere.
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
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--interface", help="of the network between the nodes; else the one that leads to node 0")
    job = argparse.ArgumentParser(add_help=False, parents=[common])
    job.add_argument("--nodes", default="1", help="N, or MIN:MAX for a job that goes on when nodes are lost")
    job.add_argument("--processes", type=int, default=1, help="on each node, one for each device (1)")
    job.add_argument("--max-restarts", type=int, default=3, help="after a process has failed (3)")
    job.add_argument("--name", default="lightkit", help="of the job")

    line = _add(commands, "torchrun", [job], "a torchrun command for this machine; the training's arguments after --")
    line.add_argument("--endpoint", required=True, help="HOST:PORT of node 0")
    line.add_argument("--node-rank", type=int, help="of this node; 0 holds the rendezvous")
    line.add_argument("--id", required=True, help="the same on all nodes, another one for each job")

    slurm = _add(commands, "slurm", [job], "a script for sbatch; the training's arguments after --")
    slurm.add_argument("--port", type=int, default=jobs.DEFAULT_PORT, help="of the rendezvous")
    slurm.add_argument("--gpus", type=int, default=0, help="on each node")
    slurm.add_argument("--cpus", type=int, help="on each node")
    slurm.add_argument("--time", help="limit, as SLURM writes it")
    slurm.add_argument("--partition")
    slurm.add_argument("--setup", help="command that comes first, on the first node, as '. .venv/bin/activate'")

    kubernetes = _add(commands, "kubernetes", [job], "a manifest for kubectl; the training's arguments after --")
    kubernetes.add_argument("--port", type=int, default=jobs.DEFAULT_PORT, help="of the rendezvous")
    kubernetes.add_argument("--image", required=True, help="with lightkit in it")
    kubernetes.add_argument("--gpus", type=int, default=0, help="in each pod")
    kubernetes.add_argument("--volume-claim", help="on a volume that all pods share, for the runs")
    kubernetes.add_argument("--namespace")

    check = _add(commands, "check", [common], "what is wrong with the network; run it on every node at once")
    check.add_argument("--endpoint", help="HOST:PORT of node 0")
    check.add_argument("--nodes", type=int, help="how many there are (what torchrun or SLURM say)")
    check.add_argument("--node-rank", type=int, help="of this node (what torchrun, SLURM or Kubernetes say)")
    check.add_argument("--timeout", type=float, default=30.0, help="seconds in which all nodes must have come (30)")

    address = _add(commands, "address", [common], "this machine's interface and address in the job's network")
    address.add_argument("--endpoint", required=True, help="HOST:PORT of node 0")
    address.add_argument("--timeout", type=float, default=60.0, help="seconds for the host's name to be known (60)")
    address.add_argument("--wait", action="store_true", help="until node 0 listens there, in that time too")
    return parser


def _add(commands, name: str, parents: list[argparse.ArgumentParser], text: str) -> argparse.ArgumentParser:
    return commands.add_parser(name, parents=parents, description=text, allow_abbrev=False)


def _from_environment(names: tuple[str, ...], option: str, given: int | None) -> int:
    if given is not None:
        return given
    for name in names:
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    raise ConfigError(f"{option} is missing, and none of {', '.join(names)} says it")


def _job(options: argparse.Namespace, arguments: list[str], port: int) -> jobs.Job:
    least, most = jobs.parse_nodes(options.nodes)
    return jobs.Job(
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
    from lightkit.launch import kubernetes, slurm

    if options.command == "torchrun":
        host, port = jobs.parse_endpoint(options.endpoint)
        job = _job(options, arguments, port)
        rank = _node_rank(options, job.nodes)
        interface, address = addresses.interface_and_address(options.interface, host)
        if job.nodes > 1:
            _refuse_loopback(host, address)
        print(jobs.line(job, host=host, address=address, interface=interface, node_rank=rank, run_id=options.id))
    elif options.command == "slurm":
        settings = slurm.Slurm(options.gpus, options.cpus, options.time, options.partition, options.setup)
        print(slurm.batch_script(_job(options, arguments, options.port), settings), end="")
    else:
        target = kubernetes.Kubernetes(options.image, options.gpus, options.volume_claim, options.namespace)
        print(kubernetes.manifest(_job(options, arguments, options.port), target), end="")
    return 0


def _node_rank(options: argparse.Namespace, nodes: int) -> int:
    rank = 0 if nodes == 1 else _from_environment(_RANK, "--node-rank", options.node_rank)
    if not 0 <= rank < nodes:
        raise ConfigError(f"--node-rank {rank}: with {nodes} nodes it is from 0 to {nodes - 1}")
    return rank


def _refuse_loopback(host: str, address: str) -> None:
    if addresses.is_loopback(address):
        raise ConfigError(
            f"this machine reaches {host} by {address}, where no other machine reaches it: pass --interface, or an "
            "endpoint in the network that the nodes share"
        )


def _address(options: argparse.Namespace, _: list[str]) -> int:
    host, port = jobs.parse_endpoint(options.endpoint)
    end = time.monotonic() + options.timeout
    interface, address = addresses.interface_and_address(options.interface, host, options.timeout)
    _refuse_loopback(host, address)
    if options.wait and not addresses.is_own(addresses.resolve(host, end - time.monotonic())[0]):
        if (reason := addresses.wait_for(host, port, end)) is not None:
            raise ConfigError(f"node 0 did not listen at {host}:{port} within {options.timeout:g} s: {reason}")
    print(interface, address)
    return 0


def _check(options: argparse.Namespace, _: list[str]) -> int:
    # Before torch is loaded: its own words on connections that fail are ours to say.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from lightkit.launch.check import Meeting, check, table

    if options.endpoint is None and "MASTER_ADDR" in os.environ and os.environ.get("LOCAL_RANK", "0") != "0":
        # Under torchrun one process a node is enough.
        return 0
    nodes = _from_environment(_NODES, "--nodes", options.nodes)
    if nodes < 1:
        raise ConfigError(f"--nodes {nodes}: expected at least 1")
    rank = _node_rank(options, nodes)
    is_served = False
    if options.endpoint is not None:
        host, port = jobs.parse_endpoint(options.endpoint)
    elif "MASTER_ADDR" in os.environ and "MASTER_PORT" in os.environ:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        is_served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    else:
        raise ConfigError("--endpoint is missing: HOST:PORT of node 0")
    if options.timeout <= 0:
        raise ConfigError(f"--timeout {options.timeout:g}: expected seconds, more than 0")
    facts, faults = check(Meeting(host, port, rank, nodes, options.interface, options.timeout, is_served))
    # Where the number came with the job, all nodes write to one log, which needs it once.
    if rank == 0 or options.node_rank is not None:
        console = Console() if sys.stdout.isatty() else Console(width=160)
        console.print(table(facts))
        for fault in faults:
            print(f"fault: {fault}")
        print(f"{len(faults)} faults" if faults else "all is well", flush=True)
    return 1 if faults else 0


def command() -> NoReturn:
    """Runs `main` as a process of its own."""
    run_as_process(main)


if __name__ == "__main__":
    command()
