"""The outcome of a compression is what the checkpoint holds, in the report, in the metrics and in the table of runs."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from support.trainers import bare_trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightkit.app.compression_outcome import compression_outcome, outcome_facts, outcome_metrics, outcome_tables
from lightkit.app.report.compression import sections
from lightkit.app.runs.listing import choose_metrics
from lightkit.app.runs.summary import RunSummary
from lightkit.checkpoints import load_checkpoint
from lightkit.compress import Distil, Prune, Quantize, Sparsify, apply_quantization
from lightkit.compress.quantization import levels_of
from lightkit.optim import Adam

INPUTS = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 2))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return Adam(self.parameters(), lr=0.01)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Returns the callbacks of a training with all of them, its checkpoint and its module."""
    callbacks = [
        Prune(0.5, rounds=2, multiple=1, start=0.1, end=0.3),
        Sparsify(0.6, start=0.4, end=0.6, rounds=2),
        Quantize(4, start=0.7, end=0.8, batches=2),
    ]
    saved = ModelCheckpoint(tmp_path_factory.mktemp("outcome"), save_last=True)
    module = Module()
    data = DataLoader(TensorDataset(INPUTS, (INPUTS.sum(1) > 0).long()), batch_size=8)
    bare_trainer(*callbacks, saved, max_epochs=5, enable_checkpointing=True).fit(module, data)
    return callbacks, load_checkpoint(saved.last_model_path), module


def test_values(trained):
    """Multiply-adds, widths, zeros, bits and errors are those of the checkpoint's tensors."""
    callbacks, checkpoint, module = trained
    outcome = compression_outcome(callbacks, checkpoint)
    state = checkpoint["state_dict"]
    sizes = [tuple(state[f"net.{i}.weight"].shape) for i in (0, 2, 4)]
    assert outcome.macs == (sum(a * b for a, b in sizes), 6 * 16 + 16 * 12 + 12 * 2)
    assert outcome.widths == {"net.0": (16, sizes[0][0]), "net.2": (12, sizes[1][0])}
    assert sizes[0][0] + sizes[1][0] < 28
    assert outcome.zeros == {
        f"net.{i}.weight": (int((state[f"net.{i}.weight"] == 0).sum()), state[f"net.{i}.weight"].numel())
        for i in (0, 2, 4)
    }
    assert sum(zeros for zeros, _ in outcome.zeros.values()) == pytest.approx(0.6 * outcome.macs[0], abs=3)
    assert [layer["bits"] for layer in outcome.layers.values()] == [8, 4, 8]
    # After the training the module has the rounded weights.
    for name, layer in outcome.layers.items():
        rounded = module.get_parameter(name).detach()
        expected = float((rounded - state[name]).norm() / state[name].norm())
        assert layer["error"] == pytest.approx(expected, rel=1e-4) and 0 < expected < 0.2
    assert 0 < outcome.sizes["raw"] < sum(4 * value.numel() for value in state.values())


def test_levels_of_a_checkpoint(trained):
    """The levels without a module are those that a module gets, to the bit."""
    _, checkpoint, _ = trained
    module = Module()
    module.net = nn.Sequential(*(layer for layer in module.net))
    for i in (0, 2, 4):
        rows, columns = checkpoint["state_dict"][f"net.{i}.weight"].shape
        module.net[i] = nn.Linear(columns, rows)
    module.load_state_dict(checkpoint["state_dict"])
    expected, found = apply_quantization(module, checkpoint), levels_of(checkpoint)
    assert expected.keys() == found.keys()
    assert all(torch.equal(a, b) for name in found for a, b in zip(found[name], expected[name], strict=True))


def test_report(trained):
    """The report has the key figures first, and a table of each kind, whose names are escaped."""
    callbacks, checkpoint, _ = trained
    outcome = compression_outcome(callbacks, checkpoint)
    found = sections(outcome)
    assert [section.title for section in found] == ["Compression", "Widths of layers", "Zeros", "Rounded weights"]
    assert "multiply-adds a sample" in found[0].html and "4, 8" in found[0].html
    assert f"<td>net.0</td><td>16</td><td>{outcome.widths['net.0'][1]}</td>" in found[1].html
    assert "<td>net.2.weight</td><td>4</td>" in found[3].html
    strange = compression_outcome([Sparsify()], {"state_dict": {"<b>": torch.zeros(2, 2)}})
    (table,) = outcome_tables(strange).values()
    assert "&lt;b&gt;" in table and "<b>" not in table


def test_metrics(trained):
    """The key figures are metrics of the run, which the table of runs shows beside those of the test."""
    callbacks, checkpoint, _ = trained
    metrics = outcome_metrics(compression_outcome(callbacks, checkpoint))
    assert metrics["compression/macs_left"] <= 0.5 and metrics["compression/bits"] == 4
    assert metrics["compression/zeros"] == pytest.approx(0.6, abs=0.02) and metrics["compression/zipped_bytes"] > 100
    tested = {"test/accuracy": 0.9, "test/loss": 0.3, "val/accuracy": 0.8, "val/loss": 0.4}
    run = RunSummary(Path("a"), "a", 0.0, "finished", {**tested, **metrics})
    expected = ["test/accuracy", "test/loss", "val/accuracy", "compression/macs_left", "compression/zipped_bytes"]
    assert choose_metrics([run]) == expected
    assert choose_metrics([RunSummary(Path("a"), "a", 0.0, "finished", tested)]) == expected[:3]


def test_parts():
    """Each callback alone gives its part; a training without one has no outcome."""
    state = {"state_dict": {"weight": torch.eye(4), "bias": torch.zeros(4)}}
    assert compression_outcome([], state) is None and compression_outcome([Distil()], state) is None
    masked = compression_outcome([Sparsify()], state)
    assert masked.macs is None and masked.zeros == {"weight": (12, 16)} and masked.layers == {}
    assert masked.sizes["raw"] == 80
    pruned = compression_outcome([Prune()], state)
    assert pruned.zeros == {} and list(outcome_facts(pruned)) == ["bytes of the weights"]


def test_zeros_have_no_sign(trained):
    """Masked weights are positive zeros: signs at random would take a bit each in the zipped file."""
    callbacks, checkpoint, _ = trained
    for name in compression_outcome(callbacks, checkpoint).zeros:
        value = checkpoint["state_dict"][name]
        assert not bool(torch.signbit(value[value == 0]).any())
