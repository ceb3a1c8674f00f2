"""A patch of :func:`torch.nn.functional.nll_loss` behind a log-softmax, for code that does not call lightkit."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from lightkit import native
from lightkit.errors import ArgumentError
from lightkit.ops import _thresholds
from lightkit.ops._code_patch import CodePatch
from lightkit.ops._dispatch import REDUCTIONS, kernels_apply


def patch_nll_loss() -> AbstractContextManager[None]:
    """Patches :func:`torch.nn.functional.nll_loss` in this thread: behind a log-softmax it runs on lightkit's kernels.

    Where the log-probabilities are the result of torch's log-softmax, by any function, method or module, loss and
    gradient are those of `lightkit.ops.cross_entropy`, in one pass over the log-probabilities. Backward passes the
    log-softmax by, unless a program observes the gradient of the log-probabilities: by a hook, by ``retain_grad`` or by
    :func:`torch.autograd.grad`. The log-probabilities are torch's.

    The kernel takes float32 and float64 on a CPU, if a gradient is needed, and not less than 32,768 log-probabilities:
    torch is as fast for fewer. Torch runs the other calls. The patch reaches the references that
    `lightkit.ops.patch_cross_entropy` reaches, among them :class:`torch.nn.NLLLoss`.

    Returns:
        The context within which the function is patched. To enter it raises a RuntimeError if the function cannot be
        patched: ``PATCH.unsupported_reason()`` tells the reason.
    """
    return PATCH.applied()


def _entrance(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    from lightkit.ops.patch_nll import _choose

    return _choose(input, target, weight, size_average, ignore_index, reduce, reduction)


def _choose(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    size_average: bool | None,
    ignore_index: int,
    reduce: bool | None,
    reduction: str,
) -> Tensor:
    if (
        PATCH.applies_to(input, target)
        and isinstance(input, Tensor)
        and input.numel() >= _thresholds.MIN_NLL_LOSS
        and _is_log_softmax(input)
        and size_average is None
        and reduce is None
        and type(ignore_index) is int
        and kernels_apply(input)
    ):
        loss = _nll_loss(input, target, weight, REDUCTIONS.get(reduction, -1), ignore_index)
        if loss is not NotImplemented:
            return loss
    return PATCH.torchs_function(input, target, weight, size_average, ignore_index, reduce, reduction)


def _is_log_softmax(input: Tensor) -> bool:
    """Returns True if a tensor is the result of torch's log-softmax over the classes."""
    node = input.grad_fn
    if node is None or type(node).__name__ != "LogSoftmaxBackward0" or type(input) is not Tensor:
        return False
    # The node has a negative dimension as an unsigned number.
    dim = node._saved_dim  # pyright: ignore[reportAttributeAccessIssue]
    dim = dim - (1 << 64) if dim >= 1 << 63 else dim
    return dim % input.dim() == (1 if input.dim() > 1 else 0)


def _nll_loss(input: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore_index: int) -> Any:
    """Returns the loss; NotImplemented if torch computes it."""
    library = native.load()
    assert library is not None
    try:
        return library.nll_loss(input, target, weight, reduction, ignore_index)
    except ValueError as error:
        raise ArgumentError(str(error)) from None


PATCH = CodePatch("nll_loss", _entrance)
