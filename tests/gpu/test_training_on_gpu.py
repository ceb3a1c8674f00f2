"""Training on a GPU: the lean loop against Lightning's own, and the commands."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from support.commands import run
from support.trainers import bare_trainer
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, TensorDataset

from lightkit.callbacks import FuseKernels, LeanLoop
from lightkit.data.batches import TensorBatches
from lightkit.loops.cuda_graphs import CapturedPasses
from lightkit.optim import SGD, Adam
from lightkit.tasks import ClassificationTask


def model() -> nn.Module:
    with torch.device("cpu"):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(20, 50), nn.ReLU(), nn.Dropout(0.3), nn.BatchNorm1d(50), nn.Linear(50, 10))


def tensors() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(500, 20, generator=generator, device="cpu")
    return inputs, torch.randint(10, (500,), generator=generator, device="cpu")


def fit(callbacks, data, optimizer=Adam, **options):
    """Weights and what was logged, after two epochs."""
    pl.seed_everything(3, verbose=False)
    task = ClassificationTask(model(), optimizer)
    trainer = bare_trainer(*callbacks, accelerator="gpu", devices=1, max_epochs=2, **options)
    with torch.device("cpu"):
        trainer.fit(task, data())
    weights = {name: value.cpu() for name, value in task.state_dict().items()}
    return weights, {name: value.cpu() for name, value in trainer.callback_metrics.items()}, trainer.global_step


class Plain(pl.LightningModule):
    """As people write them."""

    def __init__(self, step=None):
        super().__init__()
        self.model = model()
        self.calls = 0
        self.step = step

    def training_step(self, batch, batch_idx):
        inputs, labels = batch
        logits = self.model(inputs)
        loss = F.cross_entropy(logits, labels)
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log_dict({"largest": logits.max(), "constant": 3.0}, reduce_fx="max", on_step=False, on_epoch=True)
        if self.step is not None:
            self.step(self, batch_idx, logits)
        return {"loss": loss, "logits": logits}

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.8)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Outputs(pl.Callback):
    """Keeps what training_step returned."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append({name: value.detach().clone() for name, value in outputs.items()})


def train(module, *callbacks, data=None, **options):
    """Weights, running values and outputs."""
    pl.seed_everything(3, verbose=False)
    outputs = Outputs()
    options = {"accelerator": "gpu", "devices": 1, "max_epochs": 3, **options}
    trainer = bare_trainer(outputs, *callbacks, **options)
    with torch.device("cpu"):
        trainer.fit(module, (data or loader)())
    return module.state_dict(), dict(trainer.callback_metrics), {"outputs": outputs.seen}


def assert_equal(ours, own):
    assert len(ours) == len(own)
    for mine, theirs in zip(pytree.tree_leaves(ours), pytree.tree_leaves(own), strict=True):
        assert torch.equal(mine, theirs)


@pytest.fixture
def replays(monkeypatch):
    """Counts the replays of graphs."""
    count = []
    original = CapturedPasses.__call__
    monkeypatch.setattr(CapturedPasses, "__call__", lambda *a: count.append(1) or original(*a))
    return count


@pytest.mark.parametrize("make_data", ["loader", "sliced"])
@pytest.mark.parametrize(
    "options",
    [{}, {"precision": "bf16-mixed"}, {"gradient_clip_val": 0.1}, {"limit_train_batches": 9}, {"precision": "64-true"}],
    ids=str,
)
def test_graphs_are_lightnings_to_the_bit(options, make_data, replays):
    """Weights, metrics and outputs are those of Lightning's own loop, dropout and batch norm among it."""
    data = {"loader": loader, "sliced": sliced}[make_data]
    own = train(Plain(), data=data, **options)
    lean = LeanLoop(cuda_graphs=True)
    ours = train(Plain(), lean, data=data, **options)
    assert lean.unsupported_reason is None and lean.graph_unsupported_reason is None
    # But for the first and last batch of each epoch, and the first that is watched.
    assert len(replays) == 3 * ((9 if "limit_train_batches" in options else 16) - 2) - 1
    assert_equal(ours, own)


def _count(module, batch_idx, logits):
    module.calls += 1


