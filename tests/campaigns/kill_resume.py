"""Does a training that is killed, and goes on, end as if nothing had happened?

    python tests/campaigns/kill_resume.py [--seed 0] [--kills 50] [--write]

Small jobs of `lightkit.train` (one run, a sweep by Hydra's sweeper, a sweep by Optuna) are ended by SIGKILL at random
moments and started again with ``ckpt_path=last``, some of them several times. In the end weights, ``metrics.csv``, the
figures of the test and what a sweep found best must be those of the job that nobody killed; every file must be whole,
and nothing half-written may be left. With ``--write`` each kill becomes a row of benchmarks/results/kill_resume.csv.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml

# Loaded once: a job is a process that is forked from here, and begins where another has spent its first seconds.
import lightkit.app.training  # noqa: F401
from lightkit.app.report import figures  # noqa: F401
from lightkit.checkpoints import load_checkpoint
from lightkit.train import main as train

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "kill_resume.csv"

JOB = [
    *("+experiment=cnn", "logger=csv", "data.batch_size=100", "trainer.max_epochs=4", "trainer.limit_train_batches=6"),
    *("trainer.log_every_n_steps=2", "trainer.accelerator=cpu", "~callbacks.throughput"),
]
KINDS = {
    "run": JOB,
    "sweep": [*JOB, "trainer.max_epochs=2", "-m", "seed=0,1"],
    "optuna": [
        *(*JOB, "trainer.max_epochs=2", "hydra/sweeper=optuna", "hydra.sweeper.n_trials=3", "hydra.sweeper.n_jobs=1"),
        *("+hydra.sweeper.sampler.seed=1", "-m", "optim.lr=tag(log,interval(1e-4,1e-2))"),
    ],
}

# Figures that are of the clock.
CLOCK = ("per_second", "matmul_rate", "wall_seconds", "(ms)")


def start(arguments: list[str], directory: Path) -> int:
    """Starts ``lightkit.train`` in a process of its own; returns the process's id."""
    directory.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    status = 1
    try:
        os.chdir(directory)
        log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.argv = ["train", *arguments]
        torch.set_num_threads(1)
        status = train()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status or 0)


def run(arguments: list[str], directory: Path, seconds: float | None = None) -> int | None:
    """Runs a job to its end, or kills it after so long; returns its status, or None if it was killed."""
    pid, end = start(arguments, directory), time.monotonic() + (seconds or 600)
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def results(directory: Path) -> list[Path]:
    """Returns the directories that the job's figures are in: of its last run, or of the jobs of its last sweep."""
    places = sorted((directory / "runs" / "cnn").iterdir())
    if places[-1].name.startswith("sweep_"):
        return sorted(path for path in places[0].iterdir() if path.is_dir())
    return places[-1:]


def outcome(directory: Path) -> list[dict[str, Any]]:
    """Returns all of a finished job that must not depend on whether it was killed."""
    found = []
    for place in results(directory):
        assert (place / "report.html").stat().st_size > 10_000
        rows = list(csv.DictReader(open(place / "metrics.csv", newline="")))
        found.append(
            {
                "weights": load_checkpoint(place / "checkpoints" / "last.ckpt")["state_dict"],
                "best": load_checkpoint(place / "checkpoints" / "best.ckpt")["state_dict"],
                "metrics": {k: v for k, v in json.loads((place / "metrics.json").read_text()).items() if fixed(k)},
                "rows": [{k: v for k, v in row.items() if v and fixed(k)} for row in rows],
                "best_of_sweep": read_yaml(place.parent / "optimization_results.yaml"),
            }
        )
    return found


def fixed(name: str) -> bool:
    return not any(part in name for part in CLOCK)


def read_yaml(path: Path) -> Any:
    return yaml.safe_load(path.read_text()) if path.exists() else None


