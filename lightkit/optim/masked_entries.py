"""The masked entries of an optimizer's parameters: zero after every step."""

from __future__ import annotations

import weakref
from collections import defaultdict

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lightkit._util.imported import is_instance

# States of lightkit's optimizers that are weights themselves.
_WEIGHT_STATES = ("master_weight", "average")

# Integers of as many bytes as a number: their products with 0 and 1 are exact, also those of NaN and of the sign.
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class MaskedEntries:
    """Masks of an optimizer's parameters.

    Args:
        masks: for each masked parameter a bool tensor of its shape, False where an entry stays zero; a DTensor for a
            DTensor. Entries may be exchanged, as when a parameter gets another shape.
    """

    def __init__(self, masks: dict[Tensor, Tensor]) -> None:
        self.masks = masks
        # The mask of which a factor was made, and the factor: integers 0 and 1 in the layout of the weights.
        self._factors: dict[Tensor, tuple[Tensor, Tensor]] = {}
        # Likewise, bool tensors.
        self._laid_out: dict[Tensor, tuple[Tensor, Tensor]] = {}
        self._kernel_masks: dict[Tensor, Tensor] = {}

    def on_cpu(self) -> dict[Tensor, Tensor] | None:
        """Returns masks that lie in memory like their parameters, for the kernels; None if some are not on the CPU."""
        for parameter, mask in self.masks.items():
            source, laid_out = self._laid_out.get(parameter, (None, None))
            if source is mask and laid_out is not None and laid_out.stride() == parameter.stride():
                continue
            if parameter.device.type != "cpu" or is_traceable_wrapper_subclass(parameter):
                return None
            laid_out = torch.empty_like(parameter, dtype=torch.bool).copy_(mask)
            self._laid_out[parameter] = mask, laid_out
            self._kernel_masks = {p: self._laid_out[p][1] for p in self.masks if p in self._laid_out}
        return self._kernel_masks

    @torch.no_grad()
    def apply(self, optimizer: Optimizer) -> None:
        """Sets the masked entries of the parameters to zero, and those of their averages and master weights."""
        changed: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = defaultdict(lambda: ([], []))
        for parameter, mask in self.masks.items():
            weights = [parameter]
            # A look-up of a missing parameter would make an empty state.
            if parameter in optimizer.state:
                state = optimizer.state[parameter]
                weights += [state[name] for name in _WEIGHT_STATES if name in state]
            for weight in weights:
                values = as_integers(weight)
                targets, factors = changed[values.dtype]
                targets.append(values)
                factors.append(self._factor(parameter, mask, values))
        for targets, factors in changed.values():
            torch._foreach_mul_(targets, factors)

    def _factor(self, parameter: Tensor, mask: Tensor, values: Tensor) -> Tensor:
        source, factor = self._factors.get(parameter, (None, None))
        if source is not mask or factor is None or factor.device != values.device or factor.shape != values.shape:
            factor = torch.empty_like(values).copy_(local_part(mask))
            self._factors[parameter] = mask, factor
        # The master weight of a half-precision parameter has wider numbers.
        return factor if factor.dtype == values.dtype else factor.to(values.dtype)


# The masks of each optimizer that has some.
registry: weakref.WeakKeyDictionary[Optimizer, MaskedEntries] = weakref.WeakKeyDictionary()


def find_masks(optimizer: Optimizer) -> MaskedEntries | None:
    """Returns the masks of an optimizer; None without masks."""
    return registry.get(optimizer) if registry else None


def apply_masks(optimizer: Optimizer) -> None:
    """Sets the masked entries of an optimizer's parameters to zero."""
    if (entries := find_masks(optimizer)) is not None:
        entries.apply(optimizer)


def local_part(tensor: Tensor) -> Tensor:
    """Returns the part of a tensor that this process has: the tensor itself, unless it is a DTensor."""
    if is_instance(tensor, "torch.distributed.tensor", "DTensor"):
        return tensor.to_local()  # pyright: ignore[reportAttributeAccessIssue]
    return tensor


def as_integers(tensor: Tensor) -> Tensor:
    """Returns the numbers of a tensor, or of this process's part of it, as integers in the same memory."""
    values = local_part(tensor.detach())
    return values.view(_INTEGERS[values.itemsize])
