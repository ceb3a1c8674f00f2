"""Decoders, which read the tokens of texts one by one and keep what a language model remembers of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from lightkit.errors import ConfigError
from lightkit.models.language_model import LanguageModel
from lightkit.models.native_decoding import native_decoder, unsupported_reason

# The bits of a number by the name of its precision.
_BITS = {"float32": 32, "int8": 8}


class Decoder(ABC):
    """Reads the tokens of N sequences side by side, and generates further ones; the function `decoder` makes one.

    The state of the sequences stays in the decoder: each call goes on after the tokens of the calls before. A native
    decoder keeps the weights that the model had when the decoder was made; make another one after they have changed.
    """

    @abstractmethod
    def read(self, tokens: Tensor, every: bool = False) -> Tensor:
        """Reads the next tokens of each sequence, and returns the logits of the token after them.

        Args:
            tokens: the tokens, int64 or int32 ``(N, T)`` in ``[0, V)``, with T at least 1, on the device of the model.
            every: True returns the logits after each of the T tokens.

        Returns:
            float32 ``(N, V)``, or with ``every`` ``(N, T, V)``. The logits have no gradient.

        Raises:
            ValueError: the shape or a token does not fit, or there is no room for so many tokens. The state stays that
                before the call.
        """

    @abstractmethod
    def extend(
        self,
        tokens: Tensor,
        count: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Reads the next tokens of each sequence, and generates ``count`` further ones.

        The decoder reads each generated token before it generates the next one. It has not read the last one, with
        which the next call begins.

        Args:
            tokens: as for `read`.
            count: the number of tokens to generate for each sequence, at least 1. Their random numbers take
                ``4 * count * N * V`` bytes.
            temperature: the divisor of the logits, at least 0; 0 takes the likeliest token.
            top_k: the number of the likeliest tokens from which the decoder chooses, at least 1. Default: all.
            generator: the generator of the random choices. Default: torch's global one.

        Returns:
            int64 ``(N, count)``, on the device of the model.

        Raises:
            ValueError: as for `read`, or an argument is out of its range.
            RuntimeError: the probabilities are NaN, since the model has diverged.
        """

    @abstractmethod
    def reset(self) -> None:
        """Forgets the tokens that were read."""


class _NativeDecoder(Decoder):
    """A decoder whose calls are one call each of the native library."""

    def __init__(self, decoder: Any, sequences: int, vocab_size: int) -> None:
        self._decoder = decoder
        self._sequences = sequences
        self._vocab_size = vocab_size

    def read(self, tokens: Tensor, every: bool = False) -> Tensor:
        return self._decoder.read(_as_int64(tokens), every)

    def extend(
        self,
        tokens: Tensor,
        count: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        _check_sampling(count, temperature, top_k)
        draws = None
        if temperature > 0:
            draws = torch.empty(count, self._sequences, self._vocab_size)
            # torch.multinomial makes one call for each token: a call for all would draw other numbers.
            for row in draws.flatten(0, 1).unbind():
                row.exponential_(generator=generator)
        top_k = self._vocab_size if top_k is None else top_k
        return self._decoder.extend(_as_int64(tokens), count, temperature, top_k, draws)

    def reset(self) -> None:
        self._decoder.reset()


class _TorchDecoder(Decoder):
    """A decoder that calls the model."""

    def __init__(self, model: LanguageModel, sequences: int, max_tokens: int | None) -> None:
        self._model = model
        self._sequences = sequences
        self._max_tokens = max_tokens
        self._read = 0
        self._state: Any = None

    @torch.no_grad()
    def read(self, tokens: Tensor, every: bool = False) -> Tensor:
        if tokens.dim() != 2 or len(tokens) != self._sequences:
            raise ValueError(
                f"the tokens must have the shape ({self._sequences}, T) with T at least 1, got {tuple(tokens.shape)}"
            )
        read = self._read + tokens.shape[1]
        if self._max_tokens is not None and read > self._max_tokens:
            raise ValueError(
                f"the decoder reads {self._max_tokens} tokens at most, got {tokens.shape[1]} after {self._read}"
            )
        hidden, state = self._model.hidden(tokens, self._state)
        logits = self._model.head(hidden if every else hidden[:, -1]).float()
        self._state, self._read = state, read
        return logits

    def extend(
        self,
        tokens: Tensor,
        count: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        _check_sampling(count, temperature, top_k)
        added = []
        for _ in range(count):
            logits = self.read(tokens)
            tokens = torch.stack([_choose(row, temperature, top_k, generator) for row in logits])[:, None]
            added.append(tokens)
        return torch.cat(added, dim=1)

    def reset(self) -> None:
        self._state, self._read = None, 0


def _as_int64(tokens: Tensor) -> Tensor:
    return tokens.long() if tokens.dtype == torch.int32 else tokens


def _check_sampling(count: int, temperature: float, top_k: int | None) -> None:
    if count < 1 or not temperature >= 0 or (top_k is not None and top_k < 1):
        raise ValueError(
            "count and top_k must be at least 1, temperature must not be negative, "
            f"got {count}, {top_k} and {temperature}"
        )


def _choose(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    """Draws a token from logits ``(V)``; returns an int64 scalar."""
    if temperature == 0:
        return logits.argmax()
    if top_k is not None and top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], -torch.inf)
    return (logits / temperature).softmax(dim=0).multinomial(1, generator=generator)[0]


def decoder(
    model: LanguageModel,
    weights: str = "float32",
    cache: str = "float32",
    sequences: int = 1,
    max_tokens: int | None = None,
) -> Decoder:
    """Returns a decoder of a language model.

    On a CPU the native library decodes a `Transformer` or an `RNNLanguageModel` with float32 parameters: one call a
    token, which takes a fraction of the time of torch's operations and gives the same logits up to rounding. The
    decoder calls the model itself where the library does not apply: on another device, in another dtype, under
    autocast, with dropout in training mode, or where a layer has a hook or is of another class, so that it runs.

    In int8 each row of a matrix, and each key and value of a head, is rounded to the multiples of the 127th part of its
    largest magnitude; the activations stay float32. Weights in int8 take a quarter of the memory, and are read faster.

    Args:
        model: the language model, in evaluation mode or without dropout.
        weights: the precision of embedding, layers and head: ``"float32"`` or ``"int8"``.
        cache: the precision of the keys and values of a transformer: ``"float32"`` or ``"int8"``.
        sequences: the number of sequences N, from 1 to 2^20.
        max_tokens: the number of tokens of a transformer for whose keys and values the decoder has room. Default: the
            context of the model.

    Raises:
        ConfigError: a precision is unknown, or int8 is asked for where the native library does not decode the model,
            for a reason that the message has.
        ValueError: ``sequences`` or ``max_tokens`` is out of its range.
    """
    for name, value in (("weights", weights), ("cache", cache)):
        if value not in _BITS:
            raise ConfigError(f"{name} must be one of {', '.join(map(repr, _BITS))}, got {value!r}")
    if not 1 <= sequences <= 1 << 20:
        raise ValueError(f"sequences must be from 1 to {1 << 20}, got {sequences}")
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"max_tokens must be positive, got {max_tokens}")
    reason = unsupported_reason(model)
    if reason is None:
        native = native_decoder(model, _BITS[weights], _BITS[cache], sequences, max_tokens)
        return _NativeDecoder(native, sequences, model.vocab_size)
    for name, value in (("weights", weights), ("cache", cache)):
        if value != "float32":
            raise ConfigError(f"{name}={value!r} needs the native decoder, which does not apply: {reason}")
    return _TorchDecoder(model, sequences, None if model.context is None else max_tokens)
