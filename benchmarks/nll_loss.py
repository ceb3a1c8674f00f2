"""How fast is the negative log-likelihood of a log-softmax as one cross-entropy, next to torch's two functions?

    python benchmarks/nll_loss.py [--threads 2] [--seconds 3]

Each shape is measured forward and backward together, from the logits to their gradient. The log-probabilities are
torch's in both. Freed memory is kept, as in a job of lightkit.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from layers import run

from lightkit.ops import _thresholds, patch_nll_loss

SHAPES = ((64, 10), (256, 100), (4096, 10), (128, 1000), (4096, 1000), (512, 32000))


def calls(shape: tuple[int, int]) -> dict[str, Callable[[], object]]:
    """Forward and backward of one shape."""
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
    target = torch.arange(shape[0]) % shape[1]

    def both() -> object:
        return torch.autograd.grad(F.nll_loss(F.log_softmax(logits, 1), target), logits)

    def patched() -> object:
        with patch_nll_loss():
            return both()

    return {"eager": both, "kernel": patched}


def main() -> None:
    # The kernel is measured below the limit, too.
    _thresholds.MIN_NLL_LOSS = 0
    shapes = {"x".join(map(str, shape)): partial(calls, shape) for shape in SHAPES}
    run("nll_loss", str(__doc__).splitlines()[0], shapes, 3.0, column="shape")


if __name__ == "__main__":
    main()
