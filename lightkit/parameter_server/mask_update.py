"""New masks of an optimizer's parameters, which a worker sends with a push: the servers keep masked entries at zero."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightkit._util.packed_masks import unpack_mask
from lightkit.parameter_server.training_spec import ParameterSpec


@dataclass(frozen=True)
class MaskUpdate:
    """Masks that replace those of a smaller number.

    Args:
        number: the number of the masks, from 1, which grows with each change; 0 stands for no masks.
        packed: for each parameter its mask packed to bits, see `lightkit._util.packed_masks`; None for a parameter
            without a mask.
    """

    number: int
    packed: list[Tensor | None]

    def masks(self, parameters: Sequence[Tensor]) -> dict[Tensor, Tensor]:
        """Returns the masks of ``parameters``, as `lightkit.optim.set_masks` takes them."""
        pairs = zip(parameters, self.packed, strict=True)
        return {p: unpack_mask(packed, p.shape).to(p.device) for p, packed in pairs if packed is not None}

    def part(self, positions: Sequence[int]) -> MaskUpdate:
        """Returns the masks of the parameters at ``positions``."""
        return MaskUpdate(self.number, [self.packed[i] for i in positions])

    def check(self, parameters: Sequence[ParameterSpec]) -> MaskUpdate:
        """Returns this object if an untrusted peer's masks fit the parameters.

        Raises:
            ValueError: they do not.
        """
        if type(self.number) is not int or self.number < 1 or not isinstance(self.packed, list):
            raise ValueError("masks must have a number from 1 and a list")
        if len(self.packed) != len(parameters):
            raise ValueError(f"there are masks of {len(self.packed)} parameters, and {len(parameters)} parameters")
        for packed, parameter in zip(self.packed, parameters, strict=True):
            shape = (-(-parameter.count // 8),)
            if packed is None:
                continue
            if not isinstance(packed, Tensor) or packed.dtype != torch.uint8 or packed.shape != shape:
                raise ValueError(f"the mask of {parameter} does not fit")
        return self

    def to_json(self) -> dict[str, Any]:
        """Returns JSON values."""
        texts = [None if x is None else base64.b64encode(x.numpy().tobytes()).decode() for x in self.packed]
        return {"number": self.number, "packed": texts}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> MaskUpdate:
        """Returns the masks that `to_json` described.

        Raises:
            KeyError, TypeError, ValueError: ``value`` is no such description.
        """
        packed = [
            None if text is None else torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
            for text in value["packed"]
        ]
        return cls(int(value["number"]), packed)


NO_MASKS = MaskUpdate(0, [])
