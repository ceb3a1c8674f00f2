"""Measures the rate, the traffic and the accuracy of each strategy.

    python benchmarks/strategies.py [--data mnist_5k] [--seeds 0 1 2] [--epochs 5] [--only NAME ...] [--note TEXT]

The command line trains the documented CNN, one job after the other: in one process with batches of 32, or in two with
batches of 16 and one thread each. The jobs of a seed follow each other, so that a drift of the machine meets all of
them. strategy=auto is Lightning's own data parallel training; it does not count bytes, and sends as many as lightkit's
without compression. Images a second are those of the training, all processes together; times_stock is the ratio to
Lightning's own of the same seed. The bytes are those that a process sends in a step, in a ring.
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

STOCK = "2 processes, Lightning's ddp"
ONE = ["data.batch_size=32"]
TWO = ["data.batch_size=16", "trainer.devices=2", "trainer.accelerator=cpu"]

CONTENDERS = {
    "1 process": ONE,
    "1 process, Lightning's loop": [*ONE, "~callbacks.lean_loop"],
    STOCK: [*TWO, "~callbacks.lean_loop"],
    "2 processes, Lightning's ddp, lean loop": TWO,
    "2 processes, ddp": [*TWO, "strategy=ddp"],
    "2 processes, ddp, fp16": [*TWO, "strategy=ddp", "strategy.compression=fp16"],
    "2 processes, ddp, powersgd": [*TWO, "strategy=ddp", "strategy.compression=powersgd"],
    "2 processes, local_sgd": [*TWO, "strategy=local_sgd"],
    "2 processes, diloco": [*TWO, "strategy=diloco"],
    "2 processes, parameter_server": [*TWO, "strategy=parameter_server"],
    "2 processes, parameter_server, bounded": [*TWO, "strategy=parameter_server", "strategy.mode=bounded"],
}


def job(arguments: list[str]) -> dict[str, Any]:
    """Runs a job, and returns its metrics."""
    # Lightning sets the number of threads: it divides the cores among the processes of a machine.
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, "-m", "lightkit.train", "+experiment=cnn", *arguments, "hydra.run.dir=out"]
        subprocess.run(command, cwd=directory, check=True, env=environment, stdout=subprocess.DEVNULL)
        return json.loads((Path(directory) / "out" / "metrics.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="mnist_5k", choices=["mnist_5k", "fashion_mnist"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), help="these contenders")
    parser.add_argument("--note", default="", help="put into the rows, such as what else was running")
    options = parser.parse_args()
    base = [f"data={options.data}", f"trainer.max_epochs={options.epochs}"]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in options.only}
    for seed in options.seeds:
        for name in options.only:
            found[name].append(job([*base, f"seed={seed}", *CONTENDERS[name]]))
            figures = found[name][-1]
            if "parameter_server" in name:
                # Each worker reports its own rate there, and has half of the data.
                figures["train/images_per_second"] *= 2
            rate, accuracy = figures["train/images_per_second"], figures["test/accuracy"]
            print(f"{name}, seed {seed}: {rate:,.0f} images a second, accuracy {accuracy:.4f}", flush=True)
    rows = []
    for name, runs in found.items():
        rates = [run["train/images_per_second"] for run in runs]
        stock = [run["train/images_per_second"] for run in found.get(STOCK, [])]
        row = {"data": options.data, "what": name, "images_per_second": round(median(rates))}
        row["times_stock"] = round(median([a / b for a, b in zip(rates, stock, strict=True)]), 2) if stock else ""
        sent = runs[0].get("communication/bytes_per_step")
        row["bytes_per_step"] = "" if sent is None else round(sent)
        row["accuracy"] = round(sum(run["test/accuracy"] for run in runs) / len(runs), 4)
        row |= {"epochs": options.epochs, "n": len(runs), "note": options.note}
        rows.append(row)
        print(row)
    print(f"appended to {append('strategies', rows)}")


if __name__ == "__main__":
    main()
