"""The recurrent network: what it reads, what it ignores, and what it rejects."""

from __future__ import annotations

import pytest
import torch

from lightkit.models import RNN

VARIANTS = [
    {"cell": cell, "bidirectional": bidirectional, "num_layers": layers}
    for cell in ("lstm", "gru", "elman")
    for bidirectional in (False, True)
    for layers in (1, 2)
]


def sequences(lengths, features=3):
    """Returns sequences padded with NaN, which any read would reveal, and their lengths."""
    lengths = torch.tensor(lengths)
    padded = torch.randn(len(lengths), int(lengths.max()), features)
    padded[torch.arange(padded.shape[1]) >= lengths[:, None]] = torch.nan
    return padded, lengths


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(map(str, v.values())))
def test_padding_changes_nothing(variant):
    """Each sequence of a padded batch, in any order, gets the outputs that it gets alone."""
    torch.manual_seed(0)
    model = RNN(3, 8, 4, **variant)
    padded, lengths = sequences([2, 7, 1, 5, 7])
    together = model(padded, lengths)
    assert together.shape == (5, 4)
    for row, length in enumerate(lengths.tolist()):
        torch.testing.assert_close(together[row : row + 1], model(padded[row : row + 1, :length]))


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(map(str, v.values())))
def test_reads_the_whole_sequence(variant):
    """The outputs depend on every step and on the order."""
    torch.manual_seed(0)
    inputs = torch.randn(1, 6, 3, requires_grad=True)
    model = RNN(3, 8, 4, **variant)
    model(inputs).sum().backward()
    assert (inputs.grad.abs().sum(dim=2) > 0).all()
    assert not torch.allclose(model(inputs), model(inputs.flip(1)))


def test_last_state_of_both_directions():
    """The outputs of a bidirectional network read the state after the last step and, in reverse, after the first."""
    torch.manual_seed(0)
    model = RNN(3, 8, 4, bidirectional=True, num_layers=2)
    inputs = torch.randn(2, 5, 3)
    states, _ = model.core(inputs)
    expected = model.head(torch.cat((states[:, -1, :8], states[:, 0, 8:]), dim=1))
    torch.testing.assert_close(model(inputs), expected)


def test_dropout_is_for_training():
    """Dropout acts with one layer too, and not in evaluation."""
    torch.manual_seed(0)
    model = RNN(3, 8, 4, dropout=0.5)
    inputs = torch.randn(2, 5, 3)
    assert not torch.equal(model(inputs), model(inputs))
    model.eval()
    assert torch.equal(model(inputs), model(inputs))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"cell": "GRU"}, "cell must be one of 'lstm', 'gru', 'elman', got 'GRU'"),
        ({"input_size": 0}, "input_size must be positive"),
        ({"hidden_size": -1}, "hidden_size must be positive"),
        ({"num_outputs": 0}, "num_outputs must be positive"),
        ({"num_layers": 0}, "num_layers must be positive"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1"),
        ({"dropout": -0.1}, "dropout must be at least 0 and below 1"),
    ],
)
def test_wrong_arguments(arguments, named):
    """The constructor rejects impossible arguments."""
    with pytest.raises(ValueError, match=named):
        RNN(**{"input_size": 3, "hidden_size": 8, "num_outputs": 4, **arguments})


@pytest.mark.parametrize("shape", [(2, 5), (2, 5, 4), (2, 1, 5, 3)])
def test_wrong_shape(shape):
    """The error names the shape of the sequences and the expected one."""
    with pytest.raises(ValueError, match=r"\(N, T, 3\), got"):
        RNN(3, 8, 4)(torch.zeros(shape))


def test_no_step():
    """A sequence without a step is rejected."""
    with pytest.raises(ValueError, match="have no step"):
        RNN(3, 8, 4)(torch.zeros(2, 0, 3))


@pytest.mark.parametrize(
    ("lengths", "named"),
    [
        (torch.tensor([5, 0, 6]), "the length of sequence 1 is 0, expected from 1 to 5"),
        (torch.tensor([5, 1, 6]), "the length of sequence 2 is 6, expected from 1 to 5"),
        (torch.tensor([5, 5]), r"int64 of shape \(3,\), got torch.int64 \(2,\)"),
        (torch.tensor([5.0, 5.0, 5.0]), "got torch.float32"),
    ],
)
def test_wrong_lengths(lengths, named):
    """The error names the row of a length that no sequence of the batch can have."""
    with pytest.raises(ValueError, match=named):
        RNN(3, 8, 4)(torch.zeros(3, 5, 3), lengths)
