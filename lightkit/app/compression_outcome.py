"""The outcome of a compression: what the callbacks of compression have made of a model, as values and as tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lightkit._util.numbers import format_percentage, format_rate
from lightkit.app.deployment import deployed_part
from lightkit.app.pages.document import html_table
from lightkit.compress import QUANTIZATION_KEY, Prune, Quantize, Sparsify
from lightkit.compress.packing import weight_of
from lightkit.compress.quantization import levels_of

# The beginning of the metrics' names.
PREFIX = "compression/"


@dataclass(frozen=True)
class CompressionOutcome:
    """The outcome of a compression.

    Attributes:
        macs: the multiply-adds of the model for one sample, and those of the dense one; None without pruning.
        widths: the number of units of each layer that was pruned, before and after, by the layer's name.
        zeros: the number of zeros and of all weights of each weight tensor, by name; {} without masks.
        layers: the ``bits`` and the relative ``error`` of each rounded weight, by name: see `layer_errors`.
        sizes: the bytes of what is deployed, ``raw`` and ``zipped``: see `lightkit.app.deployment.bytes_of`.
        accuracy: the accuracy of the smaller model on the test set, where the run itself has tested the dense one.
    """

    macs: tuple[float, float] | None
    widths: dict[str, tuple[int, int]]
    zeros: dict[str, tuple[int, int]]
    layers: dict[str, dict[str, float]]
    sizes: dict[str, int]
    accuracy: float | None = None


def compression_outcome(
    callbacks: Iterable[Callback],
    checkpoint: Mapping[str, Any],
    levels: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    sizes: dict[str, int] | None = None,
) -> CompressionOutcome | None:
    """Returns what the callbacks of a training have made of its model; None if none of them makes a model smaller.

    Args:
        callbacks: the callbacks after the training.
        checkpoint: the content of the checkpoint that counts, with weights in float.
        levels: the levels of its rounded weights, as `lightkit.compress.apply_quantization` returns them; None computes
            them.
        sizes: the bytes of what is deployed; None computes them.
    """
    found = [callback for callback in callbacks if isinstance(callback, (Prune, Sparsify, Quantize))]
    if not found:
        return None
    levels = levels_of(checkpoint) if levels is None else levels
    prune = next((callback for callback in found if isinstance(callback, Prune)), None)
    macs = None
    if prune is not None and prune.macs is not None and prune.dense_macs is not None:
        macs = (prune.macs, prune.dense_macs)
    weights = {
        name: value
        for name, value in checkpoint["state_dict"].items()
        if isinstance(value, Tensor) and value.dim() > 1 and value.is_floating_point()
    }
    is_masked = any(isinstance(callback, Sparsify) for callback in found)
    return CompressionOutcome(
        macs,
        {} if prune is None else dict(prune.widths),
        {name: (int((x == 0).sum()), x.numel()) for name, x in weights.items()} if is_masked else {},
        layer_errors(checkpoint, levels),
        deployed_part(checkpoint, levels)[1] if sizes is None else sizes,
    )


def layer_errors(checkpoint: Mapping[str, Any], levels: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """Returns for each rounded weight its bits, and the norm of the rounding error relative to that of the weight.

    Args:
        checkpoint: the content of a checkpoint with the weights in float.
        levels: what `lightkit.compress.apply_quantization` has returned for it.
    """
    errors: dict[str, Any] = {}
    for name, packed in levels.items():
        weight = checkpoint["state_dict"][name].float()
        error = float((weight_of(*packed) - weight).norm() / weight.norm().clamp_min(1e-30))
        errors[name] = {"bits": checkpoint[QUANTIZATION_KEY]["weights"][name][0], "error": error}
    return errors


def outcome_metrics(outcome: CompressionOutcome) -> dict[str, float]:
    """Returns the key figures of an outcome by the names of metrics; a share is a number from 0 to 1."""
    found: dict[str, float] = {}
    if outcome.macs is not None:
        found["macs_left"] = outcome.macs[0] / outcome.macs[1]
    if outcome.zeros:
        found["zeros"] = _share_of_zeros(outcome)
    if outcome.layers:
        found["bits"] = min(layer["bits"] for layer in outcome.layers.values())
    if outcome.accuracy is not None:
        found["accuracy"] = outcome.accuracy
    return {PREFIX + name: value for name, value in {**found, "zipped_bytes": outcome.sizes["zipped"]}.items()}


def outcome_facts(outcome: CompressionOutcome) -> dict[str, str]:
    """Returns the key figures of an outcome as texts by name."""
    facts: dict[str, str] = {}
    if outcome.accuracy is not None:
        facts["accuracy once compressed"] = format_percentage(round(outcome.accuracy, 4))
    if outcome.macs is not None:
        left, dense = outcome.macs
        share = format_percentage(round(left / dense, 4))
        facts["multiply-adds a sample"] = f"{format_rate(left)}, {share} of {format_rate(dense)}"
    if outcome.zeros:
        facts["zeros"] = f"{format_percentage(round(_share_of_zeros(outcome), 4))} of the weights"
    if outcome.layers:
        facts["bits"] = ", ".join(str(bits) for bits in sorted({layer["bits"] for layer in outcome.layers.values()}))
    sizes = outcome.sizes
    return facts | {"bytes of the weights": f"{sizes['raw']:,}, zipped {sizes['zipped']:,}"}


def outcome_tables(outcome: CompressionOutcome) -> dict[str, str]:
    """Returns the tables of an outcome as HTML by heading; a table without rows is left out."""
    widths = [(name, str(before), str(after)) for name, (before, after) in outcome.widths.items()]
    zeros = [
        (name, f"{count:,}", f"{total:,}", format_percentage(round(count / max(total, 1), 4)))
        for name, (count, total) in outcome.zeros.items()
    ]
    rounded = [
        (name, str(layer["bits"]), format_percentage(round(layer["error"], 4)))
        for name, layer in outcome.layers.items()
    ]
    tables = {
        "Widths of layers": (("layer", "units before", "units left"), widths),
        "Zeros": (("weight", "zeros", "of", "share"), zeros),
        "Rounded weights": (("weight", "bits", "rounding error, relative"), rounded),
    }
    return {title: html_table(head, rows) for title, (head, rows) in tables.items() if rows}


def _share_of_zeros(outcome: CompressionOutcome) -> float:
    zeros, totals = (sum(counts) for counts in zip(*outcome.zeros.values(), strict=True))
    return zeros / max(totals, 1)
