"""Recurrent networks and transformers are pruned by the tasks that train them, with the losses that these have."""

from __future__ import annotations

import pytest
import torch
from support.trainers import bare_trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightkit.callbacks import LeanLoop
from lightkit.compress import Prune
from lightkit.errors import ConfigError
from lightkit.models import RNN, RNNLanguageModel, Transformer
from lightkit.tasks import ClassificationTask, LanguageModelTask


def fit(task, *tensors, keep_macs, rounds=2):
    prune = Prune(keep_macs, rounds=rounds, multiple=1)
    trainer = bare_trainer(prune, LeanLoop(), max_epochs=4, num_sanity_val_steps=0)
    trainer.fit(task, DataLoader(TensorDataset(*tensors), batch_size=8))
    return prune


def tokens():
    return torch.randint(20, (64, 9), generator=torch.Generator().manual_seed(0))


def batches():
    return tokens()[:, :-1], tokens()[:, 1:]


def test_transformer():
    """Each layer loses heads and inner width by itself; the residual stream stays, and generation goes on."""
    torch.manual_seed(0)
    model = Transformer(20, 16, 2, 4, 8)
    prune = fit(LanguageModelTask(model), *batches(), keep_macs=0.2)
    assert prune.macs <= 0.2 * prune.dense_macs
    attention = [layer.attention.out.in_features for layer in model.body.layers]
    feed_forward = [layer.feed_forward.out.in_features for layer in model.body.layers]
    assert sum(attention) < 32 and all(size % 4 == 0 for size in attention) and sum(feed_forward) < 128
    assert model.embedding.weight.shape == (20, 16)
    # Tokens one by one, with the state of those before, give what all at once give.
    text = tokens()[:2, :6]
    model.eval()
    state, steps = None, []
    for place in range(6):
        hidden, state = model.hidden(text[:, place : place + 1], state)
        steps.append(hidden)
    torch.testing.assert_close(torch.cat(steps, dim=1), model.hidden(text)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cell", ["lstm", "gru", "elman"])
def test_recurrent(cell):
    """A classifier of sequences loses hidden units of all layers."""
    torch.manual_seed(0)
    model = RNN(3, 16, 2, num_layers=2, cell=cell)
    x = torch.randn(64, 7, 3)
    prune = fit(ClassificationTask(model), x, (x.sum((1, 2)) > 0).long(), keep_macs=0.4)
    assert prune.macs <= 0.4 * prune.dense_macs
    assert model.core.hidden_size == model.head.in_features < 12
    assert isinstance(model.core, nn.RNNBase)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_recurrent_language_model(cell):
    """Its loss reads the hidden states by a function, and its hidden units go like those of a call of the model."""
    torch.manual_seed(0)
    model = RNNLanguageModel(20, 24, embedding_size=8, num_layers=2, cell=cell)
    task = LanguageModelTask(model)
    prune = fit(task, *batches(), keep_macs=0.4)
    assert prune.macs <= 0.4 * prune.dense_macs
    core = model.body.core
    assert core.hidden_size == model.head.in_features < 20 and core.input_size == 8
    # The multiply-adds of a token: two layers, and the head.
    gates = {"lstm": 4, "gru": 3}[cell]
    size = core.hidden_size
    assert prune.macs == 8 * (gates * size * (8 + size) + gates * size * 2 * size + 20 * size)
    assert torch.allclose(model(tokens()[:, :4]), model.head(model.hidden(tokens()[:, :4])[0]))
    assert "hidden" not in vars(model)
    added = task.generate(tokens()[0, :3], 5, temperature=0)
    expected = tokens()[0, :3]
    for _ in range(5):
        expected = torch.cat([expected, model.eval()(expected[None])[0, -1].argmax()[None]])
    assert torch.equal(added, expected[3:])


def test_tied_language_model_is_refused():
    """The head has the embedding's weight, so that no unit can go: one line in the first step says so."""
    with pytest.raises(ConfigError, match="no layer can lose units"):
        fit(LanguageModelTask(RNNLanguageModel(20, 16, tie_weights=True)), *batches(), keep_macs=0.5)
