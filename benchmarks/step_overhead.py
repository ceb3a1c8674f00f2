"""Measures what Lightning's loop adds to a step, with and without `LeanLoop`, for a model of next to no work.

    python benchmarks/step_overhead.py [--steps 2000] [--rounds 5]

The model is linear with 16 inputs, batches of 32 lie ready in memory, and the optimizer is SGD. The loss is logged;
checkpoints and a progress bar are on, which is Lightning's default. Each round trains all contenders anew, one after
the other. The overhead is the time beyond "loop", the same in plain PyTorch. The script uses a GPU where there is one.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
import time
import warnings
from contextlib import contextmanager

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from rows import append
from timing import median, synchronize

from lightkit.callbacks import LeanLoop, Progress
from lightkit.data.batches import TensorBatches

BATCH = 32
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def data(steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    inputs, targets = (torch.randn(steps * BATCH, width, generator=generator) for width in (16, 1))
    return inputs.to(DEVICE), targets.to(DEVICE)


class Tiny(pl.LightningModule):
    """A linear model, whose step takes next to no time."""

    def __init__(self, logs: bool = True) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(16, 1)
        self.logs = logs

    def training_step(self, batch, batch_idx):
        loss = F.mse_loss(self.layer(batch[0]), batch[1])
        if self.logs:
            self.log("loss", loss, prog_bar=True, on_step=True, on_epoch=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def loop(steps: int) -> float:
    """Returns the seconds of a plain loop over the same batches."""
    torch.manual_seed(0)
    model = torch.nn.Linear(16, 1).to(DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    batches = TensorBatches(data(steps), BATCH, shuffle=True)
    started = time.perf_counter()
    for inputs, targets in batches:
        optimizer.zero_grad()
        F.mse_loss(model(inputs), targets).backward()
        optimizer.step()
    synchronize()
    return time.perf_counter() - started


class Clock(pl.Callback):
    """Measures the seconds of an epoch, its end included."""

    def on_train_epoch_start(self, trainer, pl_module):
        self.started = time.perf_counter()

    def on_train_end(self, trainer, pl_module):
        synchronize()
        self.seconds = time.perf_counter() - self.started


def lightning(steps: int, logs: bool = True, callbacks=(), **options) -> float:
    """Returns the seconds of an epoch in a Trainer."""
    clock = Clock()
    with tempfile.TemporaryDirectory() as directory, _silence():
        trainer = pl.Trainer(
            accelerator=DEVICE,
            devices=1,
            max_epochs=1,
            default_root_dir=directory,
            enable_model_summary=False,
            callbacks=[clock, *callbacks],
            **options,
        )
        trainer.fit(Tiny(logs), TensorBatches(data(steps), BATCH, shuffle=True))
    return clock.seconds


@contextmanager
def _silence():
    """Sends the output to /dev/null: progress bars are drawn as on a terminal, and nobody sees them."""
    out, err = os.dup(1), os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os.dup2(out, 1)
            os.dup2(err, 2)


BARE = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}

CONTENDERS = {
    "loop": loop,
    "lightning": lightning,
    "lightning, nothing on": lambda steps: lightning(steps, logs=False, **BARE),
    "lean loop": lambda steps: lightning(steps, callbacks=[LeanLoop()]),
    "lean loop, nothing on": lambda steps: lightning(steps, logs=False, callbacks=[LeanLoop()], **BARE),
    "lean loop, lightkit's bar": lambda steps: lightning(steps, callbacks=[LeanLoop(), Progress()]),
}
if DEVICE == "cuda":
    CONTENDERS["lean loop, graphs"] = lambda steps: lightning(steps, callbacks=[LeanLoop(cuda_graphs=True)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for contender in CONTENDERS.values():
        contender(50)
    seconds = {name: [] for name in CONTENDERS}
    for _ in range(options.rounds):
        for name, contender in CONTENDERS.items():
            seconds[name].append(contender(options.steps))
    rows = []
    for name, times in seconds.items():
        milliseconds = median(times) / options.steps * 1e3
        overhead = median([(a - b) / options.steps * 1e3 for a, b in zip(times, seconds["loop"], strict=True)])
        row = {"what": name, "milliseconds_a_step": round(milliseconds, 4), "above_the_loop": round(overhead, 4)}
        rows.append({**row, "steps": options.steps, "n": len(times)})
        print(row, flush=True)
    print(f"appended to {append('step_overhead', rows)}")


if __name__ == "__main__":
    main()
