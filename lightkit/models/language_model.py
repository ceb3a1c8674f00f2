"""The base of language models: an embedding, a body that reads the tokens before, and a head."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class LanguageModel(nn.Module):
    """Predicts each token of a text from the tokens before it.

    `hidden` runs everything except the head, for losses without logits (`lightkit.ops.linear_cross_entropy`) and for
    generation: its state represents the tokens that the model has read and need not read again.

    Args:
        vocab_size: the number of different tokens, V.
        embedding_size: the size of an embedding, the input of the body.
        hidden_size: the size of a hidden state, the output of the body, D.
        body: a module that maps ``(embedded (N, T, embedding_size), state or None)`` to ``(hidden (N, T, D), state)``.
        tie_weights: True uses the embedding's weight in the head [1]_. The state dict has the weight under both names.
        context: the largest number of tokens that the body can read; None sets no limit.

    Shape:
        Tokens ``(N, T)``, int64 in ``[0, V)`` -> logits ``(N, T, V)``.

    Raises:
        ValueError: an argument is out of its range; the input has another shape, no token, more than ``context`` tokens
            or a token outside of the vocabulary, which is named. On a GPU a check of the tokens would wait for the
            device: there torch fails an assertion on the device.

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
        self.head: nn.Module = nn.Linear(hidden_size, vocab_size, bias=False)
        if tie_weights:
            self.head.weight = self.embedding.weight

    def hidden(self, tokens: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Returns the hidden states ``(N, T, D)`` of tokens ``(N, T)`` and the state after them.

        Args:
            tokens: the tokens, int64 in ``[0, V)``.
            state: the state after the preceding tokens, as this method returned it; None at the beginning of a text.
        """
        if tokens.dim() != 2 or tokens.shape[1] == 0:
            raise ValueError(f"tokens must have the shape (N, T) with T at least 1, got {tuple(tokens.shape)}")
        try:
            embedded = self.embedding(tokens)
        except IndexError as error:
            # torch has checked every token, except that its error does not name the wrong one.
            wrong = tokens[(tokens < 0) | (tokens >= self.vocab_size)]
            raise ValueError(f"token {int(wrong[0])} is not in the vocabulary of {self.vocab_size}") from error
        return self.body(embedded, state)

    def forward(self, tokens: Tensor) -> Tensor:
        """Returns the logits ``(N, T, V)`` of the token that follows each of ``tokens`` ``(N, T)``."""
        return self.head(self.hidden(tokens)[0])

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compiles the body in place with the arguments of ``nn.Module.compile``.

        Both `hidden` and `forward` run the compiled body. The embedding is not compiled, so that errors name a wrong
        token; the head is part of the loss.
        """
        self.body.compile(*args, **kwargs)
