"""Compresses where processes have weights of their own: ``python local_processes.py DIRECTORY`` runs the trainings."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import ModelParallelStrategy
from support.trainers import bare_trainer
from support.two_processes import Module, dealt, fit, uneven
from torch.distributed.fsdp import fully_shard

from lightkit.callbacks import LeanLoop
from lightkit.compress import Distil, Prune, Quantize, Sparsify
from lightkit.optim import SGD, Adam
from lightkit.strategies import DiLoCo, LocalSGD, ParameterServer


class Averaging(Module):
    """A module with lightkit's optimizer, which averages weights."""

    def configure_optimizers(self):
        return Adam(self.parameters(), lr=0.01, ema_decay=0.9)


class Sharded(Module):
    """A module whose layers are sharded over the processes."""

    def __init__(self, optimizer):
        super().__init__()
        self.optimizer = optimizer

    def configure_model(self):
        for layer in (self.net[0], self.net[2]):
            fully_shard(layer, mesh=self.device_mesh["data_parallel"])

    def configure_optimizers(self):
        return self.optimizer(self.parameters(), lr=0.1, momentum=0.9)


class Whole(Callback):
    """Gathers the sharded weights after each step, and saves a checkpoint.

    Args:
        path: the path of the checkpoint, which is saved after step 18; None for none.
    """

    def __init__(self, path):
        self.path, self.steps = path, []

    def on_train_batch_end(self, trainer, pl_module, *arguments):
        self.steps.append({name: p.detach().full_tensor() for name, p in pl_module.named_parameters()})
        if self.path is not None and trainer.global_step == 18:
            trainer.save_checkpoint(self.path)


class Violations(Callback):
    """Counts the masked weights that are not zero after each step, and the steps with masks.

    Args:
        sparsify: the callback that masks.
    """

    def __init__(self, sparsify):
        self.sparsify, self.nonzero, self.steps = sparsify, 0, 0

    def on_train_batch_end(self, trainer, pl_module, *arguments):
        self.steps += bool(self.sparsify.masks)
        for parameter, mask in self.sparsify.masks.items():
            self.nonzero += int((parameter[~mask] != 0).sum())


def masked(strategy, *arguments, callbacks=(), **options):
    """Returns what `fit` returns of a training with `Sparsify`, and the masks."""
    sparsify = Sparsify(0.7, start=0.3, end=0.7, rounds=3)
    violations = Violations(sparsify)
    # The strategies decide after the steps in which rounds are due, whatever the order of the callbacks.
    found = fit(strategy, *arguments, callbacks=[sparsify, violations, *callbacks], max_epochs=4, **options)
    masks = {sparsify._names[p]: mask for p, mask in sparsify.masks.items()}
    return {**found, "masks": masks, "violations": violations.nonzero, "masked_steps": violations.steps}


def sharded(ckpt_path=None, save=None, optimizer=torch.optim.SGD):
    """Trains on shards, and returns the whole weights after each step, and the masks."""
    sparsify, whole = Sparsify(0.7, start=0.3, end=0.7, rounds=3), Whole(save)
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    trainer = bare_trainer(sparsify, whole, devices=2, strategy=strategy, max_epochs=4, use_distributed_sampler=False)
    trainer.fit(Sharded(optimizer), dealt(), ckpt_path=ckpt_path)
    masks = {sparsify._names[p]: mask.full_tensor() for p, mask in sparsify.masks.items()}
    return {"steps": whole.steps, "masks": masks, "state": sparsify.state_dict()}


class Ranges(Callback):
    """Keeps the ranges of the layers' inputs after each step.

    Args:
        quantize: the callback that measures the ranges.
    """

    def __init__(self, quantize):
        self.quantize, self.steps = quantize, []

    def on_train_batch_end(self, trainer, pl_module, *arguments):
        self.steps.append([(q.scale, q.zero_point) for q in self.quantize._quantizers.values()])


def quantized(strategy, *arguments, **options):
    """Returns what `fit` returns of a training with `Quantize`, and the ranges after each step."""
    quantize = Quantize(8, "int8", start=0.3, batches=4)
    ranges = Ranges(quantize)
    found = fit(strategy, *arguments, callbacks=[quantize, ranges], max_epochs=4, validate=True, **options)
    return {**found, "ranges": ranges.steps}


def prune():
    return Prune(0.4, rounds=2, start=0.3, end=0.6, multiple=1)


def main(directory: Path) -> None:
    results = {
        "ddp": masked("ddp", validate=True),
        "local_sgd": masked(LocalSGD(period=3), validate=True),
        "local_sgd, lean": masked(LocalSGD(period=3), callbacks=[LeanLoop()]),
        "local_sgd, averages": masked(LocalSGD(period=3), module=Averaging()),
        "uneven": masked(LocalSGD(period=3), train=uneven, validate=True),
        "uneven diloco": masked(DiLoCo(period=2), train=uneven),
        "diloco": masked(DiLoCo(period=3), directory / "whole", every=6),
        "resumed": masked(
            DiLoCo(period=3), directory / "again", every=6, ckpt_path=directory / "whole" / "step=18.ckpt"
        ),
        "sync": masked("parameter_server", directory / "served", every=6, validate=True),
        "sync, resumed": masked(
            "parameter_server", directory / "served again", every=6, ckpt_path=directory / "served" / "step=18.ckpt"
        ),
        # Worker 0 has chosen masks after this step, and they go with its next push.
        "sync, resumed between": masked(
            "parameter_server", directory / "served more", every=6, ckpt_path=directory / "served" / "step=12.ckpt"
        ),
        "two servers": masked(ParameterServer(servers=2), module=Averaging(), callbacks=[LeanLoop()]),
        "async": masked("parameter_server_async", validate=True),
        "quantized": quantized(LocalSGD(period=3), directory / "ints", every=5),
        "quantized, resumed": quantized(
            LocalSGD(period=3), directory / "ints again", every=5, ckpt_path=directory / "ints" / "step=10.ckpt"
        ),
        "quantized diloco": quantized(DiLoCo(period=2)),
        "quantized uneven": quantized(LocalSGD(period=2), train=uneven),
        "quantized ddp": quantized("ddp", directory / "ddp", every=5),
        "quantized ddp, resumed": quantized(
            "ddp", directory / "ddp again", every=5, ckpt_path=directory / "ddp" / "step=10.ckpt"
        ),
        "pruned": fit(LocalSGD(period=3), callbacks=[prune(), LeanLoop()], validate=True, max_epochs=4),
        "pruned uneven": fit(LocalSGD(period=2), callbacks=[prune()], validate=True, train=uneven, max_epochs=4),
        "pruned diloco": fit(DiLoCo(period=3), directory / "p", callbacks=[prune()], every=3, max_epochs=4),
        "pruned diloco, resumed": fit(
            DiLoCo(period=3),
            directory / "p again",
            callbacks=[prune()],
            every=3,
            max_epochs=4,
            ckpt_path=directory / "p" / "step=12.ckpt",
        ),
        "sharded": sharded(save=directory / "sharded.ckpt"),
        "sharded, resumed": sharded(ckpt_path=directory / "sharded.ckpt"),
        "sharded, lightkit's": sharded(optimizer=SGD),
        # Last: an error leaves a worker in the middle of a rendezvous.
        "distilled": masked("parameter_server", callbacks=[Distil()]),
    }
    torch.save(results, directory / f"rank{os.environ.get('LOCAL_RANK', 0)}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
