"""The export of a checkpoint's model with what its predictions need, compared with the model before it is kept."""

from __future__ import annotations

import copy
import inspect
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightkit.app import ensembles
from lightkit.app.evaluation import build_test_data
from lightkit.app.exported import encode_buffers
from lightkit.app.image_sizes import check_image_size, picture_size
from lightkit.app.parts import model_of
from lightkit.app.restore import model_errors_as_checkpoint_errors
from lightkit.data import DataModule, ImageDataModule, SeriesDataModule, TableDataModule, Text
from lightkit.errors import CheckpointError, ConfigError
from lightkit.export import FORMATS, ExportedModel, InputSpec, export_model, open_export
from lightkit.export.agreement import Agreement
from lightkit.export.formats import check_format, format_of
from lightkit.export.quantized import is_quantized
from lightkit.export.runtime import BATCH, LENGTH
from lightkit.models import RNN, Ensemble, LanguageModel
from lightkit.targets import is_in_user_package
from lightkit.tasks import ForecastTask, LanguageModelTask

# Arguments of data modules that say where the data of the training lay.
_LOCATIONS = ("data_dir", "path", "test_path")

# Arguments of data modules that concern the training alone, or the machine.
_TRAINING = ("transform", "download", "memory_limit", "seed")

# Parts of a task that concern the training alone, or that have an entry of their own.
_PARTS = ("model", "optimizer", "scheduler")

# The comparison ends after this number of tokens of a text.
_MAX_TOKENS = 1 << 18


