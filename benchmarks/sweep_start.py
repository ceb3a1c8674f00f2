"""Measures the start of a job: forked, in the process of a sweep, and in a process of its own.

    python benchmarks/sweep_start.py [--rounds 5]

A job has started when `lightkit.app.training.train` is entered; start_clock/sitecustomize.py records that time and
returns from the function at once. The three ways take turns: a command with one job, and sweeps of four jobs by either
launcher. A forked job counts from the fork, a command from the start of its process, and a job in the process of the
sweep from the end of the previous job, so that it includes no imports.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rows import append
from timing import median

ROOT = Path(__file__).parents[1]
JOB = ["+experiment=cnn"]
SWEEP = ["-m", "seed=0,1,2,3"]
COMMANDS = {
    "fresh process": JOB,
    "basic launcher": [*JOB, *SWEEP],
    "forked": [*JOB, "hydra/launcher=fork", *SWEEP],
}


def starts(arguments: list[str]) -> list[dict[str, Any]]:
    """Returns what the clock recorded of each job: seconds, seconds of processor time, MiB of its own."""
    with tempfile.TemporaryDirectory() as directory:
        clock = Path(directory) / "clock.jsonl"
        path = [str(ROOT / "benchmarks" / "start_clock"), str(ROOT), os.environ.get("PYTHONPATH", "")]
        subprocess.run(
            [sys.executable, "-m", "lightkit.train", *arguments],
            cwd=directory,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path)), "START_CLOCK": str(clock)},
            stdout=subprocess.DEVNULL,
            check=True,
        )
        jobs = [json.loads(line) for line in clock.read_text().splitlines()]
    later = [{**job, "seconds": job["since"][0], "cpu_seconds": job["since"][1]} for job in jobs if job["since"]]
    return later or jobs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    found: dict[str, list[dict[str, Any]]] = {what: [] for what in COMMANDS}
    # The first round is not measured: it brings files into the memory of the system.
    for number in range(options.rounds + 1):
        for what, arguments in COMMANDS.items():
            jobs = starts(arguments)
            if number > 0:
                found[what] += jobs
    medians = {
        what: {key: median([job[key] for job in jobs]) for key in ("seconds", "cpu_seconds", "own_mib")}
        for what, jobs in found.items()
    }
    rows = []
    for what, values in medians.items():
        rows.append({"what": what, **{key: round(value, 3) for key, value in values.items()}})
        for key in ("seconds", "cpu_seconds"):
            rows[-1][f"share_of_fresh_{key}"] = round(values[key] / medians["fresh process"][key], 4)
        rows[-1]["n"] = len(found[what])
        print(rows[-1])
    print(f"appended to {append('sweep_start', rows)}")


if __name__ == "__main__":
    main()
