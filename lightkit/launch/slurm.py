"""A batch script for SLURM: one task a node, which is torchrun's."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from lightkit.errors import ConfigError
from lightkit.launch.job import Job, script

# Seconds in which the nodes must have come to the check: each first loads torch, all of them from one file system.
_CHECK = 120


@dataclass(frozen=True)
class Slurm:
    """What SLURM alone asks for.

    Args:
        gpus: on each node.
        cpus: on each node; None for SLURM's own choice.
        time: the limit, as SLURM writes it; None for that of the partition.
        partition: None for SLURM's own choice.
        setup: a command that the script runs first, on the first node, such as one that activates an environment: the
            programs on all nodes inherit its variables.
    """

    gpus: int = 0
    cpus: int | None = None
    time: str | None = None
    partition: str | None = None
    setup: str | None = None

    def __post_init__(self) -> None:
        if self.gpus < 0:
            raise ConfigError(f"--gpus {self.gpus}: expected 0 or more")
        if self.cpus is not None and self.cpus < 1:
            raise ConfigError(f"--cpus {self.cpus}: expected at least 1")
        for value in (self.time, self.partition):
            if value is not None and any(character.isspace() for character in value):
                raise ConfigError(f"{value!r}: expected one word, as sbatch takes it")


def batch_script(job: Job, slurm: Slurm) -> str:
    """The script, for ``sbatch``."""
    options = {
        "job-name": job.name,
        "nodes": job.nodes,
        "ntasks-per-node": 1,
        "gpus-per-node": slurm.gpus or None,
        "cpus-per-task": slurm.cpus,
        "time": slurm.time,
        "partition": slurm.partition,
        "output": f"{job.name}-%j.log",
        # What is written before and after a requeue is one log.
        "open-mode": "append",
    }
    lines = ["#!/bin/bash", *(f"#SBATCH --{name}={value}" for name, value in options.items() if value is not None)]
    # Under the same id, which a requeued job keeps, it goes on with its run.
    lines += ["#SBATCH --requeue"]
    if job.is_elastic:
        lines += ["#SBATCH --no-kill"]
    lines += [""]
    if slurm.setup:
        # Before bash is made strict: what conda and modules do there uses variables that are not set.
        lines += [slurm.setup]
    lines += ["set -euo pipefail"]
    if slurm.cpus is not None:
        lines += [
            "# Since SLURM 22.05 srun does not take it over from sbatch.",
            f"export SRUN_CPUS_PER_TASK={slurm.cpus}",
        ]
    lines += [
        "# The first node holds the rendezvous.",
        'nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")',
        "export first=${nodes%%$'\\n'*}",
        "",
    ]
    if not job.is_elastic:
        # With a node missing, an elastic job is to go on.
        interface = f" --interface={job.interface}" if job.interface else ""
        lines += [
            "# Says what is wrong with the network, instead of a job that waits.",
            f'srun python -m lightkit.launch check --nodes={job.nodes} --endpoint="$first:{job.port}" '
            f"--timeout={_CHECK}{interface}",
            "",
        ]
    node = script(job, host="$first", is_host="$((SLURM_NODEID == 0))", run_id="$SLURM_JOB_ID")
    keep = " --no-kill --kill-on-bad-exit=0" if job.is_elastic else ""
    lines += [f"srun{keep} bash -euo pipefail -c {shlex.quote(node)}", ""]
    return "\n".join(lines)
