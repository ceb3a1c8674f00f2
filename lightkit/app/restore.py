"""The task and the data module of an untrusted checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torchmetrics import Metric

from lightkit._util.printable import printable
from lightkit.app import untrusted
from lightkit.app.checks import check_outputs
from lightkit.app.exported import read_export
from lightkit.app.parts import required_names, taken_parts
from lightkit.checkpoints import CONFIG_KEY, check_weights, load_checkpoint, load_weights
from lightkit.checkpoints.training_state import checked_weights
from lightkit.compress.packing import packed_shapes, unpacked_weights
from lightkit.compress.quantization import apply_quantization
from lightkit.compress.widths import WIDTHS_KEY, apply_widths
from lightkit.data import ImageFolder, TableDataModule
from lightkit.data.tabular import TableEncoding
from lightkit.errors import CheckpointError, ConfigError, LightkitError
from lightkit.export import format_of
from lightkit.targets import find_class, is_in_user_package

# The keys of the configuration that restoring reads; the others concern training.
_CONFIG_KEYS = ("data", "model", "task", "trainer")

# A task may take _MAX_FILE_RATIO times the size of its file, since the file may store weights in a narrower dtype, and
# _EXTRA_BYTES for computed tables and for metrics.
_EXTRA_BYTES, _MAX_FILE_RATIO = 128 << 20, 8

# A pruned model is built with the widths of its arguments first, which a small file may describe.
_MAX_DENSE_RATIO = 256

# A model may register twice the parameters of its checkpoint, since it registers a tied weight twice, and these.
_EXTRA_PARAMETERS = 64


@dataclass(frozen=True)
class RestoredTask:
    """A task with the weights of a checkpoint.

    Attributes:
        config: the keys ``data``, ``model``, ``task`` and ``trainer`` of the checkpoint's configuration, as plain
            containers of bounded size.
        task: the task in evaluation mode.
        checkpoint: the loaded checkpoint.
        encoding: the encoding of the rows of tables, if it is another one than that of the checkpoint.
    """

    config: dict[str, Any]
    task: pl.LightningModule
    checkpoint: dict[str, Any]
    encoding: TableEncoding | None = None

    def build_data(self, **arguments: Any) -> pl.LightningDataModule:
        """Builds the data module that the checkpoint names; reads no data yet.

        Args:
            **arguments: arguments of the data module, which replace those in the checkpoint.

        Raises:
            CheckpointError: the checkpoint may not name the class, or the data do not fit the model.
        """
        node = self.config.get("data")
        if isinstance(node, dict) and not _is_user_class(node):
            # Transforms change batches of training alone.
            node = {name: value for name, value in node.items() if name != "transform"}
        data = untrusted.build("data", node, **arguments)
        if isinstance(data, ImageFolder) and not data.is_described:
            # A stranger's checkpoint must not have the folder read that it names.
            raise CheckpointError("the checkpoint does not say the classes, the size or the channels of its images")
        try:
            if isinstance(data, TableDataModule):
                # The encoding of the columns belongs to the weights; without it, the file that a stranger names would
                # be read for another one.
                data.load_state_dict(self.checkpoint.get(type(data).__qualname__) or {"encoding": None})
            check_outputs(data, self.config["model"] or {})
            if isinstance(data, TableDataModule) and self.encoding is not None:
                data.fitted = self.encoding
        except ValueError as error:
            raise CheckpointError(f"the model and the data of the checkpoint do not fit: {error}") from error
        return data


def restore(
    path: str | Path, for_evaluation: bool = False, model: nn.Module | None = None, trust: bool = False
) -> RestoredTask:
    """Builds the task of a checkpoint or export from its configuration, and loads the weights.

    The function does not trust the file. It loads the file as data (``weights_only=True``), builds only classes that
    `lightkit.app.untrusted` allows, and builds no optimizer, callback or logger. It builds the task on the meta device
    first and compares the shapes with the weights, so that a wrong size allocates no memory.

    Args:
        path: a checkpoint of lightkit.train, or an export of lightkit.export, which its suffix tells.
        for_evaluation: build the loss and the metrics too, which a prediction does not need.
        model: a model of the caller's, which gets the weights; None builds the model that the checkpoint describes.
        trust: allow exports in a format in which a file can run code: see `lightkit.export.open_export`.

    Raises:
        ConfigError: ``model`` is given for an export, which has its own, or an export needs a package.
        CheckpointError: the checkpoint is missing or damaged, lightkit.train did not write it, or it names a class that
            a checkpoint may not name.
    """
    path = Path(path)
    exported = None
    if format_of(path) is not None:
        if model is not None:
            raise ConfigError(f"model goes with a checkpoint, and {path} is an export, which has its own")
        checkpoint, exported = read_export(path, trust)
    else:
        checkpoint = load_checkpoint(path, untrusted=True)
    if CONFIG_KEY not in checkpoint:
        raise CheckpointError(f"{path} has no configuration: it was not made by lightkit.train")
    config = checkpoint[CONFIG_KEY]
    if type(config) is not dict or type(config.get("task")) is not dict:
        raise CheckpointError(f"the configuration in {path} has no task")
    config = {key: config.get(key) for key in _CONFIG_KEYS}
    untrusted.check_plain(config)
    # Packed weights take memory of their own only where they fit the model.
    weights = {**checked_weights(checkpoint, path), **packed_shapes(checkpoint)}
    if not for_evaluation:
        # A task without a loss has no place for the loss's class weights.
        weights = {name: value for name, value in weights.items() if not name.startswith("loss.")}
    if model is not None:
        task = model if isinstance(model, pl.LightningModule) else _build_task(config, for_evaluation, model)
        apply_widths(task, checkpoint)
        check_weights(task, {"state_dict": weights}, path)
        load_weights(task, {"state_dict": weights | unpacked_weights(checkpoint)}, path)
        apply_quantization(task, checkpoint)
        return RestoredTask(config, task.eval(), checkpoint)
    with torch.device("meta"), _limit_parameters(2 * len(weights) + _EXTRA_PARAMETERS):
        # A user's class may not support the meta device.
        if not _is_user_class(config["task"]) and not _is_user_class(config["model"]):
            blank = _build_task(config, for_evaluation, exported)
            if exported is None and WIDTHS_KEY in checkpoint:
                _check_memory(blank, path, _MAX_DENSE_RATIO)
                apply_widths(blank, checkpoint)
            check_weights(blank, {"state_dict": weights}, path)
            _check_memory(blank, path)
        elif config["model"] is not None and not _is_user_class(config["model"]):
            _check_memory(untrusted.build("model", config["model"]), path)
    task = _build_task(config, for_evaluation, exported)
    if exported is None:
        apply_widths(task, checkpoint)
    load_weights(task, {"state_dict": weights | unpacked_weights(checkpoint)}, path)
    if exported is None:
        apply_quantization(task, checkpoint)
    return RestoredTask(config, task.eval(), checkpoint)


@contextmanager
def model_errors_as_checkpoint_errors() -> Iterator[None]:
    """Converts, within the context, the errors of a checkpoint's model at run time into a `CheckpointError`.

    Each part of the checkpoint may be valid although the parts do not fit together.

    Raises:
        CheckpointError: the model failed; the message is the first line of the model's error.
    """
    try:
        yield
    except LightkitError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = printable(str(error).partition("\n")[0]) or type(error).__name__
        raise CheckpointError(f"the parts of the checkpoint do not work together: {reason}") from error


def _build_task(config: dict[str, Any], for_evaluation: bool, model: nn.Module | None = None) -> pl.LightningModule:
    node = config["task"]
    taken, required = _parameters_of_task(node)
    # Nothing trains: neither lightkit's classes nor a user's get an optimizer.
    parts: dict[str, Any] = dict.fromkeys({"optimizer", "scheduler"} & required)
    if "model" in taken:
        parts["model"] = untrusted.build("model", config.get("model")) if model is None else model
    # These replace the checkpoint's own entries even where they are None, so that no entry reaches the task unbuilt.
    if "loss" in node:
        parts["loss"] = untrusted.build("loss", node["loss"]) if for_evaluation and node["loss"] is not None else None
    if "metrics" in node:
        parts["metrics"] = untrusted.build_metrics(node["metrics"]) if for_evaluation else {}
    node = {name: value for name, value in node.items() if name not in ("optimizer", "scheduler")}
    return untrusted.build("task", node, **parts)


def _parameters_of_task(node: dict[str, Any]) -> tuple[set[str], set[str]]:
    """Returns the parts that the class of a task takes, and the names of its required parameters.

    Raises:
        CheckpointError: the class is a user's and does not exist.
    """
    if not _is_user_class(node):
        return {"model"}, set()
    try:
        cls = find_class(str(node["_target_"]))
    except ConfigError as error:
        raise CheckpointError(f"task of the checkpoint: {printable(str(error))}") from error
    return taken_parts(cls, node), required_names(cls)


def _is_user_class(node: Any) -> bool:
    """Returns True if the configuration ``node`` names a class in one of the user's packages."""
    return isinstance(node, dict) and is_in_user_package(str(node.get("_target_")))