def difference(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> str | None:
    """Returns what is not as it is without kills, or None."""
    if len(ours) != len(theirs):
        return f"{len(ours)} jobs instead of {len(theirs)}"
    for one, other in zip(ours, theirs, strict=True):
        for part in ("weights", "best"):
            if any(not torch.equal(one[part][key], other[part][key]) for key in other[part]):
                return f"other {part}"
        for part in ("rows", "metrics", "best_of_sweep"):
            if one[part] != other[part]:
                return f"other {part}: {one[part]} instead of {other[part]}"
    return None


def damage(directory: Path) -> str | None:
    """Returns what a kill has left that is not whole, or None."""
    for path in directory.rglob("*"):
        if path.suffix in (".json", ".yaml") and path.name[0] != "." and path.is_file():
            # Hydra writes these in place; each of its starts writes them anew.
            if path.name not in ("multirun.yaml", "optimization_results.yaml") and not path.read_text().strip():
                return f"{path} is empty"
        if path.suffix == ".ckpt" and path.name[0] != ".":
            load_checkpoint(path)
    return None


def where(directory: Path) -> str:
    """Says how far the job had come that was killed."""
    if not (directory / "runs").is_dir():
        return "before its directory"
    places = results(directory)
    place = places[-1] if places else directory
    checkpoints = {path.name: load_checkpoint(path)["epoch"] + 1 for path in place.glob("checkpoints/*.ckpt")}
    if (place / "report.html").exists():
        stage = "after the report"
    elif (place / "metrics.json").exists():
        stage = "in the test or the report"
    elif checkpoints:
        stage = f"in training, {', '.join(f'{name} of epoch {epoch}' for name, epoch in sorted(checkpoints.items()))}"
    else:
        stage = "before the first checkpoint"
    leftover = "; a half-written file" if list(place.rglob(".*.????????")) else ""
    return (f"job {place.name}, " if place.parent.name.startswith("sweep_") else "") + stage + leftover


def attempt(kind: str, chance: random.Random, seconds: float, most: int, reference: Any) -> list[dict[str, Any]]:
    """Kills a job again and again until it comes to its end; returns a row for each kill."""
    directory = Path(tempfile.mkdtemp(prefix=f"kill_{kind}_"))
    rows, arguments, problem = [], KINDS[kind], None
    planned = min(most, chance.choice((1, 1, 2, 3)))
    while True:
        after = chance.uniform(0.05, seconds) if len(rows) < planned else None
        status = run(arguments, directory, after)
        if status is None:
            rows.append({"kind": kind, "seconds": round(after, 2), "killed": where(directory)})
            problem = problem or damage(directory)
            arguments = [*KINDS[kind], "ckpt_path=last"]
            continue
        if status == 0:
            break
        last = (directory / "log").read_text().splitlines()[-1]
        # Killed before it had anything to go on from: a person then leaves the word out.
        if "ckpt_path=last" not in arguments or not ("no last.ckpt" in last or "but no checkpoint to go on" in last):
            problem = f"ended with status {status}: {last}"
            break
        arguments = KINDS[kind]
    problem = problem or difference(outcome(directory), reference)
    left = [str(path) for place in results(directory) for path in place.rglob(".*.????????")]
    problem = problem or (f"left {left}" if left else None)
    for row in rows:
        row["outcome"] = problem or "as without the kill"
    if problem is None:
        shutil.rmtree(directory)
    else:
        print(f"{kind}: {problem}; see {directory}")
    return rows


def commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=10"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    chance = random.Random(arguments.seed)
    known: dict[str, tuple[float, Any]] = {}
    for kind in KINDS:
        directory, began = Path(tempfile.mkdtemp(prefix=f"whole_{kind}_")), time.monotonic()
        assert run(KINDS[kind], directory) == 0, (directory / "log").read_text()
        known[kind] = time.monotonic() - began, outcome(directory)
        print(f"{kind}: {known[kind][0]:.1f} s without a kill", flush=True)
        shutil.rmtree(directory)
    rows: list[dict[str, Any]] = []
    while len(rows) < arguments.kills:
        kind = chance.choice(("run", "run", "run", "sweep", "optuna"))
        rows += attempt(kind, chance, known[kind][0], arguments.kills - len(rows), known[kind][1])
        print(
            f"{len(rows)} kills; the last one {rows[-1]['killed']}: {rows[-1]['outcome']}" if rows else "", flush=True
        )
    bad = sum(row["outcome"] != "as without the kill" for row in rows)
    print(f"seed {arguments.seed}: {len(rows)} kills, {bad} of jobs that did not end as they should")
    if arguments.write:
        facts = {"date": datetime.date.today().isoformat(), "commit": commit(), "seed": arguments.seed}
        complete = [{**facts, "kill": number, **row} for number, row in enumerate(rows, start=1)]
        fresh = not RESULTS.exists()
        with open(RESULTS, "a", newline="") as file:
            writer = csv.DictWriter(file, list(complete[0]))
            if fresh:
                writer.writeheader()
            writer.writerows(complete)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
