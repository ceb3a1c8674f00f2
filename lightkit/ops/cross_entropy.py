"""Cross-entropy of logits, with the loss and its gradient computed in one pass over them."""

from __future__ import annotations

from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from lightkit import native
from lightkit.errors import ArgumentError
from lightkit.ops._dispatch import REDUCTIONS, check_reduction, is_autocast_device, kernels_apply


@overload
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = ...,
    ignore_index: int = ...,
    reduction: str = ...,
    label_smoothing: float = ...,
    *,
    z_loss: float = ...,
    softcap: float = ...,
    dtype: torch.dtype | None = ...,
    return_lse: Literal[False] = ...,
    inplace: bool = ...,
) -> Tensor: ...
@overload
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = ...,
    ignore_index: int = ...,
    reduction: str = ...,
    label_smoothing: float = ...,
    *,
    z_loss: float = ...,
    softcap: float = ...,
    dtype: torch.dtype | None = ...,
    return_lse: Literal[True],
    inplace: bool = ...,
) -> tuple[Tensor, Tensor]: ...
@overload
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = ...,
    ignore_index: int = ...,
    reduction: str = ...,
    label_smoothing: float = ...,
    *,
    z_loss: float = ...,
    softcap: float = ...,
    dtype: torch.dtype | None = ...,
    return_lse: bool,
    inplace: bool = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    dtype: torch.dtype | None = None,
    return_lse: bool = False,
    inplace: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Computes cross-entropy on native kernels; a drop-in for :func:`torch.nn.functional.cross_entropy`.

    For logits :math:`z`, let :math:`u = c \tanh(z / c)` with a softcap :math:`c`, else :math:`u = z`, and
    :math:`\text{lse} = \log \sum_c e^{u_c}`. With class weights :math:`w`, label smoothing :math:`s` and class
    indices :math:`t`, the loss of a row is

    .. math:: (1 - s) w_t (\text{lse} - u_t) + \frac{s}{C} \sum_c w_c (\text{lse} - u_c)
              + \text{z\_loss} \cdot \text{lse}^2

    and with class probabilities :math:`q` the first two terms are
    :math:`\sum_c w_c ((1 - s) q_c + s / C) (\text{lse} - u_c)`.

    If a gradient is needed, the forward pass computes it, too: it reads the logits once and writes the gradient once.
    Half-precision logits are accumulated in float32. The result does not depend on the number of threads. The loss
    can be differentiated any number of times.

    Args:
        input: logits of shape ``(C)``, ``(N, C)`` or ``(N, C, d1, ...)``; float32, float64, bfloat16, float16.
        target: class indices of shape ``()``, ``(N)`` or ``(N, d1, ...)``, of any integer type. Or class
            probabilities of the shape of ``input``, floating point.
        weight: ``(C)``, a factor for each class; None weights all classes equally.
        ignore_index: the target of rows that have loss 0 and gradient 0, and do not count in the mean. With class
            probabilities it must be negative and has no effect.
        reduction: ``"none"``, ``"mean"`` (over the weights of the targets; over the rows for probabilities) or
            ``"sum"``.
        label_smoothing: the label smoothing, between 0 and 1, see [1]_.
        z_loss: the coefficient of the squared log-partition function in the loss of each row that is not ignored,
            see [2]_.
        softcap: the bound of the logits, see [3]_; 0 sets no bound.
        dtype: the dtype of the loss. Default: the dtype of ``input``, or float32 under autocast, as in torch. With
            class probabilities the default is the promotion of the dtypes of ``input``, ``target`` and ``weight``, as
            in torch, and the loss is computed in it.
        return_lse: True also returns ``lse`` of each row, 0 for ignored rows, in float32 (float64 for float64), of the
            shape of the unreduced loss. ``lse`` is not differentiable.
        inplace: True stores the gradient in the memory of ``input``, whose values are then lost. The call fails while
            another tensor holds that memory, such as ``input.detach()`` or the result that ``tanh`` keeps for its
            backward. Autograd raises an error if another backward needs ``input``. ``inplace`` has no effect without a
            gradient or under torch.compile.

    Returns:
        The loss, or ``(loss, lse)`` with ``return_lse``.

    Raises:
        IndexError: a target is outside ``[0, C)`` and not ``ignore_index``; the message names the row.
        ValueError: ``reduction`` is unknown, or ``softcap`` is negative.
        ArgumentError: the shapes do not fit, or ``inplace`` is True and the logits are a leaf, a view, not contiguous
            or of shared memory.
        RuntimeError: the dtypes or devices do not fit, ``label_smoothing`` is outside [0, 1], ``ignore_index`` is 0 or
            more with class probabilities, or a second derivative is taken after ``inplace``.

    References:
        .. [1] Szegedy et al., Rethinking the Inception Architecture for Computer Vision, CVPR 2016.
        .. [2] Chowdhery et al., PaLM: Scaling Language Modeling with Pathways, JMLR 2023.
        .. [3] Gemma Team, Gemma 2: Improving Open Language Models at a Practical Size, 2024.
    """
    if not torch.compiler.is_compiling() and input.numel() > 0 and (module := native.load()) is not None:
        options = (ignore_index, label_smoothing, z_loss, softcap, dtype, return_lse, inplace)
        try:
            result = module.cross_entropy(input, target, weight, REDUCTIONS.get(reduction, -1), *options)
        except ValueError as error:
            raise ArgumentError(str(error)) from None
        if result is not NotImplemented:
            return result
    # The general path: probabilities, traced, transformed or wrapped tensors, and mistakes.
    check_reduction(reduction)
    if not input.is_floating_point():
        raise RuntimeError(f"cross_entropy: the logits must be floating point, got {input.dtype}")
    if target.dtype == torch.bool:
        raise RuntimeError("cross_entropy: class indices must be int64, int32 or uint8, got torch.bool")
    if target.is_floating_point() and ignore_index >= 0:
        raise RuntimeError(
            f"cross_entropy: ignore_index is not supported for floating point target, got ignore_index={ignore_index}"
        )
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"cross_entropy: the dtype of the loss must be floating point, got {dtype}")
    if not softcap >= 0:
        raise ValueError(f"cross_entropy: softcap must not be negative, got {softcap}")
    if target.is_floating_point():
        input, target, weight = _promoted(input, target, weight)
    if dtype is None and input.dtype != torch.float64 and is_autocast_device(input.device.type):
        dtype = torch.float32
    if not has_kernel(input, target, weight):
        return cross_entropy_reference(
            input,
            target,
            weight,
            ignore_index,
            reduction,
            label_smoothing,
            z_loss=z_loss,
            softcap=softcap,
            dtype=dtype,
            return_lse=return_lse,
            inplace=inplace,
        )
    options = (ignore_index, label_smoothing, z_loss, softcap, dtype, return_lse, inplace)
    try:
        loss, lse = torch.ops.lightkit.cross_entropy.default(input, target, weight, REDUCTIONS[reduction], *options)
    except ValueError as error:
        raise ArgumentError(str(error)) from None
    return (loss, lse) if return_lse else loss


@overload
def cross_entropy_reference(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = ...,
    ignore_index: int = ...,
    reduction: str = ...,
    label_smoothing: float = ...,
    *,
    z_loss: float = ...,
    softcap: float = ...,
    dtype: torch.dtype | None = ...,
    return_lse: Literal[False] = ...,
    inplace: bool = ...,
) -> Tensor: ...
@overload
def cross_entropy_reference(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = ...,
    ignore_index: int = ...,
    reduction: str = ...,
    label_smoothing: float = ...,
    *,
    z_loss: float = ...,
    softcap: float = ...,
    dtype: torch.dtype | None = ...,
    return_lse: Literal[True],
    inplace: bool = ...,
) -> tuple[Tensor, Tensor]: ...
@overload
def cross_entropy_reference(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = ...,
    ignore_index: int = ...,
    reduction: str = ...,
    label_smoothing: float = ...,
    *,
    z_loss: float = ...,
    softcap: float = ...,
    dtype: torch.dtype | None = ...,
    return_lse: bool,
    inplace: bool = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...
def cross_entropy_reference(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    dtype: torch.dtype | None = None,
    return_lse: bool = False,
    inplace: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Computes `cross_entropy` in torch's operations, for calls that the kernels do not take.

    ``inplace`` has no effect here: it saves memory and changes no value.
    """
    if dtype is None and target.is_floating_point():
        input, target, weight = _promoted(input, target, weight)
    output_dtype = input.dtype if dtype is None else dtype
    logits = input.to(torch.promote_types(input.dtype, torch.float32))
    if softcap > 0:
        logits = softcap * torch.tanh(logits / softcap)
    by_index = not target.is_floating_point()
    target = target.to(torch.int64 if by_index else logits.dtype)
    weight = None if weight is None else weight.to(logits.dtype)
    lse = None
    if z_loss != 0 or return_lse:
        lse = logits.logsumexp(dim=0 if logits.dim() == 1 else 1)
        if by_index:
            lse = lse.masked_fill(target == ignore_index, 0)

    if z_loss == 0 or lse is None:
        loss = F.cross_entropy(
            logits, target, weight, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction=reduction
        )
    else:
        loss = F.cross_entropy(
            logits, target, weight, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="none"
        )
        loss = loss + z_loss * lse.square()
        if reduction != "none":
            loss = loss.sum()
        if reduction == "mean":
            loss = loss / _denominator(lse, target if by_index else None, weight, ignore_index)
    loss = loss.to(output_dtype)
    return loss if lse is None or not return_lse else (loss, lse.detach())


def _promoted(input: Tensor, target: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns the three tensors in the dtype that torch promotes them to."""
    common = torch.promote_types(input.dtype, target.dtype)
    if weight is not None:
        common = torch.promote_types(common, weight.dtype)
    return input.to(common), target.to(common), None if weight is None else weight.to(common)


def _denominator(lse: Tensor, target: Tensor | None, weight: Tensor | None, ignore_index: int) -> Tensor | int:
    """Returns the denominator of a mean: the number of rows that count, or the sum of the weights of their classes.

    ``target`` is None for class probabilities, with which all rows count.
    """
    if target is None:
        return lse.numel()
    counted = target != ignore_index
    if weight is None:
        return counted.sum()
    return (weight[target.masked_fill(~counted, 0)] * counted).sum()


def has_kernel(input: Tensor, target: Tensor, weight: Tensor | None) -> bool:
    """Returns True if the kernels take this call; otherwise `cross_entropy` takes the reference."""
    return (
        kernels_apply(input)
        # torch defines the mean, and label smoothing, of nothing.
        and input.numel() > 0
        # The kernels have the gradient with respect to the logits alone.
        and not target.requires_grad
        and not (weight is not None and weight.requires_grad)
    )