@pytest.mark.parametrize(
    ("step", "cause"),
    [
        (_count, "changes self.calls"),
        (lambda module, batch_idx, logits: logits.max().item(), "waits for the GPU"),
        (lambda module, batch_idx, logits: module.log("x", logits.mean() * batch_idx), "uses batch_idx"),
        (lambda module, batch_idx, logits: module.log("x", logits.mean() * module.global_step), "trainer.global_step"),
        (lambda module, batch_idx, logits: torch.rand(1, device="cpu"), "random numbers"),
        # Which torch may or may not notice before it is captured.
        (lambda module, batch_idx, logits: torch.cuda.synchronize(), ""),
        (lambda module, batch_idx, logits: torch.cuda.current_stream().query(), "cannot be captured"),
    ],
    ids=["attribute", "item", "batch_idx", "global_step", "random", "synchronize", "query"],
)
def test_what_cannot_be_replayed_is_not(step, cause, replays):
    """The run says why, and is Lightning's to the bit all the same."""
    lean = LeanLoop(cuda_graphs=True)
    ours = train(Plain(step), lean)
    own = train(Plain(step))
    assert cause in lean.graph_unsupported_reason
    assert not replays
    assert_equal(ours, own)


class KeepsHistory(pl.Callback):
    """Has a part of each step's autograd graph."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append(outputs["logits"])


def test_a_history_that_is_kept_is_noticed(replays):
    """It would break the capture."""
    lean = LeanLoop(cuda_graphs=True)
    assert_equal(train(Plain(), KeepsHistory(), lean), train(Plain(), KeepsHistory()))
    assert "must be detached" in lean.graph_unsupported_reason
    assert not replays


class Moves(pl.Callback):
    """Puts parameters elsewhere in the middle of an epoch, and freezes some."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 6:
            first = pl_module.model[0]
            first.weight.data = first.weight.data.clone()
        if batch_idx == 10:
            pl_module.model[4].bias.requires_grad_(trainer.current_epoch % 2 == 1)


def test_weights_that_move_are_captured_anew(replays):
    """A callback that changes what a graph was made of is followed."""
    own = train(Plain(), Moves())
    lean = LeanLoop(cuda_graphs=True)
    ours = train(Plain(), Moves(), lean)
    assert lean.graph_unsupported_reason is None and replays
    assert_equal(ours, own)


def test_memory_of_graphs_is_given_back():
    """After the fit there is no more in use than without graphs."""
    used = []
    for lean in (LeanLoop(), LeanLoop(cuda_graphs=True)):
        train(Plain(), lean)
        gc.collect()
        # Of the stream that captures, which torch keeps for all graphs.
        torch._C._cuda_clearCublasWorkspaces()
        used.append(torch.cuda.memory_allocated())
    assert used[1] <= used[0]


def loader():
    return DataLoader(TensorDataset(*tensors()), batch_size=32, shuffle=True)


def sliced():
    return TensorBatches([t.cuda() for t in tensors()], 32, shuffle=True)


@pytest.mark.parametrize("data", [loader, sliced])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"precision": "bf16-mixed"},
        {"precision": "16-mixed"},
        {"accumulate_grad_batches": 2},
        {"gradient_clip_val": 0.1},
    ],
    ids=str,
)
@pytest.mark.parametrize("optimizer", [SGD, Adam, torch.optim.Adam])
def test_the_lean_loop_is_lightnings_to_the_bit(optimizer, options, data):
    """Weights, metrics and steps are those of Lightning's own loop."""
    own = fit([], data, optimizer, **options)
    ours = fit([LeanLoop()], data, optimizer, **options)
    assert own[2] == ours[2]
    for mine, theirs in zip(ours[:2], own[:2], strict=True):
        assert mine.keys() == theirs.keys()
        for name in theirs:
            assert torch.equal(mine[name], theirs[name]), name


def test_fused_kernels_train_as_torchs():
    """FuseKernels changes no more than roundings."""
    own = fit([], sliced, torch.optim.Adam)[0]
    ours = fit([FuseKernels()], sliced, torch.optim.Adam)[0]
    for name in own:
        # Adam makes steps of the learning rate out of gradients that are nothing but rounding.
        torch.testing.assert_close(ours[name], own[name], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    "arguments",
    [
        ("+experiment=cnn", "trainer.max_epochs=2"),
        ("+experiment=cnn", "trainer.precision=bf16-mixed", "trainer.max_epochs=2"),
        ("+experiment=cnn", "trainer.precision=16-mixed", "trainer.max_epochs=2"),
        ("+experiment=cnn", "optim=sgd", "optim.lr=0.05", "strategy=ddp", "trainer.max_epochs=2"),
        ("+experiment=rnn", "trainer.max_epochs=1"),
    ],
    ids=" ".join,
)
def test_command(tmp_path, arguments):
    """The commands train, test and predict on the GPU that is there."""
    run("train", *arguments, "name=job", cwd=tmp_path, status=0)
    (run_dir,) = Path(tmp_path, "runs", "job").iterdir()
    metrics = json.loads((run_dir / "metrics.json").read_text())
    assert metrics["test/accuracy"] > 0.8
    assert json.loads((run_dir / "environment.json").read_text())["gpus"]
