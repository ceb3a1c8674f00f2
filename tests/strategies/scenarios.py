"""What a user's own script would do, in two processes: one small training a scenario, its outcome on each rank.

Run as ``python scenarios.py DIRECTORY``: the first Trainer starts the second process, as Lightning does it. Each
rank writes a file of what it has of each scenario, for the tests to look at.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from lightkit.callbacks import LeanLoop
from lightkit.data import TensorBatches
from lightkit.strategies import DiLoCo, LocalSGD

SAMPLES, BATCH = 56, 4


def samples() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(SAMPLES, 5, generator=generator)
    return inputs, (inputs.sum(1) > 0).long() + (inputs[:, 0] > 1).long()


def network(norm: bool = False) -> nn.Sequential:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8) if norm else nn.ReLU(), nn.Linear(8, 3))


class Module(pl.LightningModule):
    """Knows nothing of lightkit."""

    def __init__(self, momentum: float = 0.9, norm: bool = False) -> None:
        super().__init__()
        self.net = network(norm)
        self.momentum = momentum

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        weights = torch.cat([p.flatten() for p in self.parameters()])
        same = [torch.equal(weights, other) for other in self.all_gather(weights)]
        self.log("same", float(all(same)), sync_dist=True)
        self.log("loss", F.cross_entropy(self.net(batch[0]), batch[1]), sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=self.momentum)


class Two(Module):
    """Two networks with an optimizer each, stepped by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.other = network()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for net, optimizer in zip((self.net, self.other), self.optimizers(), strict=True):
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(net(batch[0]), batch[1]))
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(net.parameters(), lr=0.1) for net in (self.net, self.other)]


class Thawing(Module):
    """Trains its first layer from the second epoch on."""

    def setup(self, stage):
        self.net[0].requires_grad_(False)

    def on_train_epoch_start(self):
        self.net[0].requires_grad_(self.current_epoch > 0)


class Wrapped(Module):
    """Has brought its own data parallel wrapper."""

    def configure_model(self):
        self.net = DistributedDataParallel(self.net)


class Recorder(Callback):
    """Keeps the weights after each step, before which they may have been averaged."""

    def __init__(self) -> None:
        self.steps = []

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.steps.append(torch.cat([p.detach().flatten().clone() for p in pl_module.parameters()]))


def dealt(rank: int = 0, world_size: int = 1) -> TensorBatches:
    """Every ``world_size``-th sample; in the middle of an epoch it resumes where it was."""
    return TensorBatches(samples(), BATCH, rank=rank, world_size=world_size)


def uneven(rank: int, world_size: int) -> TensorBatches:
    """Seven batches for rank 0 and four for rank 1."""
    part = slice(0, 28) if rank == 0 else slice(28, 44)
    return TensorBatches([tensor[part] for tensor in samples()], BATCH)


def loader(*_: int) -> DataLoader:
    """As people have it: Lightning deals the samples out, in an order of its own."""
    return DataLoader(TensorDataset(*samples()), batch_size=BATCH)


def fit(
    strategy,
    directory=None,
    module=None,
    train=dealt,
    validate=False,
    ckpt_path=None,
    every=0,
    callbacks=(),
    **options,
):
    """Trains and returns what this rank has afterwards."""
    module = module or Module()
    recorder = Recorder()
    callbacks = [*callbacks, recorder]
    if directory is not None:
        callbacks.append(ModelCheckpoint(directory, save_top_k=-1, every_n_train_steps=every, filename="{step}"))
    nothing = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=strategy,
        callbacks=callbacks,
        enable_checkpointing=directory is not None,
        **{"max_epochs": 2, **nothing, **options},
    )
    val = loader() if validate else None
    try:
        trainer.fit(module, train(trainer.global_rank, trainer.world_size), val, ckpt_path=ckpt_path)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {
        "state": {name: value.clone() for name, value in module.state_dict().items()},
        "steps": recorder.steps,
        "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
        "communication": getattr(trainer.strategy, "communication", None),
        "optimizer": trainer.optimizers[0].state_dict(),
    }


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
        # Nothing averaged yet when the first of them comes to a validation and the other to its end.
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
