"""A batch script for SLURM that runs torchrun in one task on each node."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from lightkit.errors import ConfigError
from lightkit.launch.launch_spec import LaunchSpec
from lightkit.launch.torchrun import node_script

# Seconds for the nodes to come to the check: all of them load torch before, from one file system.
_CHECK_TIMEOUT = 120


@dataclass(frozen=True)
class Slurm:
    """The settings of SLURM.

    Args:
        gpus: the number of GPUs of each node; 0 requests none.
        cpus: the number of CPUs of each node; None for SLURM's default.
        time: the time limit in SLURM's format; None for that of the partition.
        partition: the partition; None for SLURM's default.
        setup: a command of bash that the script runs first, on the first node, such as the activation of an
            environment; None for none. The programs on all nodes inherit the variables that it exports.

    Raises:
        ConfigError: a value is out of range.
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


def batch_script(spec: LaunchSpec, slurm: Slurm) -> str:
    """Returns the batch script of a job, which ``sbatch`` takes."""
    options = {
        "job-name": spec.name,
        "nodes": spec.nodes,
        "ntasks-per-node": 1,
        "gpus-per-node": slurm.gpus or None,
        "cpus-per-task": slurm.cpus,
        "time": slurm.time,
        "partition": slurm.partition,
        "output": f"{spec.name}-%j.log",
        # A requeued job appends to its log.
        "open-mode": "append",
    }
    lines = ["#!/bin/bash", *(f"#SBATCH --{name}={value}" for name, value in options.items() if value is not None)]
    # A requeued job has the same id, and continues its run.
    lines += ["#SBATCH --requeue"]
    if spec.is_elastic:
        lines += ["#SBATCH --no-kill"]
    lines += [""]
    if slurm.setup:
        # Before `set -u`: conda and modules use variables that are not set.
        lines += [slurm.setup]
    lines += ["set -euo pipefail"]
    if slurm.cpus is not None:
        lines += [
            "# Since SLURM 22.05 srun does not inherit it from sbatch.",
            f"export SRUN_CPUS_PER_TASK={slurm.cpus}",
        ]
    lines += [
        "# The first node holds the rendezvous.",
        'nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")',
        "export first=${nodes%%$'\\n'*}",
        "",
    ]
    if not spec.is_elastic:
        # An elastic job starts without a missing node, which would fail the check.
        interface = f" --interface={spec.interface}" if spec.interface else ""
        lines += [
            "# Reports faults of the network, for which the job would wait.",
            f'srun python -m lightkit.launch check --nodes={spec.nodes} --endpoint="$first:{spec.port}" '
            f"--timeout={_CHECK_TIMEOUT}{interface}",
            "",
        ]
    node = node_script(spec, host="$first", is_host="$((SLURM_NODEID == 0))", run_id="$SLURM_JOB_ID")
    keep = " --no-kill --kill-on-bad-exit=0" if spec.is_elastic else ""
    lines += [f"srun{keep} bash -euo pipefail -c {shlex.quote(node)}", ""]
    return "\n".join(lines)
