"""The module of a linear layer and its loss against torch's: signature, state dict, values, errors."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn

from lightkit.nn import LinearCrossEntropyLoss

Torchs = getattr(nn, "LinearCrossEntropyLoss", None)
pytestmark = pytest.mark.skipif(Torchs is None, reason="torch has it from 2.13 on")


def test_the_signature_is_torchs():
    """Every argument of torch's, in its order, of its kind, with its default; ours follow."""
    theirs = list(inspect.signature(Torchs).parameters.values())
    own = list(inspect.signature(LinearCrossEntropyLoss).parameters.values())[: len(theirs)]
    for mine, their in zip(own, theirs, strict=True):
        assert (mine.name, mine.kind, mine.default) == (their.name, their.kind, their.default)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("out_features", [(), (3,), (2, 3), (1,)])
@pytest.mark.parametrize("probabilities", [False, True])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_values_and_state_are_torchs(bias, out_features, probabilities, reduction):
    """The state dict goes from one to the other, and losses and gradients are the same."""
    torch.manual_seed(0)
    options = {"out_features": out_features, "bias": bias, "reduction": reduction, "weight": torch.rand(4)}
    theirs = Torchs(5, 4, label_smoothing=0.1, **options)
    own = LinearCrossEntropyLoss(5, 4, label_smoothing=0.1, options=None, **options)
    assert list(own.state_dict()) == list(theirs.state_dict())
    own.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(own.state_dict())
    hidden = torch.randn(6, 5)
    target = torch.randn(6, 4, *out_features).softmax(1) if probabilities else torch.randint(4, (6, *out_features))
    results = []
    for module in (own, theirs):
        module.zero_grad()
        x = hidden.clone().requires_grad_()
        loss = module(x, target)
        loss.sum().backward()
        results.append([loss, x.grad, *(p.grad for p in module.parameters())])
    for mine, their in zip(*results, strict=True):
        torch.testing.assert_close(mine, their)


def test_dtypes_are_torchs():
    """The loss has the dtype that torch's has, of half-precision states and targets in float32."""
    for target, dtype in ((torch.rand(6, 4).softmax(1), torch.float32), (torch.randint(4, (6,)), torch.bfloat16)):
        losses = [cls(5, 4, dtype=torch.bfloat16)(torch.ones(6, 5).bfloat16(), target) for cls in _CLASSES]
        assert [loss.dtype for loss in losses] == [dtype, dtype]


@pytest.mark.parametrize(
    ("made", "called"),
    [
        ({"weight": torch.ones(3)}, None),
        ({"label_smoothing": 1.5}, None),
        ({"ignore_index": 1}, (torch.ones(6, 5), torch.rand(6, 4).softmax(1))),
        ({"out_features": (2,)}, (torch.ones(5), torch.zeros(2, dtype=torch.int64))),
        ({"out_features": (2,)}, (torch.ones(6, 7), torch.zeros(6, 2, dtype=torch.int64))),
        ({}, (torch.ones(6, 7), torch.zeros(6, dtype=torch.int64))),
        ({}, (torch.ones(6, 5), torch.full((6,), 9))),
        ({"reduction": "median"}, (torch.ones(6, 5), torch.zeros(6, dtype=torch.int64))),
        ({}, (torch.ones(6, 5), torch.zeros(5, dtype=torch.int64))),
    ],
)
def test_errors_are_of_torchs_classes(made, called):
    """What torch's module refuses is refused with the same class."""

    def run(cls):
        module = cls(5, 4, **made)
        module(*called)

    with pytest.raises(Exception) as expected:
        run(Torchs)
    with pytest.raises(expected.type):
        run(LinearCrossEntropyLoss)


_CLASSES = (LinearCrossEntropyLoss, Torchs)
