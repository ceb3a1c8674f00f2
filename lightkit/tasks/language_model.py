"""A task of language modelling: each token of a text from the tokens before it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import MetricCollection
from torchmetrics.aggregation import MeanMetric

from lightkit._util.compiler import never_compile
from lightkit.models import LanguageModel, decoder
from lightkit.ops import cross_entropy, linear_cross_entropy
from lightkit.tasks.task import Task

# Targets that are ignored, such as padding.
_IGNORED = -100

# The number of tokens of the test set whose losses `test_step` returns: 16 MB in float32.
_RECORDED_TOKENS = 1 << 22

# The number of tokens that one call generates, at most. Chosen: the random numbers of so many take 3 MB with a
# vocabulary of 50,000.
_TOKENS_AT_ONCE = 16


class LanguageModelTask(Task):
    """Trains a `lightkit.models.LanguageModel`.

    A batch is ``(tokens, targets)``, both int64 ``(N, T)``; the target of a token is the next one, and a target of -100
    is ignored. The loss is computed from the hidden states and the head's weight: the logits of a batch, V values a
    token, are never in memory as a whole.

    The task logs ``train/loss`` every step, in nats and with label smoothing and z-loss. It logs ``loss``,
    ``perplexity`` and ``bits_per_byte`` of validation and test as means over all targets, without smoothing and z-loss.
    ``bits_per_byte`` assumes that tokens are bytes.

    Args:
        model: the language model.
        optimizer: a function that returns an optimizer of the given parameters, such as ``partial(AdamW, lr=1e-3)``.
        scheduler: a function that returns a learning-rate scheduler of the given optimizer, which Lightning calls once
            an epoch, or a `lightkit.tasks.Schedule`; None keeps the learning rate.
        label_smoothing: the label smoothing in training, between 0 and 1.
        z_loss: the coefficient of the squared log-partition function in training, see `lightkit.ops.cross_entropy`.

    Raises:
        ValueError: ``model`` is not a `lightkit.models.LanguageModel`.
    """

    model: LanguageModel

    def __init__(
        self,
        model: LanguageModel,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] = torch.optim.AdamW,
        scheduler: Callable[[Optimizer], LRScheduler] | None = None,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
    ) -> None:
        if not isinstance(model, LanguageModel):
            raise ValueError(f"LanguageModelTask takes a LanguageModel, got {type(model).__name__}")
        metrics = {"loss": MeanMetric(), "perplexity": _Perplexity(), "bits_per_byte": _BitsPerByte()}
        super().__init__(model, None, optimizer, scheduler, metrics)
        self.label_smoothing = label_smoothing
        self.z_loss = z_loss
        self._recorded = 0

    def forward(self, tokens: Tensor) -> Tensor:
        """Returns logits ``(N, T, V)`` of the token that follows each of ``tokens`` ``(N, T)``."""
        return self.model(tokens)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Returns and logs the loss of a batch."""
        loss = self._loss(batch, "mean", label_smoothing=self.label_smoothing, z_loss=self.z_loss)
        self.log("train/loss", loss, on_step=True, on_epoch=True, prog_bar=True, batch_size=len(batch[0]))
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Updates the validation metrics."""
        self._evaluate(batch, self.val_metrics)

    def on_test_start(self) -> None:
        """Resets the count of the losses that `test_step` has returned."""
        self._recorded = 0

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor] | None:
        """Updates the test metrics; returns ``losses`` ``(N, T)`` in nats for the first 4 million tokens, then None."""
        losses = self._evaluate(batch, self.test_metrics)
        if self._recorded >= _RECORDED_TOKENS:
            return None
        self._recorded += losses.numel()
        return {"losses": losses}

    def _evaluate(self, batch: tuple[Tensor, Tensor], metrics: MetricCollection) -> Tensor:
        losses = self._loss(batch, "none").float()
        count = (batch[1] != _IGNORED).sum()
        # A batch is weighted by its targets, so that the mean is that over all targets.
        metrics.update(losses.sum() / count.clamp(min=1), count)
        self.log_dict(metrics, prog_bar=True, batch_size=len(batch[0]))
        return losses.view_as(batch[1])

    def _loss(
        self, batch: tuple[Tensor, Tensor], reduction: str, label_smoothing: float = 0.0, z_loss: float = 0.0
    ) -> Tensor:
        inputs, targets = batch
        hidden, _ = self.model.hidden(inputs)
        head: Any = self.model.head
        options: Any = {
            "ignore_index": _IGNORED,
            "reduction": reduction,
            "label_smoothing": label_smoothing,
            "z_loss": z_loss,
        }
        if isinstance(head, nn.Identity):
            # The hidden states of an export are its logits.
            return cross_entropy(hidden.flatten(0, 1), targets.flatten(), **options)
        return linear_cross_entropy(
            hidden.flatten(0, 1), head.weight, targets.flatten(), linear_bias=head.bias, **options
        )

    @torch.inference_mode()
    def generate(
        self,
        prompt: Tensor,
        length: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
        weights: str = "float32",
        cache: str = "float32",
    ) -> Tensor:
        """Continues a text token by token, natively where `lightkit.models.decoder` does.

        When the context of the model is full, the model reads the last half of the context again. The model thus always
        sees between half of its context and the whole context, at positions that occurred in training.

        Args:
            prompt: the beginning of the text, int64 ``(P)`` with P at least 1, on any device.
            length: the number of tokens to add.
            temperature: the divisor of the logits: values below 1 make likely tokens likelier, 0 takes the likeliest
                token.
            top_k: the number of the likeliest tokens from which the method chooses. Default: all tokens.
            generator: the generator of the random choices. Default: torch's global one.
            weights: the precision of the weights, ``"float32"`` or ``"int8"``, see `lightkit.models.decoder`.
            cache: the precision of the keys and values of a transformer, likewise.

        Returns:
            The added tokens, int64 ``(length)``, on the device of the model.

        Raises:
            ConfigError: a precision is unknown, or int8 is asked for where the native library does not decode the
                model.
            ValueError: the prompt is empty, an argument is out of its range, or a token is not in the vocabulary.
        """
        if prompt.dim() != 1 or len(prompt) == 0:
            raise ValueError(f"the prompt must be of shape (P) with P at least 1, got {tuple(prompt.shape)}")
        if length < 0 or temperature < 0 or (top_k is not None and top_k < 1):
            raise ValueError(
                "length and temperature must not be negative, top_k must be at least 1, "
                f"got {length}, {temperature} and {top_k}"
            )
        tokens = torch.cat((prompt.to(self.device), prompt.new_empty(length, device=self.device)))
        was_training = self.training
        self.eval()
        try:
            # torch.compile would compile for every length of the state, which takes longer than the generation.
            with never_compile():
                room = min(self.model.context or len(tokens), len(tokens))
                reader = decoder(self.model, weights, cache, max_tokens=room)
                extend = partial(reader.extend, temperature=temperature, top_k=top_k, generator=generator)
                self._continue(tokens, len(prompt), extend, reader.reset)
        finally:
            self.train(was_training)
        return tokens[len(prompt) :]

    def _continue(
        self, tokens: Tensor, given: int, extend: Callable[[Tensor, int], Tensor], reset: Callable[[], None]
    ) -> None:
        """Generates the tokens from index ``given`` on, in place in ``tokens``.

        Args:
            tokens: the prompt and room for the tokens to add, ``(P + length)``.
            given: the length of the prompt, P.
            extend: a function that reads tokens ``(1, T)`` and returns that number of further ones ``(1, count)``, of
                which it has read all except the last.
            reset: a function that forgets the tokens that were read.
        """
        context = self.model.context or len(tokens)
        # The start of the present window, the number of its tokens that were read, and the next token to add.
        start, read, end = max(0, given - context), 0, given
        while end < len(tokens):
            if end - start > context:
                start, read = end - (context + 1) // 2, 0
                reset()
            count = min(len(tokens) - end, start + context + 1 - end, _TOKENS_AT_ONCE)
            tokens[end : end + count] = extend(tokens[None, start + read : end], count)[0]
            end += count
            read = end - 1 - start


class _Perplexity(MeanMetric):
    """The exponential of the mean of losses in nats."""

    def compute(self) -> Tensor:
        return super().compute().exp()


class _BitsPerByte(MeanMetric):
    """The mean of losses in nats, converted by `compute` to bits; the loss of one token is that of one byte."""

    def compute(self) -> Tensor:
        return super().compute() / math.log(2)
