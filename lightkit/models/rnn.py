"""The recurrent network that makes one prediction of a whole sequence."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

_CELLS = {"lstm": nn.LSTM, "gru": nn.GRU, "elman": nn.RNN}


class RNN(nn.Module):
    """Recurrent layers, and a linear map of the state in which the last one ends.

    A classifier of sequences with one output a class, a forecaster with one output a step ahead. Sequences of
    different lengths are padded to that of the longest: with ``lengths`` each ends in the state after its own last
    step, or, against the direction of time, after its own first one. What stands in the padding changes nothing.

    Args:
        input_size: values of one step, F.
        hidden_size: values of the state of a layer and direction.
        num_outputs: values predicted of a sequence.
        num_layers: recurrent layers, each reading the states of the one before.
        cell: ``"lstm"`` [1]_, ``"gru"`` [2]_ or ``"elman"`` [3]_, the plain one with tanh.
        bidirectional: a second set of layers reads from the end; the outputs see the states of both.
        dropout: share of the states zeroed in training, between the layers and before the outputs.

    Shape:
        Sequences ``(N, T, F)``, floating point, and lengths ``(N)``, int64, from 1 to T, or None if all have T
        steps -> ``(N, num_outputs)``.

    Raises:
        ValueError: an argument is out of its range; an input of another shape, without a step, or with a length
            that is not from 1 to T (names the row).

    References:
        .. [1] Hochreiter and Schmidhuber, Long Short-Term Memory, Neural Computation 1997.
        .. [2] Cho et al., Learning Phrase Representations using RNN Encoder-Decoder, EMNLP 2014.
        .. [3] Elman, Finding Structure in Time, Cognitive Science 1990.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_outputs: int,
        num_layers: int = 1,
        cell: str = "lstm",
        bidirectional: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if num_outputs < 1:
            raise ValueError(f"num_outputs must be positive, got {num_outputs}")
        self.input_size = input_size
        self.core = recurrent_layers(cell, input_size, hidden_size, num_layers, dropout, bidirectional)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(hidden_size * (2 if bidirectional else 1), num_outputs)

    def forward(self, sequences: Tensor, lengths: Tensor | None = None) -> Tensor:
        """The outputs for a batch of sequences."""
        if sequences.dim() != 3 or sequences.shape[2] != self.input_size:
            raise ValueError(f"RNN takes sequences of shape (N, T, {self.input_size}), got {tuple(sequences.shape)}")
        if sequences.shape[1] == 0:
            raise ValueError(f"the sequences have no step: their shape is {tuple(sequences.shape)}")
        if lengths is None:
            _, state = self.core(sequences)
        else:
            # Packing takes lengths on the CPU, wherever the sequences are.
            lengths = lengths.cpu()
            _check_lengths(lengths, sequences)
            packed = pack_padded_sequence(sequences, lengths, batch_first=True, enforce_sorted=False)
            _, state = self.core(packed)
        # (layers and directions, N, hidden_size): of an LSTM the hidden state, not the cell's.
        ends = state[0] if isinstance(state, tuple) else state
        last = torch.cat((ends[-2], ends[-1]), dim=1) if self.core.bidirectional else ends[-1]
        return self.head(self.dropout(last))


def recurrent_layers(
    cell: str, input_size: int, hidden_size: int, num_layers: int, dropout: float, bidirectional: bool = False
) -> nn.RNNBase:
    """Recurrent layers of torch that read ``(N, T, input_size)``, with dropout between them; see `RNN`.

    Raises:
        ValueError: an argument is out of its range.
    """
    if cell not in _CELLS:
        raise ValueError(f"cell must be one of {', '.join(map(repr, _CELLS))}, got {cell!r}")
    sizes = {"hidden_size": hidden_size, "input_size": input_size, "num_layers": num_layers}
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name} must be positive, got {value}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be at least 0 and below 1, got {dropout}")
    return _CELLS[cell](
        input_size,
        hidden_size,
        num_layers,
        batch_first=True,
        # torch warns of a dropout between one layer and nothing.
        dropout=dropout if num_layers > 1 else 0.0,
        bidirectional=bidirectional,
    )


def _check_lengths(lengths: Tensor, sequences: Tensor) -> None:
    count, steps = sequences.shape[:2]
    if lengths.shape != (count,) or lengths.dtype != torch.int64:
        raise ValueError(f"lengths must be int64 of shape ({count},), got {lengths.dtype} {tuple(lengths.shape)}")
    wrong = ((lengths < 1) | (lengths > steps)).nonzero()
    if len(wrong):
        row = int(wrong[0])
        raise ValueError(f"the length of sequence {row} is {int(lengths[row])}, expected from 1 to {steps}")
