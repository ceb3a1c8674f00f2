"""FuseKernels beside copies, compilers, other trainers, callbacks, threads and processes."""

from __future__ import annotations

import _thread
import copy
import io
import os
import threading
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from fused import Watch, each, weights
from lightning.pytorch.callbacks import Callback
from plain import Plain, batches, make, trainer
from support.commands import run_python
from torch import nn
from torch.utils.checkpoint import checkpoint

import lightkit
from lightkit.callbacks import FuseKernels
from lightkit.capture import is_captured

pytestmark = pytest.mark.filterwarnings("ignore:.*(does not have many workers|lower value for log_every|GPU available)")


def test_deepcopy_and_pickle_during_the_fit(calls):
    """Copies of the module from within a fit are complete, torch's, and run after it."""
    copies = []

    class Copy(Callback):
        def on_train_epoch_end(self, trainer, module):
            copies.append(copy.deepcopy(module))
            file = io.BytesIO()
            torch.save(module.loss, file)
            assert b"lightkit" not in file.getvalue()

    module = make(loss=nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0])))
    trainer(FuseKernels(), Copy()).fit(module, batches())
    count = len(calls)
    trainer().fit(copies[0], batches())
    assert len(calls) == count and type(copies[0].loss) is nn.CrossEntropyLoss
    torch.testing.assert_close(copies[1].loss.weight, module.loss.weight)


def test_copies_of_a_captured_module_are_torchs():
    """Copies, pickles, hyperparameters of a checkpoint and traces are torch's."""

    seen = []

    class Copy(Callback):
        def on_train_epoch_end(self, trainer, module):
            assert is_captured(module.features) and type(module.features) is nn.Sequential
            file = io.BytesIO()
            torch.save(module.features, file)
            traced = torch.jit.trace(module.features, torch.zeros(1, 1, 8, 8))
            seen.append((type(copy.deepcopy(module.features)), b"lightkit" in file.getvalue(), str(traced.graph)))

    class Convolutional(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.features = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2))

        def training_step(self, batch, index):
            return self.features(batch[0]).sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(4, 1, 8, 8)), batch_size=2)
    trainer(FuseKernels(), Copy(), max_epochs=1).fit(Convolutional(), data)
    ((kind, names_lightkit, graph),) = seen
    assert kind is nn.Sequential and not names_lightkit and "lightkit::" not in graph


def test_compiled_submodules_stay_torchs(calls):
    """A loss in a compiled submodule is torch's in the graph and in the report; a loss outside is not."""

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)
            self.criterion = nn.CrossEntropyLoss()

        def forward(self, inputs, labels):
            logits = self.layer(inputs)
            return self.criterion(logits, labels) + F.cross_entropy(logits, labels), logits

    class Compiled(Plain):
        def __init__(self):
            super().__init__()
            self.network = torch.compile(Network(), backend="aot_eager", fullgraph=True)

        def training_step(self, batch, batch_idx):
            loss, logits = self.network(*batch)
            return loss + self.loss(logits, batch[1])

    callback, plain, fused = FuseKernels(), make(Compiled), make(Compiled)
    trainer().fit(plain, batches())
    trainer(callback).fit(fused, batches())
    assert len(calls) == 10
    for name in ("network", "network._orig_mod.criterion"):
        assert each(callback, name).reason == "it is under torch.compile, whose graphs stay torch's"
    torch.testing.assert_close(weights(fused), weights(plain))


def test_compiled_lightning_module(calls):
    """A LightningModule under torch.compile trains as before; its losses stay torch's."""
    callback, plain, fused = FuseKernels(), make(loss=nn.CrossEntropyLoss()), make(loss=nn.CrossEntropyLoss())
    trainer().fit(plain, batches())
    trainer(callback).fit(torch.compile(fused, backend="aot_eager"), batches())
    assert each(callback, "loss").reason == "it is under torch.compile, whose graphs stay torch's"
    torch.testing.assert_close(weights(fused), weights(plain))


def test_nested_trainers(calls):
    """A trainer within a callback of another may have the same callback; the outer run continues unchanged."""
    shared, watch = FuseKernels(), Watch()

    class Inner(Callback):
        def on_train_epoch_end(self, *_):
            trainer(shared, max_epochs=1).fit(make(), batches())

    trainer(shared, Inner(), watch).fit(make(), batches())
    assert len(calls) == 20 and watch.converted == {True}


