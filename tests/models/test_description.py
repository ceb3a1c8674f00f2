"""A description of a module builds the same module again, or there is none."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lightkit.models import CNN, RNN, RNNLanguageModel, Transformer
from lightkit.models.description import LAYERS, build_described, describe
from lightkit.nn import FusedSequential

# Arguments of each layer that takes some, all unlike their defaults.
ARGUMENTS = {
    **{f"Adaptive{kind}Pool{dims}d": (3,) for kind in ("Avg", "Max") for dims in (1, 2)},
    **{f"{kind}Pool{dims}d": (3, 2, 1) for kind in ("Avg", "Max") for dims in (1, 2)},
    **{f"{kind}Norm{dims}d": (4, 1e-3, 0.2, True, False) for kind in ("Batch", "Instance") for dims in (1, 2)},
    **{f"Conv{dims}d": (4, 6, 3, 2, 1, 2, 2, False, "circular") for dims in (1, 2)},
    **{f"ConvTranspose{dims}d": (4, 6, 3, 2, 1, 1, 2, False, 2) for dims in (1, 2)},
    **dict.fromkeys(("Dropout", "Dropout1d", "Dropout2d"), (0.3, True)),
    "CELU": (0.5, True),
    "ELU": (0.5, True),
    "Embedding": (7, 3, 1, 2.0, 1.0, True),
    "Flatten": (2, 3),
    "GELU": ("tanh",),
    "GroupNorm": (2, 4, 1e-3, False),
    "Hardtanh": (-2.0, 3.0, True),
    "LayerNorm": ((3, 4), 1e-3, True, False),
    "LeakyReLU": (0.3, True),
    "Linear": (3, 4, False),
    "PReLU": (5, 0.3),
    "RMSNorm": ((4,), 1e-3, False),
    "Softplus": (2, 10),
    "Unflatten": (1, (2, 3)),
    "Upsample": (None, 2.0, "nearest"),
    "ZeroPad2d": ((1, 2, 3, 4),),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name):
    """Each layer comes back with its arguments, the same text and the same weights."""
    for arguments in {(), ARGUMENTS.get(name, ())}:
        try:
            layer = getattr(nn, name)(*arguments)
        except TypeError:
            # The layer needs arguments.
            continue
        node = describe(layer)
        assert node is not None, layer
        again = build_described(node)
        assert type(again) is type(layer) and repr(again) == repr(layer)
        again.load_state_dict(layer.state_dict())


@pytest.mark.parametrize(
    "model",
    [
        CNN(3, 5, 20, blocks="torch"),
        RNN(2, 4, 3, num_layers=2, cell="gru", bidirectional=True),
        RNNLanguageModel(16, 8, 4),
        Transformer(16, 8, 1, 2, 4),
        nn.Sequential(nn.Sequential(CNN(), nn.ReLU()), nn.Linear(10, 2)),
    ],
    ids=lambda model: type(model).__name__,
)
def test_models(model):
    """lightkit's models keep their arguments, also in copies and within a Sequential."""
    for one in (model, copy.deepcopy(model)):
        again = build_described(describe(one))
        again.load_state_dict(one.state_dict())
        assert repr(again) == repr(model)


class Own(nn.Linear):
    """A layer of a user's own."""


def test_modules_without_a_description():
    """A class of the user's own, a shared layer and a layer with other weights have no description."""
    shared = nn.Linear(2, 2)
    pruned = nn.Linear(2, 2)
    pruned.register_buffer("mask", torch.ones(2, 2))
    for module in (Own(2, 2), nn.Sequential(shared, shared), nn.Sequential(nn.Linear(2, 2), Own(2, 2)), pruned):
        assert describe(module) is None
    assert describe(FusedSequential(nn.Linear(2, 2))) is None
