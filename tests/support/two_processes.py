"""Small trainings in two processes, and what each rank has of them, as scripts of tests run them."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightkit.data import TensorBatches
from support.trainers import bare_trainer

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
    options = {"max_epochs": 2, "enable_checkpointing": directory is not None, **options}
    trainer = bare_trainer(*callbacks, devices=2, strategy=strategy, **options)
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
