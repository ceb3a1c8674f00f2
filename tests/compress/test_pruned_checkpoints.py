"""A pruned checkpoint is evaluated, predicts and resumes without further keys; a stranger's widths only compute."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lightkit.app import untrusted
from lightkit.app.restore import restore
from lightkit.checkpoints import CONFIG_KEY
from lightkit.compress import WIDTHS_KEY
from lightkit.compress.surgery import provable_graph, remove_units
from lightkit.compress.units import mask_of
from lightkit.compress.widths import changed_shapes, shapes_of
from lightkit.errors import CheckpointError

MODELS = {
    "cnn": ({"_target_": "lightkit.models.CNN"}, torch.randn(2, 1, 28, 28)),
    "rnn": (
        {"_target_": "lightkit.models.RNN", "input_size": 3, "hidden_size": 8, "num_outputs": 2},
        torch.randn(2, 5, 3),
    ),
}
TASK = {"_target_": "lightkit.tasks.ClassificationTask"}


@pytest.fixture
def pruned(tmp_path):
    """Returns a function that prunes a model, writes its checkpoint, and returns the model and the path."""

    def write(name="cnn", change=lambda widths: widths):
        node, x = MODELS[name]
        model = untrusted.build("model", node)
        dense = shapes_of(model)
        graph = provable_graph(model, [x])
        remove_units(model, graph, mask_of((u for g in graph.groups for u in g.units[::2]), graph.count))
        widths = {f"model.{key}": shape for key, shape in changed_shapes(model, dense).items()}
        state = {f"model.{key}": value for key, value in model.state_dict().items()}
        path = tmp_path / "x.ckpt"
        config = {"data": None, "model": node, "task": TASK, "trainer": {}}
        torch.save({"state_dict": state, CONFIG_KEY: config, WIDTHS_KEY: change(copy.deepcopy(widths))}, path)
        return model, path

    return write


@pytest.mark.parametrize("name", MODELS)
def test_restored(pruned, name):
    """The task is built with the widths of the checkpoint, and computes what the pruned model does."""
    model, path = pruned(name)
    restored = restore(path)
    x = MODELS[name][1]
    torch.testing.assert_close(restored.task.model(x), model.eval()(x))
    given = untrusted.build("model", MODELS[name][0])
    assert restore(path, model=given).task.model is given
    torch.testing.assert_close(given(x), model(x))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("cnn", lambda widths: [1]),
        ("cnn", lambda widths: {**widths, 3: [1]}),
        ("cnn", lambda widths: {**widths, "model.features.0.weight": [10**9, 1, 3, 3]}),
        ("cnn", lambda widths: {**widths, "model.features.0.weight": [16, 1, 2, 3]}),
        ("cnn", lambda widths: {**widths, "model.features.0.weight": [0, 1, 3, 3]}),
        ("cnn", lambda widths: {**widths, "model.features.0.weight": [16, 1, 3]}),
        ("cnn", lambda widths: {**widths, "model.features.0.weight": [16.0, 1, 3, 3]}),
        ("cnn", lambda widths: {**widths, "model.features.0.bias": [3]}),
        ("cnn", lambda widths: {**widths, "model.features.7.weight": [3]}),
        ("cnn", lambda widths: {}),
        ("rnn", lambda widths: {**widths, "model.core.weight_hh_l0": [16, 3]}),
        ("rnn", lambda widths: {**widths, "model.core.bias_hh_l0": [7]}),
        ("rnn", lambda widths: {**widths, "model.core.weight_ih_l0": [1, 1]}),
    ],
)
def test_strange_widths(pruned, name, change):
    """Widths that do not fit are one error, before a layer computes with them."""
    _, path = pruned(name, change)
    with pytest.raises(CheckpointError, match=r"widths of the checkpoint|checkpoint of another model"):
        restore(path)


def test_large_dense_model(tmp_path):
    """Small widths do not make lightkit allocate a model that is far larger than the file."""
    node = {"_target_": "lightkit.models.RNN", "input_size": 3, "hidden_size": 20_000, "num_outputs": 2}
    path = tmp_path / "x.ckpt"
    small = nn.LSTM(3, 2)
    widths = {f"model.core.{key}": list(value.shape) for key, value in small.state_dict().items()}
    state = {f"model.core.{key}": value for key, value in small.state_dict().items()}
    state |= {"model.head.weight": torch.zeros(2, 2), "model.head.bias": torch.zeros(2)}
    config = {"data": None, "model": node, "task": TASK, "trainer": {}}
    widths["model.head.weight"] = [2, 2]
    torch.save({"state_dict": state, CONFIG_KEY: config, WIDTHS_KEY: widths}, path)
    with pytest.raises(CheckpointError, match="bytes, and a file of this size may describe"):
        restore(path)
