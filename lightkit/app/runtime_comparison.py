"""The models of a compression in the runtimes that are installed: their latencies, and the labels that differ."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lightkit.app.exporting import compare, input_specs
from lightkit.app.model_measurements import first_samples, latencies
from lightkit.errors import LightkitError
from lightkit.export import FORMATS, ExportedModel, export_model, open_export

# The calls of a model with batches: the inputs, and what the model returned.
Calls = Sequence[tuple[tuple[Tensor, ...], Tensor]]


def installed_runtimes() -> list[str]:
    """Returns the formats of exports, other than torch's own, whose packages are installed."""
    return [
        name
        for name, known in FORMATS.items()
        if known.packages and all(importlib.util.find_spec(package) is not None for package in known.packages)
    ]


def measure_runtimes(
    models: Mapping[str, nn.Module], calls: Calls, has_labels: bool, batch_sizes: Sequence[int]
) -> dict[str, dict[str, dict[str, Any]]]:
    """Returns what the installed runtimes do with models, by the name of the runtime and that of the model.

    The values of a model are the bytes of its file and the median milliseconds of a call at each batch size, which the
    function measures for all models of a runtime in turn. Those of the last model also have the number of labels on
    which the runtime and lightkit differ. A runtime that cannot take a model has the reason instead.

    Args:
        models: the models in evaluation mode, on the CPU, by name; the compressed one is the last.
        calls: the calls of the last model with the test set.
        has_labels: True if the outputs are logits of classes.
        batch_sizes: the numbers of samples of a call.
    """
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for runtime in installed_runtimes():
        with tempfile.TemporaryDirectory(prefix="lightkit-runtimes-") as directory:
            found[runtime] = _measure(runtime, models, calls, has_labels, batch_sizes, Path(directory))
    return found


def _measure(
    runtime: str,
    models: Mapping[str, nn.Module],
    calls: Calls,
    has_labels: bool,
    batch_sizes: Sequence[int],
    directory: Path,
) -> dict[str, dict[str, Any]]:
    known = FORMATS[runtime]
    inputs = calls[0][0]
    values: dict[str, dict[str, Any]] = {}
    opened: dict[str, nn.Module] = {}
    for index, (name, model) in enumerate(models.items()):
        path = directory / f"{index}{known.suffix}"
        try:
            specs = input_specs(model, inputs, is_fixed=known.one_by_one)
            export_model(model, specs, path)
            files = directory.glob(f"{index}.*")
            values[name] = {"bytes": sum(file.stat().st_size for file in files)}
            # This process wrote the file.
            opened[name] = ExportedModel(open_export(path, trust=True)[0])
            if index == len(models) - 1:
                agreement = compare(path, model, calls, has_labels, measure_errors=False)
                values[name]["largest difference"] = agreement.largest_difference
                if agreement.predictions:
                    values[name] |= {"labels": agreement.predictions, "labels that differ": agreement.differing}
        except LightkitError as error:
            values[name] = {"reason": str(error).partition("\n")[0]}
            opened.pop(name, None)
    for size in batch_sizes:
        if len(inputs[0]) >= size and opened:
            for name, milliseconds in latencies(opened, first_samples(inputs, size), size).items():
                values[name][f"ms at batch {size}"] = milliseconds
    return values
