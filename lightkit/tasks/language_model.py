"""Language modelling: each token of a text from those before it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics.aggregation import MeanMetric

from lightkit._util.compiler import never_compile
from lightkit.models import LanguageModel
from lightkit.ops import linear_cross_entropy
from lightkit.tasks.task import Task

# Targets that count for nothing, such as padding.
_IGNORED = -100

# Tokens of the test set whose losses are handed on: some 16 MB.
_RECORDED_TOKENS = 1 << 22


class LanguageModelTask(Task):
    """Trains a `lightkit.models.LanguageModel`.

    A batch holds tokens and their successors, both int64 ``(N, T)``; a target of -100 counts for nothing. The loss
    is taken from the hidden states and the weight of the head, so that the logits of a batch, V values for each
    token, need never be there as a whole.

    Logs ``train/loss`` every step, in nats and with what smoothing and z-loss add; of validation and test ``loss``,
    ``perplexity`` and ``bits_per_byte``, each over all targets alike, without such additions. The last holds for
    texts whose tokens are bytes.

    Args:
        model: the language model.
        optimizer: makes the optimizer of an iterable of parameters, such as ``partial(AdamW, lr=1e-3)``.
        scheduler: makes the learning-rate scheduler of the optimizer; stepped once an epoch.
        label_smoothing: in training, between 0 and 1.
        z_loss: in training, the coefficient of the squared log-partition function, see
            `lightkit.ops.cross_entropy`.
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
        """Logits ``(N, T, V)``."""
        return self.model(tokens)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss of a batch."""
        loss = self._loss(batch, "mean", label_smoothing=self.label_smoothing, z_loss=self.z_loss)
        self.log("train/loss", loss, on_step=True, on_epoch=True, prog_bar=True, batch_size=len(batch[0]))
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Feeds the validation metrics."""
        self._evaluate(batch, self.val_metrics)

    def on_test_start(self) -> None:
        """Starts to record anew."""
        self._recorded = 0

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor] | None:
        """Feeds the test metrics; returns ``losses`` ``(N, T)`` in nats, of the first millions of tokens."""
        losses = self._evaluate(batch, self.test_metrics)
        if self._recorded >= _RECORDED_TOKENS:
            return None
        self._recorded += losses.numel()
        return {"losses": losses}

    def _evaluate(self, batch: tuple[Tensor, Tensor], metrics: nn.Module) -> Tensor:
        losses = self._loss(batch, "none").float()
        count = (batch[1] != _IGNORED).sum()
        # Weighed by its targets: the mean over batches of different sizes is that over all targets.
        metrics.update(losses.sum() / count.clamp(min=1), count)
        self.log_dict(metrics, prog_bar=True, batch_size=len(batch[0]))
        return losses.view_as(batch[1])

    def _loss(self, batch: tuple[Tensor, Tensor], reduction: str, **options: float) -> Tensor:
        inputs, targets = batch
        hidden, _ = self.model.hidden(inputs)
        head = self.model.head
        return linear_cross_entropy(
            hidden.flatten(0, 1),
            head.weight,
            targets.flatten(),
            linear_bias=head.bias,
            ignore_index=_IGNORED,
            reduction=reduction,
            **options,
        )

    @torch.inference_mode()
    def generate(
        self,
        prompt: Tensor,
        length: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continues a text token by token.

        A model with a bound on what it looks at reads the last half of that anew whenever it is full, so that it
        always sees between half of its context and all of it, at places that it knows from training.

        Args:
            prompt: what the text starts with, int64 ``(P)`` with P at least 1, on any device.
            length: tokens to add.
            temperature: divides the logits: below 1 makes likely tokens likelier, 0 takes the likeliest one.
            top_k: choose among that many of the likeliest tokens. Default: all.
            generator: of the random choices. Default: torch's own.

        Returns:
            The tokens that were added, int64 ``(length)``, on the device of the model.

        Raises:
            ValueError: an empty prompt, an argument out of its range, a token that is not in the vocabulary.
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
            # Compiling for every length of the state would take longer than all of it.
            with never_compile():
                self._continue(tokens, len(prompt), temperature, top_k, generator)
        finally:
            self.train(was_training)
        return tokens[len(prompt) :]

    def _continue(
        self, tokens: Tensor, given: int, temperature: float, top_k: int | None, generator: torch.Generator | None
    ) -> None:
        """Fills tokens up from the first ones, that many of which are given."""
        context = self.model.context or len(tokens)
        # Of the window at hand: where it starts, and what of it stands behind the state.
        start, read, state = max(0, given - context), 0, None
        for end in range(given, len(tokens)):
            if end - start > context:
                start, read, state = end - (context + 1) // 2, 0, None
            hidden, state = self.model.hidden(tokens[None, start + read : end], state)
            read = end - start
            logits = self.model.head(hidden[0, -1]).float()
            tokens[end] = _choose(logits, temperature, top_k, generator)


def _choose(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    """A token by its logits ``(V)``."""
    if temperature == 0:
        return logits.argmax()
    if top_k is not None and top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], -torch.inf)
    return (logits / temperature).softmax(dim=0).multinomial(1, generator=generator)[0]


class _Perplexity(MeanMetric):
    """The exponential of the mean loss, which is not the mean of exponentials."""

    def compute(self) -> Tensor:
        return super().compute().exp()


class _BitsPerByte(MeanMetric):
    """The mean loss in bits."""

    def compute(self) -> Tensor:
        return super().compute() / math.log(2)
