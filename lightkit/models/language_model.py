"""What all language models are: an embedding of tokens, a body that looks back, and a head that makes logits."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class LanguageModel(nn.Module):
    """Predicts each token of a text from those before it.

    `hidden` has everything but the head, for losses that need no logits (`lightkit.ops.linear_cross_entropy`) and
    for text made token by token: the state that it returns stands for all that has been read, so that reading on
    costs no second look at it.

    Args:
        vocab_size: number of different tokens, V.
        embedding_size: values that the body reads of a token.
        hidden_size: values that the body says of a token, D.
        body: maps ``(embedded (N, T, embedding_size), state or None)`` to ``(hidden (N, T, D), state)``.
        tie_weights: the head's weight is the embedding's, see [1]_. It stands in the state dict under both names.
        context: most tokens that the body can look back on, or None if there is no such bound.

    Shape:
        Tokens ``(N, T)``, int64 in ``[0, V)`` -> logits ``(N, T, V)``.

    Raises:
        ValueError: an argument is out of its range; an input of another shape, or without a token, or longer than
            ``context``; a token that is not in the vocabulary, which is named (on a GPU, where looking would mean
            waiting, torch fails an assertion on the device instead).

    References:
        .. [1] Press and Wolf, Using the Output Embedding to Improve Language Models, EACL 2017.
    """

    def __init__(
        self,
        vocab_size: int,
        embedding_size: int,
        hidden_size: int,
        body: nn.Module,
        tie_weights: bool,
        context: int | None = None,
    ) -> None:
        super().__init__()
        if vocab_size < 1:
            raise ValueError(f"vocab_size must be positive, got {vocab_size}")
        if context is not None and context < 1:
            raise ValueError(f"context must be positive, got {context}")
        if tie_weights and embedding_size != hidden_size:
            raise ValueError(
                f"tie_weights needs an embedding as wide as the hidden state, got {embedding_size} and {hidden_size}"
            )
        self.vocab_size = vocab_size
        self.context = context
        self.embedding = nn.Embedding(vocab_size, embedding_size)
        self.body = body
        self.head = nn.Linear(hidden_size, vocab_size, bias=False)
        if tie_weights:
            self.head.weight = self.embedding.weight

    def hidden(self, tokens: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Hidden states ``(N, T, D)`` of tokens ``(N, T)`` that follow those behind ``state``, and the state after."""
        if tokens.dim() != 2 or tokens.shape[1] == 0:
            raise ValueError(f"tokens must have the shape (N, T) with T at least 1, got {tuple(tokens.shape)}")
        try:
            embedded = self.embedding(tokens)
        except IndexError as error:
            # torch has looked at every token already, and says no more than that one is wrong.
            wrong = tokens[(tokens < 0) | (tokens >= self.vocab_size)]
            raise ValueError(f"token {int(wrong[0])} is not in the vocabulary of {self.vocab_size}") from error
        return self.body(embedded, state)

    def forward(self, tokens: Tensor) -> Tensor:
        """The logits of the token after each."""
        return self.head(self.hidden(tokens)[0])

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compiles the body in place, see ``nn.Module.compile``: both `hidden` and `forward` run it.

        The embedding stays outside, where it names a wrong token, and the head belongs to the loss.
        """
        self.body.compile(*args, **kwargs)
