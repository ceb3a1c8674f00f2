"""Scenarios with a parameter server in two processes: ``python parameter_server_scenarios.py DIRECTORY``."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from pathlib import Path

import torch
from lightning.pytorch.callbacks import Callback
from support.trainers import bare_trainer
from support.two_processes import Module, Two, dealt, fit, loader

from lightkit.optim import SGD
from lightkit.strategies import ParameterServer


class Scheduled(Module):
    """A module whose learning rate changes in every step."""

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Fused(Module):
    """A module with lightkit's optimizer, which clips gradients and averages weights."""

    def configure_optimizers(self):
        return SGD(self.parameters(), lr=0.1, momentum=0.9, max_grad_norm=0.2, ema_decay=0.9)


class Uneven(Module):
    """A module whose second worker is slower."""

    def training_step(self, batch, batch_idx):
        time.sleep(0.02 * self.global_rank)
        return super().training_step(batch, batch_idx)


class Fails(Callback):
    """A callback that raises an error once, at the third batch."""

    has_failed = False

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 2 and not self.has_failed:
            self.has_failed = True
            raise RuntimeError("once")


def again():
    """Runs a training that fails, and another one by the same Trainer."""
    trainer = bare_trainer(Fails(), devices=2, strategy="parameter_server", max_epochs=2)
    with contextlib.suppress(RuntimeError):
        trainer.fit(Module(), dealt(trainer.global_rank, 2))
    module = Module()
    trainer.fit(module, dealt(trainer.global_rank, 2))
    return {"state": module.state_dict()}


class Quasi(Module):
    """A module whose optimizer evaluates the model several times in a step."""

    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters())


def main(directory: Path) -> None:
    whole, resumed = directory / "whole", directory / "resumed"
    results = {
        "stock": fit("ddp"),
        "stock, clipped": fit("ddp", gradient_clip_val=0.2),
        "stock, scheduled": fit("ddp", module=Scheduled()),
        "stock, manual": fit("ddp_find_unused_parameters_true", module=Two()),
        "sync": fit("parameter_server"),
        "two servers": fit(ParameterServer(servers=2), validate=True),
        "clipped": fit(ParameterServer(servers=2), gradient_clip_val=0.2),
        "fused": fit(ParameterServer(servers=2), module=Fused()),
        "scheduled": fit("parameter_server", module=Scheduled()),
        "manual": fit(ParameterServer(servers=2), module=Two()),
        "manual, async": fit(ParameterServer("async", servers=2), module=Two()),
        "accumulated": fit("parameter_server", accumulate_grad_batches=7),
        "loader": fit("parameter_server", train=loader),
        "async": fit("parameter_server_async", validate=True),
        "bounded": fit(ParameterServer(mode="bounded", staleness=1, compression="topk", fraction=0.5)),
        "saved last": fit("parameter_server_async", directory / "last", module=Uneven(), every=14),
        "again": again(),
        "lbfgs": fit("parameter_server", module=Quasi()),
        "whole": fit("parameter_server", whole, every=4),
        "resumed": fit("parameter_server", resumed, every=4, ckpt_path=whole / "step=8.ckpt"),
        "from one device": fit("parameter_server", ckpt_path=directory / "one.ckpt", max_epochs=3),
    }
    torch.save(results, directory / f"rank{os.environ.get('LOCAL_RANK', 0)}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
