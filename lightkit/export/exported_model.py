"""An export in the place of a model: an ``nn.Module`` whose forward runs a runtime."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightkit.export.runtime import Runtime
from lightkit.models import LanguageModel


class ExportedModel(nn.Module):
    """Maps tensors to the output of an export, on the device of the inputs.

    The module has no parameters, and evaluation is its only mode: ``train()`` changes nothing.

    Args:
        runtime: the export.

    Raises:
        ValueError: an input has another shape than the export takes, or there is another number of inputs.
    """

    def __init__(self, runtime: Runtime) -> None:
        super().__init__()
        self.runtime = runtime
        self.eval()

    def forward(self, *inputs: Tensor) -> Tensor:
        """Returns the output ``(N, ...)``, floating point."""
        return _run(self.runtime, *inputs)


class ExportedLanguageModel(LanguageModel):
    """A language model whose logits are those of an export.

    An export of a fixed length gets shorter texts with zeros behind them, on which no logits before them depend. The
    state is the tokens that were read, which the export reads again for each further token: the time of a
    continuation is quadratic in its length. The head is the identity, and the hidden states are the logits.

    Args:
        runtime: the export, of one input, tokens ``(N, T)``, and one output, logits ``(N, T, V)``.
        vocab_size: the number of different tokens, V.
    """

    def __init__(self, runtime: Runtime, vocab_size: int) -> None:
        nn.Module.__init__(self)
        self.runtime = runtime
        self.vocab_size = vocab_size
        size = runtime.inputs[0].shape[1]
        self._fixed_length = size if isinstance(size, int) else None
        self.context = self._fixed_length or runtime.inputs[0].max_length
        self.head = nn.Identity()
        self.eval()

    def hidden(self, tokens: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Returns the logits ``(N, T, V)`` of tokens ``(N, T)``, and all tokens so far."""
        wrong = tokens[(tokens < 0) | (tokens >= self.vocab_size)]
        if len(wrong):
            raise ValueError(f"token {int(wrong[0])} is not in the vocabulary of {self.vocab_size}")
        whole = tokens if state is None else torch.cat((state, tokens), dim=1)
        count = whole.shape[1]
        padding = max(0, (self._fixed_length or 0) - count)
        logits = _run(self.runtime, nn.functional.pad(whole, (0, padding)))
        return logits[:, count - tokens.shape[1] : count], whole

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing: the runtime has compiled the model."""


def _run(runtime: Runtime, *inputs: Tensor) -> Tensor:
    if len(inputs) != len(runtime.inputs):
        names = ", ".join(spec.name for spec in runtime.inputs)
        raise ValueError(f"the export takes {names}, got {len(inputs)} inputs")
    arrays = [
        spec.check(value.detach().cpu().to(getattr(torch, spec.dtype)).numpy())
        for spec, value in zip(runtime.inputs, inputs, strict=True)
    ]
    output = torch.from_numpy(runtime.run(arrays)).to(inputs[0].device)
    if output.dim() < 1 or len(output) != len(inputs[0]):
        raise ValueError(f"the export returns a tensor {tuple(output.shape)} for {len(inputs[0])} samples")
    return output
