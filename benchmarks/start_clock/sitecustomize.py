"""Makes `lightkit.app.training.train` say when it is entered, and return at once; for benchmarks/sweep_start.py.

Python imports this module at its start where its folder is in PYTHONPATH. A line of JSON for each job goes to the file
that START_CLOCK names.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from importlib.abc import MetaPathFinder
from pathlib import Path


def age() -> float:
    """Returns the seconds since this process was started or forked, by the kernel's account in hundredths."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


class Clock(MetaPathFinder):
    """Finds `lightkit.app.training` as others do, and replaces its `train` once it is loaded."""

    def __init__(self) -> None:
        self._left: tuple[float, float] | None = None

    def find_spec(self, name, path, target=None):
        if name != "lightkit.app.training":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module) -> None:
            execute(module)
            module.train = self.train

        spec.loader.exec_module = exec_module
        return spec

    def train(self, config) -> dict[str, float]:
        """Notes the age and the processor time of this process, and both since the job before if it had one."""
        seconds, cpu = age(), time.process_time()
        before, self._left = self._left, None
        facts = {"process": os.getpid(), "seconds": seconds, "cpu_seconds": cpu}
        facts["since"] = None if before is None else [seconds - before[0], cpu - before[1]]
        memory = Path("/proc/self/smaps_rollup").read_text().splitlines()
        facts["own_mib"] = sum(int(line.split()[1]) for line in memory if line.startswith("Private_")) / 1024
        with open(os.environ["START_CLOCK"], "a") as file:
            file.write(json.dumps(facts) + "\n")
        self._left = age(), time.process_time()
        return {}


if "START_CLOCK" in os.environ:
    sys.meta_path.insert(0, Clock())
