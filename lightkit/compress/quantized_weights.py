"""Weights that are rounded for a while."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightkit.compress.weight_formats import WeightFormat, quantizable_weights
from lightkit.ops.fake_quantize import fake_quantize_weights


class QuantizedWeights:
    """The weights of a module that have few bits, and their copies without rounding.

    Args:
        module: the module.
        formats: the format of each weight, by name within ``module``.

    Raises:
        KeyError: the module has no such weight.
        ValueError: a row is no multiple of the group.
    """

    def __init__(self, module: nn.Module, formats: Mapping[str, WeightFormat]) -> None:
        parameters = {name: weight for name, _, weight in quantizable_weights(module)}
        self._module = module
        self.formats = dict(formats)
        self.parameters = {name: parameters[name] for name in formats}
        for name, weight_format in formats.items():
            size = weight_format.group_size
            if size and self.parameters[name].shape[-1] % size:
                raise ValueError(f"{name} has rows of {self.parameters[name].shape[-1]}, no multiple of {size}")
        self._copies: list[Tensor] = []
        self._scales: list[Tensor] = []
        self.are_rounded = False

    @torch.no_grad()
    def round(self) -> None:
        """Rounds the weights in place, and keeps copies for `restore`; does nothing if they are rounded."""
        if self.are_rounded or not self.parameters:
            return
        weights = [p.detach() for p in self.parameters.values()]
        kept = [(x.shape, x.dtype, x.device) for x in self._copies]
        if kept != [(x.shape, x.dtype, x.device) for x in weights]:
            self._copies = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in weights]
        torch._foreach_copy_(self._copies, weights)
        self.are_rounded = True
        self._write(self._copies, weights)

    @torch.no_grad()
    def restore(self) -> None:
        """Gives the weights the values that they had before `round`; does nothing if they are not rounded."""
        if self.are_rounded:
            torch._foreach_copy_([p.detach() for p in self.parameters.values()], self._copies)
            self.are_rounded = False

    def copies(self) -> dict[str, Tensor]:
        """Returns the values that the weights had before `round`, under all names of each weight in the module."""
        copies = dict(zip(self.parameters.values(), self._copies, strict=True))
        named = self._module.named_parameters(remove_duplicate=False)
        return {name: copies[p] for name, p in named if p in copies}

    def levels(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Returns the integer levels of the rounded weights, int8 of their shapes, and their scales, by name."""
        assert self.are_rounded or not self.parameters
        found: dict[str, tuple[Tensor, Tensor]] = {}
        for (name, weight), scales in zip(self.parameters.items(), self._scales, strict=True):
            rows = self.formats[name].rows(weight.detach().contiguous()).float()
            found[name] = (rows / scales[:, None]).round().to(torch.int8).view(weight.shape), scales
        return found

    def _write(self, sources: list[Tensor], targets: list[Tensor]) -> None:
        by_bits: dict[int, list[int]] = {}
        formats = list(self.formats.values())
        for index, weight_format in enumerate(formats):
            by_bits.setdefault(weight_format.bits, []).append(index)
        self._scales = [weight.new_empty(0) for weight in sources]
        for bits, indices in by_bits.items():
            # Scales and levels are those of float32, whatever dtype the weights train in.
            weights = [sources[i].float() for i in indices]
            outputs = [self._output(targets[i]) for i in indices]
            scales = fake_quantize_weights(
                [formats[i].rows(weight) for i, weight in zip(indices, weights, strict=True)],
                [formats[i].rows(output) for i, output in zip(indices, outputs, strict=True)],
                bits,
            )
            for i, output, each in zip(indices, outputs, scales, strict=True):
                self._scales[i] = each
                if output is not targets[i]:
                    targets[i].copy_(output)

    @staticmethod
    def _output(target: Tensor) -> Tensor:
        """Returns ``target`` itself if rows of float32 can be written to it, else a new tensor."""
        if target.dtype == torch.float32 and target.is_contiguous():
            return target
        return torch.empty_like(target, dtype=torch.float32, memory_format=torch.contiguous_format)
