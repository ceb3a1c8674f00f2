"""Measures images a second of the documented CNN on a crowded machine, beside processes that spin.

    python benchmarks/crowded.py --neighbours 0 1 2 4 8 --rounds 3

Every contender trains in a process of its own for a few seconds, beside the spinning neighbours; the contenders take
turns. With k neighbours on c cores, a process of c threads has its fair share when it is (k + c) / c times as slow.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator

BATCH = 32
EPOCH = 32
CONTENDERS = ("lightkit", "torch")


class Batches:
    """Epochs of batches, one of them to warm up; `is_over` tells when they have taken the given seconds."""

    def __init__(self, seconds: float) -> None:
        import torch

        torch.manual_seed(0)
        self._images = torch.rand(EPOCH * BATCH, 1, 28, 28)
        self._labels = torch.randint(0, 10, (EPOCH * BATCH,))
        self._seconds = seconds
        self._started: float | None = None
        self._count = 0
        self.rate = 0.0

    def __len__(self) -> int:
        return EPOCH

    def __iter__(self) -> Iterator:
        for first in range(0, EPOCH * BATCH, BATCH):
            yield self._images[first : first + BATCH], self._labels[first : first + BATCH]

    def is_over(self) -> bool:
        """Records the end of an epoch, and returns True if it was the last one."""
        now = time.perf_counter()
        if self._started is None:
            self._started = now
            return False
        self._count += EPOCH * BATCH
        self.rate = self._count / (now - self._started)
        return now - self._started >= self._seconds


def lightkit(batches: Batches) -> None:
    """Trains with a Trainer and the callbacks of `lightkit.train`."""
    import lightning.pytorch as pl

    from benchmarks.cnn_contenders import torch_cnn
    from lightkit.callbacks import FuseKernels, LeanLoop
    from lightkit.memory import keep_freed_memory
    from lightkit.nn import CrossEntropyLoss
    from lightkit.optim import Adam

    class Task(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.loss = torch_cnn(), CrossEntropyLoss()

        def training_step(self, batch, index):
            return self.loss(self.model(batch[0]), batch[1])

        def configure_optimizers(self):
            return Adam(self.parameters())

    class Clock(pl.Callback):
        def on_train_epoch_end(self, trainer, module):
            trainer.should_stop = batches.is_over()

    keep_freed_memory()
    off = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    callbacks = [LeanLoop(), FuseKernels(), Clock()]
    pl.Trainer(max_epochs=-1, accelerator="cpu", callbacks=callbacks, **off).fit(Task(), batches)


def torch(batches: Batches) -> None:
    """Trains with a plain PyTorch loop."""
    import torch
    from torch.nn.functional import cross_entropy

    from benchmarks.cnn_contenders import torch_cnn

    model = torch_cnn()
    optimizer = torch.optim.Adam(model.parameters())
    while not batches.is_over():
        for images, labels in batches:
            optimizer.zero_grad()
            cross_entropy(model(images), labels).backward()
            optimizer.step()


def contend(name: str, seconds: float) -> None:
    """Trains in this process, and prints the images a second."""
    batches = Batches(seconds)
    {"lightkit": lightkit, "torch": torch}[name](batches)
    print(json.dumps(batches.rate))


def measure(name: str, seconds: float, neighbours: int) -> float:
    """Returns images a second of a contender in a process of its own, beside spinning ones."""
    # They end by themselves, should this process be killed.
    spin = "import os\nparent = os.getppid()\nwhile os.getppid() == parent: sum(range(10**6))"
    spinning = [subprocess.Popen([sys.executable, "-c", spin]) for _ in range(neighbours)]
    try:
        command = [sys.executable, "-m", "benchmarks.crowded", "--contend", name, "--seconds", str(seconds)]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    finally:
        for process in spinning:
            process.kill()
            process.wait()
    return float(said.split()[-1])


def main() -> None:
    """Measures, prints a table and appends the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--neighbours", type=int, nargs="+", default=[0, 1, 2, 4, 8])
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=CONTENDERS)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--note", default="", help="what is different this time")
    parser.add_argument("--contend", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contend:
        contend(options.contend, options.seconds)
        return
    rates = {(n, k): [] for k in options.neighbours for n in options.contenders}
    for _ in range(options.rounds):
        for name, neighbours in rates:
            rates[name, neighbours].append(measure(name, options.seconds, neighbours))
    from benchmarks.rows import append

    cores = os.cpu_count() or 1
    rows = []
    for (name, neighbours), found in rates.items():
        alone = statistics.median(rates.get((name, 0), found))
        slower, fair = alone / statistics.median(found), (neighbours + cores) / cores
        rows.append(
            {
                "contender": name,
                "neighbours": neighbours,
                "images_per_second": round(statistics.median(found)),
                "times_slower": round(slower, 2),
                "fair": fair,
                "n": len(found),
                "note": options.note,
            }
        )
        print(f"{name:10} {neighbours} neighbours: {rows[-1]['images_per_second']:7,} images/s, {slower:.2f} ({fair})")
    append("crowded", rows)


if __name__ == "__main__":
    main()