def test_two_callbacks_in_one_trainer(calls):
    """The second callback finds nothing to replace and changes nothing."""

    class Second(FuseKernels):
        pass

    first, second = FuseKernels(), Second()
    trainer(first, second).fit(make(), batches())
    assert len(calls) == 10
    assert each(second, "optimizers[0]").reason == "it is on lightkit's kernels already"


def test_other_threads_keep_torchs(calls):
    """Another thread computes with torch's function while a trainer runs."""
    values = []

    class Aside(Callback):
        def on_train_batch_start(self, *_):
            if not values:
                thread = threading.Thread(target=lambda: values.append(F.cross_entropy(logits, labels)))
                thread.start()
                thread.join()

    logits, labels = torch.randn(5, 3), torch.tensor([0, 1, 2, 1, 0])
    trainer(FuseKernels(), Aside()).fit(make(), batches())
    assert len(calls) == 10 and set(calls) == {threading.get_ident()}
    assert torch.equal(values[0], F.cross_entropy(logits, labels))


def test_threads_of_autograd(calls):
    """Autograd's threads, which recompute checkpointed losses for a GPU, have the same kernel."""

    class Aside(Callback):
        def on_train_start(self, *_):
            done = threading.Event()

            def compute():
                F.cross_entropy(torch.randn(5, 3), torch.tensor([0, 1, 2, 1, 0]))
                done.set()

            _thread.start_new_thread(compute, ())
            assert done.wait(60)

    trainer(FuseKernels(), Aside()).fit(make(), batches())
    assert len(calls) == 11 and len(set(calls)) == 2


def test_checkpointed_losses(calls):
    """The recomputed loss comes from the same kernel as in the forward pass."""

    def loss(logits, labels):
        # Backward recomputes the result of the exponential, and thereby the loss.
        return checkpoint(lambda logits: F.cross_entropy(logits, labels).exp(), logits, use_reentrant=False)

    plain, fused = make(loss=loss), make(loss=loss)
    trainer().fit(plain, batches())
    trainer(FuseKernels()).fit(fused, batches())
    assert len(calls) == 20
    torch.testing.assert_close(weights(fused), weights(plain))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "ddp_spawn"])
def test_two_processes(tmp_path, strategy):
    """Each of two data-parallel processes replaces and restores; the weights are torch's."""
    script = tmp_path / "train.py"
    script.write_text(_TWO_PROCESSES)
    path = os.pathsep.join([str(Path(lightkit.__file__).parents[1]), str(Path(__file__).parent)])
    result = run_python(script, strategy, tmp_path, environment={"PYTHONPATH": path}, status=0)
    # The first process reports once.
    assert (result.stdout + result.stderr).count("optimizers[0] (torch.optim.SGD): replaced by") == 1
    torch.testing.assert_close(*(torch.load(tmp_path / f"{fuse}.pt") for fuse in (False, True)))


_TWO_PROCESSES = """
import sys
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from multiprocessing.util import Finalize
from plain import Plain, batches, make, trainer
from lightkit.callbacks import FuseKernels
from lightkit.optim.convert import is_converted


class Check(Callback):
    def __init__(self, fuse):
        self.fuse = fuse

    def on_train_batch_end(self, trainer, *_):
        assert is_converted(trainer.optimizers[0]) == self.fuse
        assert trainer.world_size == 2

    def on_fit_end(self, *_):
        # Lightning leaves the group to the end of the interpreter, where gloo's threads now and then abort it.
        Finalize(None, destroy, exitpriority=1)


def destroy():
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    strategy, directory = sys.argv[1:]
    code = F.cross_entropy.__code__
    for fuse in (False, True):
        runner = trainer(*[FuseKernels()] * fuse, Check(fuse), strategy=strategy, devices=2)
        module = make()
        runner.fit(module, batches())
        assert F.cross_entropy.__code__ is code
        if runner.global_rank == 0:
            torch.save(module.state_dict(), f"{directory}/{fuse}.pt")
"""
