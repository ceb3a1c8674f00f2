"""Measures time and accuracy of the documented job beside what a user would run instead.

    python benchmarks/cnn_job.py [--batch 32] [--epochs 5] [--keras-python PYTHON] [--only NAME ...]

Each contender of cnn_contenders.py trains in a process of its own on the 60,000 images of Fashion-MNIST. They take
turns, an epoch each, so that a drift of the machine meets all of them; the others wait without using the processor. An
epoch counts from its first batch until the next could begin, checkpoints included. Keras needs TensorFlow, which may be
in another environment: --keras-python names its interpreter. On a machine with a GPU all contenders train there, and
the plain loops keep their images there.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from cnn_contenders import CONTENDERS, images
from rows import append
from timing import median

HERE = Path(__file__).parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Contenders that make sense on the other kind of device alone.
LEFT_OUT = {"cpu": ["compiled_loop", "lightkit_without_graphs"], "cuda": ["keras"]}


class Worker:
    """The process of a contender."""

    def __init__(self, name: str, python: str, batch: int, epochs: int, data: Path) -> None:
        self.seconds: list[float] = []
        self.accuracy: float | None = None
        self._process = subprocess.Popen(
            [python, str(HERE / "cnn_contenders.py"), name, "--batch", str(batch), "--epochs", str(epochs)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "CNN_JOB_DATA": str(data), "CNN_JOB_DEVICE": DEVICE},
        )
        self.alive = True

    def begin(self) -> None:
        """Waits until the contender is ready to train."""
        self.alive = self._advance()

    def turn(self) -> None:
        """Lets the contender train one epoch."""
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        self.alive = self._advance()

    def _advance(self) -> bool:
        """Reads what the contender prints; returns True when it is ready for a turn, False when it has ended."""
        for line in self._process.stdout:
            words = json.loads(line)
            if "seconds" in words:
                self.seconds.append(words["seconds"])
            if "accuracy" in words:
                self.accuracy = words["accuracy"]
            if "ready" in words:
                return True
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--keras-python", help="an interpreter that has tensorflow; default: Keras is left out")
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, help="these contenders")
    options = parser.parse_args()
    left_out = LEFT_OUT[DEVICE] + ([] if options.keras_python else ["keras"])
    names = options.only or [name for name in CONTENDERS if name not in left_out]
    with tempfile.TemporaryDirectory() as directory:
        data = Path(directory) / "data.npz"
        x, y, test_x, test_y = images()
        np.savez(data, x=x, y=y, test_x=test_x, test_y=test_y)
        workers = {}
        for name in names:
            python = options.keras_python if name == "keras" else sys.executable
            workers[name] = Worker(name, python, options.batch, options.epochs, data)
        for worker in workers.values():
            worker.begin()
        while any(worker.alive for worker in workers.values()):
            for name, worker in workers.items():
                if worker.alive:
                    worker.turn()
                    shown = f"{worker.seconds[-1]:.2f} s" if worker.seconds else "failed"
                    print(f"{name}: {shown}", flush=True)
    rows = []
    for name, worker in workers.items():
        if worker.accuracy is None:
            print(f"{name} did not come to its end")
            continue
        row = {"batch": options.batch, "what": name}
        row["microseconds_per_image"] = round(median(worker.seconds) / len(y) * 1e6, 1)
        for peer in ("keras", "lightning", "loop"):
            # Of epochs that followed each other, which a drift changes less than the times.
            pairs = zip(workers[peer].seconds, worker.seconds, strict=True) if peer in workers else ()
            row[f"times_{peer}"] = round(median([a / b for a, b in pairs]), 2) if peer in workers else ""
        row |= {"accuracy": worker.accuracy, "n": len(worker.seconds)}
        rows.append(row)
        print(row)
    print(f"appended to {append('cnn_job', rows)}")


if __name__ == "__main__":
    main()
