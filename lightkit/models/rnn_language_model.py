"""A recurrent language model."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lightkit.models.arguments import keeps_arguments
from lightkit.models.language_model import LanguageModel
from lightkit.models.rnn import recurrent_layers


@keeps_arguments
class RNNLanguageModel(LanguageModel):
    """Recurrent layers between an embedding and a head, see [1]_.

    Args:
        vocab_size: the number of different tokens.
        hidden_size: the size of the state of a layer.
        embedding_size: the size of an embedding. Default: ``hidden_size``.
        num_layers: the number of recurrent layers.
        cell: ``"lstm"``, ``"gru"`` or ``"elman"``, see `lightkit.models.RNN`.
        dropout: the dropout probability of the embeddings and after every layer.
        tie_weights: True uses the embedding's weight in the head; ``embedding_size`` must then equal ``hidden_size``.

    Shape, state and errors: see `LanguageModel`. The state is that of torch's recurrent layers.

    References:
        .. [1] Mikolov et al., Recurrent Neural Network Based Language Model, Interspeech 2010.
    """

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        embedding_size: int | None = None,
        num_layers: int = 1,
        cell: str = "lstm",
        dropout: float = 0.0,
        tie_weights: bool = False,
    ) -> None:
        embedding_size = hidden_size if embedding_size is None else embedding_size
        body = _Recurrent(recurrent_layers(cell, embedding_size, hidden_size, num_layers, dropout), dropout)
        super().__init__(vocab_size, embedding_size, hidden_size, body, tie_weights)
        # torch draws the layers from this range. Its standard normal embedding, as a tied head, would start with a loss
        # of dozens.
        nn.init.uniform_(self.embedding.weight, -(hidden_size**-0.5), hidden_size**-0.5)


class _Recurrent(nn.Module):
    """Recurrent layers with dropout before the first and after the last."""

    def __init__(self, core: nn.RNNBase, dropout: float) -> None:
        super().__init__()
        self.core = core
        self.dropout = nn.Dropout(dropout)

    def forward(self, embedded: Tensor, state: Any) -> tuple[Tensor, Any]:
        hidden, state = self.core(self.dropout(embedded), state)
        return self.dropout(hidden), state
