"""The order in which the weights of a trained model lose bits: those first whose bits the loss needs least."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import nn

from lightkit.compress.calibration import Calibration
from lightkit.compress.packing import weight_of
from lightkit.compress.weight_formats import BITS, WeightFormat, quantizable_weights


def measure_losses(
    module: nn.Module,
    calibration: Calibration,
    formats: Mapping[str, WeightFormat],
    evaluate: Callable[[], float],
) -> dict[str, dict[int, float]]:
    """Returns the loss of a trained module with one weight rounded, by the name of the weight and its bits.

    The loss with 8 bits is taken to be that in float: the measurement can hardly tell the two apart. The module has its
    own weights again afterwards.

    Args:
        module: the module, in evaluation mode.
        calibration: what samples of the training data say of the module.
        formats: the format of each weight, whose bits the function replaces by each of 2, 3, 4.
        evaluate: returns the loss of the module on samples.
    """
    weights = {name: weight.detach() for name, _, weight in quantizable_weights(module)}
    whole = evaluate()
    losses: dict[str, dict[int, float]] = {}
    for name, weight_format in formats.items():
        weight = weights[name]
        copied = weight.clone()
        losses[name] = {max(BITS): whole}
        for bits in BITS[:-1]:
            try:
                with torch.no_grad():
                    weight.copy_(weight_of(*calibration.levels(name, replace(weight_format, bits=bits))))
                loss = evaluate()
            finally:
                weight.copy_(copied)
            losses[name][bits] = loss if math.isfinite(loss) else math.inf
    return losses


def order_of_bits(losses: Mapping[str, Mapping[int, float]], sizes: Mapping[str, int]) -> list[dict[str, int]]:
    """Returns the bits of all weights, from 8 bits for each to the fewest, in the order of the measured sensitivity.

    Each entry lowers one weight of the entry before it: the step with the smallest increase of the loss for each saved
    bit.

    Args:
        losses: see `measure_losses`.
        sizes: the number of values of each weight.
    """
    present = {name: max(found) for name, found in losses.items()}
    order = [dict(present)]
    while moves := [
        ((found[bits] - found[present[name]]) / (sizes[name] * (present[name] - bits)), name, bits)
        for name, found in losses.items()
        for bits in found
        # The difference of two infinite losses says nothing; both are the last to come.
        if bits < present[name] and not math.isinf(found[present[name]])
    ]:
        # Of equal ones the larger number of bits: a loss of inf leaves the fewest bits to the end.
        _, name, bits = min(moves, key=lambda move: (move[0], -move[2]))
        present[name] = bits
        order.append(dict(present))
    return order
