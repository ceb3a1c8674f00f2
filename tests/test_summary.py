"""The table of a model has its parameters, sizes and multiply-adds, and making it changes nothing."""

from __future__ import annotations

import pytest
import torch
from support.trainers import bare_trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightkit.callbacks import LeanLoop, PrintSummary
from lightkit.models import CNN, RNN, Transformer
from lightkit.summary import summarize
from lightkit.tasks import ClassificationTask


@pytest.fixture(autouse=True)
def nothing_compiled():
    """Resets what other tests gave to torch.compile, whose operations nobody can count."""
    torch._dynamo.reset()


def test_numbers():
    """Each number is that of the layer, for one sample; frozen parameters and shared ones are told apart."""
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 5))
    model[2].bias.requires_grad = False
    found = summarize(model, torch.zeros(7, 1, 4, 4))
    rows = [(r.name, r.kind, r.parameters, r.trainable, r.output_size, r.multiply_adds) for r in found.layers]
    assert rows == [
        ("", "Sequential", 65, 60, (5,), 72 + 40),
        ("0", "Conv2d", 20, 20, (2, 2, 2), 72),
        ("1", "Flatten", 0, 0, (8,), 0),
        ("2", "Linear", 45, 40, (5,), 40),
    ]
    assert found.size == 65 * 4
    assert "65 parameters, of which 60 are trained; 0.00 MiB" in str(found)


@pytest.mark.parametrize(
    ("model", "sample"),
    [
        (CNN(), torch.zeros(2, 1, 28, 28)),
        (RNN(4, 8, 3), torch.zeros(2, 5, 4)),
        # The data of a forecast are in float64.
        (RNN(1, 8, 3), torch.zeros(2, 5, 1, dtype=torch.float64)),
        (Transformer(vocab_size=9, context=8, dim=8, num_layers=2, num_heads=2), torch.zeros(2, 8, dtype=torch.long)),
        (nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.5)), torch.zeros(2, 4)),
    ],
)
def test_changes_nothing(model, sample):
    """Values, modes, hooks and random numbers stay; every output size is known."""
    model.train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    before = torch.get_rng_state()
    found = summarize(model, sample)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(m.training and not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert found.layers[0].output_size and found.layers[0].multiply_adds


def test_depth():
    """max_depth is the number of levels below the model."""
    model = nn.Sequential(nn.Sequential(nn.Sequential(nn.Linear(1, 1))))
    assert [[layer.name for layer in summarize(model, max_depth=d).layers] for d in (0, 2)] == [[""], ["", "0", "0.0"]]
    with pytest.raises(ValueError, match="max_depth must be at least 0, got -1"):
        summarize(model, max_depth=-1)


def test_model_that_needs_values():
    """A model whose forward cannot run without values has no sizes, and its parameters are known."""

    class ByValue(nn.Linear):
        def forward(self, input):
            return super().forward(input) if input.sum().item() > 0 else input

    layer = summarize(ByValue(2, 3), torch.zeros(1, 2)).layers[0]
    assert (layer.parameters, layer.output_size, layer.multiply_adds) == (9, None, None)
    assert "-" in str(summarize(nn.LazyLinear(3)))


@pytest.mark.parametrize("loop", [[], [LeanLoop]])
def test_callback(capsys, loop):
    """The table is printed once in a training, and the weights are those of a training without it."""
    weights = []
    for callbacks in ([], [PrintSummary(max_depth=1)]):
        torch.manual_seed(0)
        data = DataLoader(TensorDataset(torch.randn(12, 3), torch.zeros(12, dtype=torch.long)), batch_size=4)
        task = ClassificationTask(nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)))
        bare_trainer(*(make() for make in loop), *callbacks, max_epochs=2).fit(task, data)
        weights.append(torch.cat([p.detach().flatten() for p in task.parameters()]))
    assert torch.equal(*weights)
    assert capsys.readouterr().out.count("(model)  Sequential") == 1
