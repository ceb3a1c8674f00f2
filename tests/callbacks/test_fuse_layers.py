"""FuseKernels with layers in any code, in real Trainers: the same training, the report, modules that are skipped."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from plain import trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightkit.callbacks import FuseKernels, LeanLoop
from lightkit.errors import ArgumentError

pytestmark = pytest.mark.filterwarnings("ignore:.*(does not have many workers|lower value for log_every|GPU available)")


class Attributes(pl.LightningModule):
    """Layers as attributes of the LightningModule itself, functions in ``forward``."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 16, 3)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        return self.head(F.max_pool2d(F.relu(self.conv2(x)), 2).mean((2, 3)))

    def training_step(self, batch, index):
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, index):
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    test_step = validation_step

    def predict_step(self, batch, index):
        return self(batch[0]).softmax(-1)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


class Inner(Attributes):
    """A network within the LightningModule, with a branch that is a module of its own."""

    def __init__(self):
        super().__init__()
        del self.conv1, self.conv2, self.head
        self.net = Attributes()
        self.branch = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(144, 3))

    def forward(self, x):
        return self.net(x) + self.branch(x)


def batches():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(20, 1, 14, 14, generator=generator)
    return DataLoader(TensorDataset(inputs, torch.arange(20) % 3), batch_size=4)


def make(cls):
    torch.manual_seed(0)
    return cls()


@pytest.mark.parametrize("module", [Attributes, Inner])
@pytest.mark.parametrize("lean", [False, True])
def test_same_results_in_every_stage(module, lean):
    """Training, validation, test and prediction give torch's values with and without LeanLoop."""
    results = []
    for callbacks in ([], [FuseKernels(), *([LeanLoop()] if lean else [])]):
        network, runner = make(module), trainer(*callbacks)
        runner.fit(network, batches(), batches())
        figures = [runner.callback_metrics["loss"].item(), runner.callback_metrics["val_loss"].item()]
        figures += [runner.validate(network, batches(), verbose=False)[0]["val_loss"]]
        figures += [runner.test(network, batches(), verbose=False)[0]["val_loss"]]
        predicted = torch.cat(runner.predict(network, batches()))
        results.append((figures, predicted, dict(network.named_parameters())))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


def regions(callback):
    return {found.name: found for found in callback.report if "conv2d" in found.kind}


def test_report_of_regions(monkeypatch):
    """Each region is logged and reported once, with the names of its modules and operations."""
    messages, callback = [], FuseKernels()
    monkeypatch.setattr("lightkit.callbacks.fuse_kernels.rank_zero_info", messages.append)
    trainer(callback).fit(make(Inner), batches(), batches())
    assert sorted(regions(callback)) == ["branch.0, branch.4", "net.conv1, net.conv2"]
    found = regions(callback)["branch.0, branch.4"]
    assert found.kind == "conv2d, relu, max_pool2d, flatten, linear"
    assert found.replacement == "lightkit.ops.layer_chain" and found.reason is None
    assert [message for message in messages if "branch.0" in message] == [f"FuseKernels: {found}"]


def test_skip(capsys):
    """Modules by pattern are torch's, with those in them; the table has what is left."""
    callback = FuseKernels(skip=["bran*"])
    trainer(callback).fit(make(Inner), batches())
    assert list(regions(callback)) == ["net.conv1, net.conv2"]
    capsys.readouterr()
    callback.table()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["place", "operations", "runs", "as", "why", "not"]
    assert any(line.startswith("optimizers[0]") and "lightkit.optim.Adam" in line for line in lines)
    assert any("net.conv1, net.conv2" in line and line.endswith("lightkit.ops.layer_chain") for line in lines)
    everything = FuseKernels(skip=["*"])
    trainer(everything).fit(make(Inner), batches())
    assert regions(everything) == {}


@pytest.mark.parametrize("skip", ["conv1", [1], [None]])
def test_wrong_skip(skip):
    """A pattern that is no list of strings is an error that names it."""
    with pytest.raises(ArgumentError, match="skip must be a list of patterns, got"):
        FuseKernels(skip=skip)


def test_memory_is_kept_on_request(monkeypatch):
    """The callback keeps freed memory, unless the program says otherwise."""
    calls = []
    monkeypatch.setattr("lightkit.callbacks.fuse_kernels.keep_freed_memory", lambda: calls.append(1))
    trainer(FuseKernels(keep_memory=False), max_epochs=1).fit(make(Attributes), batches())
    assert calls == []
    trainer(FuseKernels(), max_epochs=1).fit(make(Attributes), batches())
    assert calls == [1]
