"""Masks of parameters, which an optimizer keeps at zero."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightkit._util.imported import is_instance
from lightkit.optim.fused import FusedStep
from lightkit.optim.masked_entries import MaskedEntries, apply_masks, registry

# Removes the hook of an optimizer that is none of lightkit's.
_removals: weakref.WeakKeyDictionary[Optimizer, Callable[[], None]] = weakref.WeakKeyDictionary()


def set_masks(optimizer: Optimizer, masks: Mapping[Tensor, Tensor]) -> None:
    """Keeps entries of parameters at zero: at once, and within each step of the optimizer.

    ``set_masks(optimizer, {layer.weight: layer.weight.abs() > 0.1})`` sets the small weights of a layer to zero. After
    ``optimizer.step()`` the masked entries are zero to the bit, and so are those of the averages and master weights of
    lightkit's optimizers (``ema_decay``, ``master_weights``), whatever momentum and weight decay do. `SGD`, `Adam` and
    `AdamW` apply the masks within their step, which takes one pass over the masked weights; other optimizers do by a
    hook after it.

    The masks are not part of a state dict, a copy or a pickle of the optimizer: a program that resumes sets them again.
    `lightkit.compress.Sparsify` chooses masks in a training, and saves them.

    Args:
        optimizer: any optimizer of torch's interface, or what ``LightningModule.optimizers()`` returns for one.
        masks: for each masked parameter a bool tensor of its shape, False where an entry stays zero; for a DTensor a
            DTensor of the same placements. They replace the masks of an earlier call; an empty mapping removes them,
            and leaves the zeros to the optimizer.

    Raises:
        ValueError: a key is no parameter of the optimizer, or none of real numbers; or a mask has another dtype or
            shape.
    """
    optimizer = _unwrapped(optimizer)
    parameters = {p for group in optimizer.param_groups for p in group["params"]}
    for parameter, mask in masks.items():
        if parameter not in parameters:
            raise ValueError(f"masks has a tensor of shape {tuple(parameter.shape)} that the optimizer does not step")
        if not parameter.is_floating_point():
            raise ValueError(f"a masked parameter must have real numbers, got {parameter.dtype}")
        if mask.dtype != torch.bool or mask.shape != parameter.shape:
            raise ValueError(
                f"the mask of a parameter must be bool of shape {tuple(parameter.shape)}, got {mask.dtype} of shape "
                f"{tuple(mask.shape)}"
            )
    if (remove := _removals.pop(optimizer, None)) is not None:
        remove()
    registry.pop(optimizer, None)
    if not masks:
        return
    registry[optimizer] = MaskedEntries(dict(masks))
    if not isinstance(optimizer, FusedStep):
        _removals[optimizer] = optimizer.register_step_post_hook(_after_step).remove
    apply_masks(optimizer)


def masks_of(optimizer: Optimizer) -> dict[Tensor, Tensor]:
    """Returns the masks of an optimizer by parameter, as `set_masks` takes them; an empty dict without masks.

    An entry of the dict may be exchanged, as when a parameter gets another shape.
    """
    entries = registry.get(_unwrapped(optimizer))
    return {} if entries is None else entries.masks


def _unwrapped(optimizer: Optimizer) -> Optimizer:
    """Returns the optimizer that steps: ``LightningModule.optimizers()`` returns a wrapper, which the trainer lacks."""
    if is_instance(optimizer, "lightning.pytorch.core.optimizer", "LightningOptimizer"):
        return optimizer.optimizer  # pyright: ignore[reportAttributeAccessIssue]
    return optimizer


def _after_step(optimizer: Optimizer, arguments: object, options: object) -> None:
    apply_masks(optimizer)
