"""Scenarios of a user's script in two processes: ``python scenarios.py DIRECTORY`` runs a small training for each.

The first Trainer starts the second process, as Lightning does. Each rank writes its outcomes to a file of the
directory, for the tests.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from support.two_processes import Module, Two, fit, loader, uneven
from torch.nn.parallel import DistributedDataParallel

from lightkit.callbacks import LeanLoop
from lightkit.strategies import DiLoCo, LocalSGD


class Thawing(Module):
    """A module that trains its first layer from the second epoch on."""

    def setup(self, stage):
        self.net[0].requires_grad_(False)

    def on_train_epoch_start(self):
        self.net[0].requires_grad_(self.current_epoch > 0)


class Wrapped(Module):
    """A module that wraps its network in DistributedDataParallel itself."""

    def configure_model(self):
        self.net = DistributedDataParallel(self.net)


def main(directory: Path) -> None:
    alone = {"train": uneven}
    results = {
        "stock": fit("ddp"),
        "data_parallel": fit("data_parallel"),
        "data_parallel_fp16": fit("data_parallel_fp16"),
        "data_parallel_bf16": fit("data_parallel_bf16"),
        "data_parallel_powersgd": fit("data_parallel_powersgd", max_epochs=12),
        "data_parallel, 12 epochs": fit("data_parallel", max_epochs=12),
        "plain data_parallel": fit("data_parallel", module=Module(momentum=0)),
        "plain local_sgd of period 1": fit(LocalSGD(period=1), module=Module(momentum=0)),
        "local_sgd": fit(LocalSGD(period=3), validate=True),
        "local_sgd by name": fit("local_sgd", train=loader),
        "diloco": fit(DiLoCo(period=3)),
        "diloco as local_sgd": fit(DiLoCo(period=3, outer_lr=1.0, outer_momentum=0.0), validate=True),
        "norm": fit(LocalSGD(period=3), module=Module(norm=True)),
        "accumulate": fit(LocalSGD(period=2), accumulate_grad_batches=2),
        "two optimizers": fit(LocalSGD(period=3), module=Two(), validate=True),
        "two optimizers, diloco": fit(DiLoCo(period=3), module=Two(), validate=True),
        "thawing": fit("data_parallel", module=Thawing(momentum=0), max_epochs=3),
        "thawing, lean": fit("data_parallel_bf16", module=Thawing(), max_epochs=3, callbacks=[LeanLoop()]),
        "uneven": fit(LocalSGD(period=3), validate=True, **alone),
        "uneven diloco": fit(DiLoCo(period=2), validate=True, **alone),
        "uneven data_parallel": fit("data_parallel", **alone),
        "uneven max_steps": fit("local_sgd", max_steps=5, **alone),
        "validation within": fit(LocalSGD(period=3), validate=True, val_check_interval=2),
        # No average precedes the validation of one worker and the end of the other.
        "uneven validation within": fit(LocalSGD(period=100), validate=True, val_check_interval=4, **alone),
        "sync_batchnorm": fit("local_sgd", module=Module(norm=True), sync_batchnorm=True),
        "wrapped": fit("local_sgd", module=Wrapped()),
        "whole": fit(DiLoCo(period=3), directory / "whole", every=4),
        "resumed": fit(DiLoCo(period=3), directory / "resumed", every=4, ckpt_path=directory / "whole" / "step=8.ckpt"),
        "from one device": fit("local_sgd", ckpt_path=directory / "one.ckpt", max_epochs=3),
    }
    torch.save(results, directory / f"rank{os.environ.get('LOCAL_RANK', 0)}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