def export_task(
    task: pl.LightningModule,
    data: pl.LightningDataModule | None,
    config: dict[str, Any],
    state: dict[str, Any],
    batches: Iterable[Any],
    path: Path,
) -> Agreement:
    """Writes the model of a task to a file, if the file computes on samples what the model computes.

    The file carries the operations and weights, the names of the classes, the preprocessing and the configurations of
    task and data. It has no paths: where the data module had one, the file has an empty text.

    Args:
        task: the task.
        data: its data module, which need not have samples; None for none.
        config: the configuration of the training, of which the function reads ``data`` and ``task``.
        state: the state of the data module by the name of its class, as a checkpoint has it.
        batches: the batches of samples, as ``predict_step`` of the task takes them, for a language model
            ``(tokens, targets)``.
        path: the file; its suffix decides on the format: see `lightkit.export.FORMATS`.

    Returns:
        How far the file and the model agree.

    Raises:
        CheckpointError: the file computes something else than the model, beyond rounding.
        ConfigError: the task has no model that can be exported, or there is no sample.
    """
    model = model_of(task)
    if model is None or isinstance(model, nn.ModuleList):
        raise ConfigError(
            f"an export needs one model: {type(task).__name__} has "
            f"{'several, and means of values' if model is not None else 'no attribute model that is a module'}"
        )
    task.eval()
    calls = model_calls(task, model, batches)
    first = next(calls, None)
    if first is None:
        raise ConfigError("an export is compared with the model, and there is no sample to compare them on")
    format = format_of(path)
    inputs = input_specs(model, first[0], is_fixed=format is not None and FORMATS[format].one_by_one)
    metadata = {
        "classes": _classes(data),
        "preprocessing": _preprocessing(task, data),
        "config": {"task": _plain_task(config.get("task")), "data": _plain_data(config.get("data"))},
        "state": state,
        "buffers": encode_buffers(_own_buffers(task)),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    # Nobody finds a file that is not compared yet.
    with tempfile.TemporaryDirectory(prefix=".export-", dir=path.parent) as directory:
        written = Path(directory) / path.name
        export_model(model, inputs, written, metadata=metadata)
        agreement = compare(written, model, _chain(first, calls), isinstance(task, LanguageModelTask) or _classes(data))
        if not agreement.is_rounding:
            raise CheckpointError(
                f"{path} is not kept, since it computes something else than the model: on {agreement.samples:,} "
                f"samples the outputs differ by up to {agreement.largest_difference:.3g}, and rounding explains "
                f"{agreement.bound:.3g}; {agreement.differing:,} labels differ"
            )
        for file in sorted(Path(directory).iterdir()):
            os.replace(file, path.with_name(file.name))
    return agreement


def export_checkpoints(
    paths: Sequence[Path], path: Path, data_dir: str | None = None, download: bool = False
) -> Agreement:
    """Exports the model of a checkpoint, or the ensemble of several, compared on its test set: see `export_task`.

    Args:
        paths: checkpoints of lightkit.train or `lightkit.FitResult.save`; they may come from an untrusted source.
        path: the file.
        data_dir: the file or directory of the data; None takes the path in the checkpoint.
        download: let the data module download a missing data set.

    Raises:
        LightkitError: a checkpoint or its data cannot be used; or see `export_task`.
    """
    free = () if data_dir is None else ensembles.LOCATION_ARGUMENTS
    restored = ensembles.combine(ensembles.restore_members(paths, for_evaluation=True, free=free))
    if restored.encoding is not None:
        raise ConfigError("the models of an ensemble encode the table in different ways: export each of them")
    data: Any = build_test_data(restored, data_dir, download)
    check_image_size(data, model_of(restored.task), is_trained=True)
    name = type(data).__qualname__
    state = {} if restored.checkpoint.get(name) is None else {name: restored.checkpoint[name]}
    if isinstance(data, ImageDataModule):
        state = {name: {"image_shape": list(picture_size(data, model_of(restored.task), state.get(name)))}}
    with model_errors_as_checkpoint_errors():
        data.prepare_data()
        data.setup("test")
        batches = (data.on_after_batch_transfer(batch, 0) for batch in data.test_dataloader())
        return export_task(restored.task, data, restored.config, state, batches, path)


def output_path(paths: Sequence[Path], format: str, output: str | None) -> Path:
    """Returns the file of an export.

    Args:
        paths: the checkpoints.
        format: the format, a key of `lightkit.export.FORMATS`.
        output: the file that the user names; None for the checkpoint's name with the suffix of the format.

    Raises:
        ConfigError: the format is unknown or lacks a package, ``output`` has another suffix, or it is None for several
            checkpoints.
    """
    suffix = check_format(format).suffix
    if output is not None:
        if format_of(output) != format:
            raise ConfigError(f"output={output} must end in {suffix} for format={format}")
        return Path(output)
    if len(paths) > 1:
        raise ConfigError(f"output=FILE{suffix} must name the file of an ensemble")
    return paths[0].with_suffix(suffix)


def rows(agreement: Agreement, path: Path, format: str) -> dict[str, str]:
    """Returns the rows that the command prints of an export.

    Args:
        agreement: how far the file and the model agree.
        path: the file.
        format: its format.
    """
    files = [path, *(path.with_suffix(suffix) for suffix in FORMATS[format].companions)]
    size = sum(file.stat().st_size for file in files)
    weights = FORMATS[format].weights if agreement.has_levels else "float32"
    shown = {"size": f"{size:,} bytes", "weights": weights, "compared on": f"{agreement.samples:,} test samples"}
    if agreement.predictions:
        shown["labels that differ"] = f"{agreement.differing:,} of {agreement.predictions:,}"
    shown["largest difference"] = (
        f"{agreement.largest_difference:.2g} (of outputs up to {agreement.largest_output:.2g})"
    )
    if agreement.export_error is not None and agreement.model_error is not None:
        errors = f"{agreement.export_error:.2g}, that of the model {agreement.model_error:.2g}"
        shown["error against float64"] = errors
    return shown


def compare(
    path: Path,
    model: nn.Module,
    calls: Iterable[tuple[tuple[Tensor, ...], Tensor]],
    has_labels: Any,
    *,
    measure_errors: bool = True,
) -> Agreement:
    """Compares a file with the model from which this process wrote it.

    Args:
        path: the file.
        model: the model in evaluation mode.
        calls: the inputs of each call of the model, and what it returned.
        has_labels: True if the outputs are logits of classes.
        measure_errors: True computes the model in float64, too.
    """
    # This process wrote the file.
    runtime, _ = open_export(path, trust=True)
    exported, exact_model = ExportedModel(runtime), _in_float64(model) if measure_errors else None
    agreement, values = Agreement(has_levels=is_quantized(model)), 0
    with torch.no_grad():
        for inputs, expected in calls:
            exact = None if exact_model is None else _exact(exact_model, inputs)
            if exact is None:
                exact_model = None
            try:
                agreement.update(exported(*inputs), expected, exact, bool(has_labels))
            except ValueError as error:
                raise CheckpointError(f"{path.name} cannot be compared with the model: {error}") from error
            values += inputs[0].numel()
            if isinstance(model, LanguageModel) and values >= _MAX_TOKENS:
                break
    return agreement


def input_specs(model: nn.Module, inputs: tuple[Tensor, ...], is_fixed: bool = False) -> tuple[InputSpec, ...]:
    """Returns the forms of a model's inputs: the batch is free, and for sequences and tokens the length.

    Args:
        model: the model.
        inputs: inputs of one call.
        is_fixed: True takes the length of ``inputs`` for the only one.

    Raises:
        ConfigError: an input is neither floating point nor int64.
    """
    member = model
    while isinstance(member, Ensemble):
        member = member.models[0]
    has_length = isinstance(member, (RNN, LanguageModel))
    names = list(inspect.signature(member.forward).parameters)
    specs = []
    for index, value in enumerate(inputs):
        if not value.is_floating_point() and value.dtype != torch.int64:
            raise ConfigError(f"an export takes floating point or int64, and the model reads {value.dtype}")
        name = names[index] if index < len(names) and names[index] not in ("args", "inputs") else f"input_{index}"
        shape: list[int | str] = [BATCH, *value.shape[1:]]
        is_free = has_length and index == 0 and not is_fixed
        if is_free:
            shape[1] = LENGTH
        most = member.context if is_free and isinstance(member, LanguageModel) else None
        specs.append(InputSpec(name, "float32" if value.is_floating_point() else "int64", tuple(shape), most))
    return tuple(specs)


def model_calls(
    task: pl.LightningModule, model: nn.Module, batches: Iterable[Any]
) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
    """Yields the inputs and the output of each call of a model, one for each batch.

    Args:
        task: the task, in evaluation mode.
        model: its model.
        batches: the batches, as ``predict_step`` of the task takes them, for a language model ``(tokens, targets)``.

    Raises:
        ConfigError: the task does not call the model once for a batch, with tensors.
    """
    calls: list[tuple[Any, Any]] = []
    step: Callable[..., Any] = task.predict_step
    if isinstance(task, LanguageModelTask):
        # predict_step of Lightning takes the whole batch for the input.
        step = lambda batch, _: task(batch[0])  # noqa: E731
    for batch in batches:
        batch = task.transfer_batch_to_device(batch, task.device, 0)
        handle = model.register_forward_hook(lambda _, inputs, output: calls.append((inputs, output)))
        try:
            with torch.no_grad():
                step(batch, 0)
        finally:
            handle.remove()
        if len(calls) != 1 or not all(isinstance(value, Tensor) for value in (*calls[0][0], calls[0][1])):
            raise ConfigError(
                f"an export needs a model that {type(task).__name__} calls once in predict_step, with tensors as "
                f"positional arguments, and that returns one tensor; it has called it {len(calls)} times"
            )
        yield calls.pop()


def _chain(first: Any, rest: Iterator[Any]) -> Iterator[Any]:
    yield first
    yield from rest


def _in_float64(model: nn.Module) -> nn.Module:
    """Returns a copy of a model in float64 that computes the same function."""
    copied = copy.deepcopy(model).double()
    for module in copied.modules():
        if isinstance(module, nn.RMSNorm) and module.eps is None:
            # torch takes the epsilon of the dtype, and the norm of small values depends on it.
            module.eps = torch.finfo(torch.float32).eps
    return copied


def _exact(model: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor | None:
    """Returns the output of a model in float64; None if the model does not compute in float64."""
    try:
        output = model(*(value.double() if value.is_floating_point() else value for value in inputs))
    except (RuntimeError, TypeError, ValueError):
        return None
    return output if output.dtype == torch.float64 else None


def _classes(data: Any) -> list[str] | None:
    classes = getattr(data, "classes", None)
    return None if classes is None else [str(name) for name in classes]


def _own_buffers(task: pl.LightningModule) -> dict[str, Tensor]:
    """Returns the tensors of a task's state that are not those of its model."""
    return {
        name: value
        for name, value in task.state_dict().items()
        if not name.startswith("model.") and isinstance(value, Tensor)
    }


def _preprocessing(task: pl.LightningModule, data: Any) -> dict[str, Any]:
    """Returns how data become the inputs of the model, for programs without lightkit."""
    if isinstance(data, ImageDataModule):
        return {"kind": "images", "channels": data.channels, "layout": data.layout, "divide_by": 255}
    if isinstance(data, DataModule):
        form = data.hyperparameters["format"]
        return {"kind": "arrays", **form, "divide_by": 255 if form["dtype"] == "uint8" else 1}
    if isinstance(data, TableDataModule):
        return {"kind": "rows", "see": "state.TableDataModule.encoding"}
    if isinstance(task, ForecastTask) and isinstance(data, SeriesDataModule):
        return {"kind": "series", "history": data.history, "horizon": task.horizon, "relative": task.relative}
    return {"kind": "bytes"} if isinstance(data, Text) else {"kind": "unknown"}


def _plain_task(node: Any) -> dict[str, Any]:
    kept = {name: value for name, value in dict(node or {}).items() if name not in _PARTS}
    return _without_paths(kept) if is_in_user_package(str(kept.get("_target_"))) else kept


def _plain_data(node: Any) -> dict[str, Any]:
    kept = {name: value for name, value in dict(node or {}).items() if name not in _TRAINING}
    for name in set(_LOCATIONS) & kept.keys():
        if kept[name] is not None:
            kept[name] = ""
    return _without_paths(kept) if is_in_user_package(str(kept.get("_target_"))) else kept


def _without_paths(value: Any) -> Any:
    """Returns the arguments of a user's class with an empty text for each text that may be a path."""
    if isinstance(value, dict):
        return {name: _without_paths(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_without_paths(part) for part in value]
    return "" if isinstance(value, str) and ("/" in value or "\\" in value or value.startswith("~")) else value