@contextmanager
def _limit_parameters(limit: int) -> Iterator[None]:
    """Limits the number of parameters that modules may register within the context.

    The configuration of a checkpoint may ask for any number of layers.

    Args:
        limit: the largest number of parameter tensors of all modules together.

    Raises:
        CheckpointError: a constructor registers one parameter more.
    """
    count = 0

    def register(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        nonlocal count
        count += 1
        if count > limit:
            raise CheckpointError("the model that the checkpoint describes has more parameters than the checkpoint")

    handle = register_module_parameter_registration_hook(register)
    try:
        yield
    finally:
        handle.remove()


def _check_memory(task: nn.Module, path: Path, ratio: int = _MAX_FILE_RATIO) -> None:
    """Rejects a task on the meta device that would take far more memory than the file of its checkpoint.

    Args:
        task: the task on the meta device.
        path: the file of the checkpoint.
        ratio: the number of bytes that the task may take for a byte of the file.

    Raises:
        CheckpointError: the task is too large; the message has both sizes in bytes.
    """
    tensors = [*task.parameters(), *task.buffers()]
    for metric in (module for module in task.modules() if isinstance(module, Metric)):
        # The state of a metric may also be a list, which is empty before the first update.
        tensors += [state for state in metric.metric_state.values() if isinstance(state, Tensor)]
    wanted = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    limit = ratio * path.stat().st_size + _EXTRA_BYTES
    if wanted > limit:
        raise CheckpointError(
            f"{path}: the model that the checkpoint describes takes {wanted:,} bytes, and a file of this size may "
            f"describe {limit:,}"
        )
