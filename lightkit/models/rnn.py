"""A recurrent network that makes one prediction for a whole sequence."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from lightkit.models.arguments import keeps_arguments

_CELLS: dict[str, Callable[..., nn.RNNBase]] = {"lstm": nn.LSTM, "gru": nn.GRU, "elman": nn.RNN}


@keeps_arguments
class RNN(nn.Module):
    """Recurrent layers and a linear map of the final state of the last layer.

    With one output for each class the model classifies sequences; with one output for each step ahead it forecasts.
    Sequences of different lengths are padded to the longest. With ``lengths`` the final state of a sequence is the
    state after its own last step, and in the reverse direction the state after its first step. The padding does not
    change the result.

    Args:
        input_size: the number of values in a step, F.
        hidden_size: the size of the state of a layer and direction.
        num_outputs: the number of values that the model predicts for a sequence.
        num_layers: the number of recurrent layers.
        cell: ``"lstm"`` [1]_, ``"gru"`` [2]_ or ``"elman"`` [3]_ with tanh.
        bidirectional: True adds layers that read in reverse; the linear map reads the final states of both directions.
        dropout: the dropout probability between the layers and before the linear map.

    Shape:
        Sequences ``(N, T, F)``, floating point, and lengths ``(N)``, int64 from 1 to T, or None if all have T steps
        -> ``(N, num_outputs)``.

    Raises:
        ValueError: an argument is out of its range; the input has another shape, no step, or a length outside of 1 to
            T, whose row is named.

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
        """Returns the outputs ``(N, num_outputs)`` for sequences ``(N, T, F)`` and lengths ``(N)`` or None."""
        if sequences.dim() != 3 or sequences.shape[2] != self.input_size:
            raise ValueError(f"RNN takes sequences of shape (N, T, {self.input_size}), got {tuple(sequences.shape)}")
        if sequences.shape[1] == 0:
            raise ValueError(f"the sequences have no step: their shape is {tuple(sequences.shape)}")
        if lengths is None:
            _, state = self.core(sequences)
        else:
            # pack_padded_sequence takes lengths on the CPU, wherever the sequences are.
            lengths = lengths.cpu()
            _check_lengths(lengths, sequences)
            packed = pack_padded_sequence(sequences, lengths, batch_first=True, enforce_sorted=False)
            _, state = self.core(packed)
        # (num_layers * directions, N, hidden_size). An LSTM returns the hidden state and the cell state.
        ends = state[0] if isinstance(state, tuple) else state
        last = torch.cat((ends[-2], ends[-1]), dim=1) if self.core.bidirectional else ends[-1]
        return self.head(self.dropout(last))


def recurrent_layers(
    cell: str, input_size: int, hidden_size: int, num_layers: int, dropout: float, bidirectional: bool = False
) -> nn.RNNBase:
    """Builds recurrent layers of torch for inputs ``(N, T, input_size)``, with dropout between the layers; see `RNN`.

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
        # torch warns of dropout with one layer.
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
