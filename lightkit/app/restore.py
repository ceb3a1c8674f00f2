"""The task and the data of a checkpoint, built without trusting whoever made it."""

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
from lightkit.checkpoints import CONFIG_KEY, check_weights, load_checkpoint, load_weights
from lightkit.checkpoints.training_state import checked_weights
from lightkit.errors import CheckpointError, LightkitError
from lightkit.targets import user_packages

# Parts of the configuration that are read; the others concern training.
_READ = ("data", "model", "task", "trainer")

# Memory that a model may take beyond what its checkpoint holds, for tables that are computed and for metrics; and how
# many times the file, since weights may be stored in a narrower dtype than the model has.
_FREE_BYTES, _TIMES_FILE = 128 << 20, 8

# Parameters that a model may register beyond those in its checkpoint: a weight that is tied is registered twice.
_FREE_PARAMETERS = 64


@dataclass(frozen=True)
class Restored:
    """A task with the weights of a checkpoint.

    Attributes:
        config: of the configuration that the checkpoint carries, what stands under ``data``, ``model``, ``task`` and
            ``trainer``: plain containers, checked to be bounded.
        task: in evaluation mode.
        checkpoint: as it was loaded.
    """

    config: dict[str, Any]
    task: pl.LightningModule
    checkpoint: dict[str, Any]

    def build_data(self, **arguments: Any) -> pl.LightningDataModule:
        """Builds the data module that the checkpoint names; nothing is read yet.

        Args:
            **arguments: of the data module; they win over those in the checkpoint.

        Raises:
            CheckpointError: it may not be built, or serves what the model is not for.
        """
        data = untrusted.build("data", self.config.get("data"), **arguments)
        try:
            check_outputs(data, self.config["model"])
        except ValueError as error:
            raise CheckpointError(f"the checkpoint does not fit itself: {error}") from error
        return data


def restore(path: str | Path, evaluates: bool = False) -> Restored:
    """Builds the task of a checkpoint from the configuration in it, and loads its weights.

    The file may be a stranger's: it is loaded as data, the configuration may name the classes of
    `lightkit.app.untrusted` alone, and only the model and the task are built, no optimizer, callback or logger. They
    are built without memory first, and their shapes are compared with the weights.

    Args:
        path: a checkpoint of lightkit.train.
        evaluates: build the loss and the metrics, too, which a prediction has no use for.

    Raises:
        CheckpointError: the checkpoint is missing, damaged, not made by lightkit.train, or names what it may not.
    """
    path = Path(path)
    checkpoint = load_checkpoint(path, is_strangers=True)
    if CONFIG_KEY not in checkpoint:
        raise CheckpointError(f"{path} carries no configuration: it was not made by lightkit.train")
    config = checkpoint[CONFIG_KEY]
    if type(config) is not dict or type(config.get("task")) is not dict:
        raise CheckpointError(f"the configuration in {path} has no task")
    config = {key: config.get(key) for key in _READ}
    untrusted.check_plain(config)
    weights = checked_weights(checkpoint, path)
    if not evaluates:
        # A prediction has no loss, which may have weights of the classes.
        weights = {name: value for name, value in weights.items() if not name.startswith("loss.")}
    with torch.device("meta"), _at_most_parameters(2 * len(weights) + _FREE_PARAMETERS):
        # A class of the user's need not know how to be built without memory.
        if not _is_users(config["task"]) and not _is_users(config["model"]):
            blank = _build_task(config, evaluates)
            check_weights(blank, {"state_dict": weights}, path)
            _check_memory(blank, path)
        elif not _is_users(config["model"]):
            _check_memory(untrusted.build("model", config["model"]), path)
    task = _build_task(config, evaluates)
    load_weights(task, {"state_dict": weights}, path)
    return Restored(config, task.eval(), checkpoint)


@contextmanager
def errors_of_a_model() -> Iterator[None]:
    """Makes what goes wrong in the model of a checkpoint, while it runs, an error of the checkpoint.

    Its parts may be right one by one and not go together.

    Raises:
        CheckpointError: in the words of the part that refused.
    """
    try:
        yield
    except LightkitError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = printable(str(error).partition("\n")[0]) or type(error).__name__
        raise CheckpointError(f"the parts of the checkpoint do not work together: {reason}") from error


def _build_task(config: dict[str, Any], evaluates: bool) -> pl.LightningModule:
    node = config["task"]
    parts: dict[str, Any] = {"model": untrusted.build("model", config.get("model"))}
    # Given explicitly, even as None: the checkpoint's own must not be taken for an argument.
    if "loss" in node:
        parts["loss"] = untrusted.build("loss", node["loss"]) if evaluates and node["loss"] is not None else None
    if "metrics" in node:
        parts["metrics"] = untrusted.build_metrics(node["metrics"]) if evaluates else {}
    # Not for a user's class to build either: nothing is trained.
    node = {name: value for name, value in node.items() if name not in ("optimizer", "scheduler")}
    return untrusted.build("task", node, **parts)


def _is_users(node: Any) -> bool:
    """Returns True if a class of the user's is named there."""
    target = str(node.get("_target_")) if isinstance(node, dict) else ""
    return any(target.startswith(f"{package}.") for package in user_packages())


@contextmanager
def _at_most_parameters(most: int) -> Iterator[None]:
    """Ends a construction that registers more parameters than a checkpoint has: a number of layers may be any."""
    count = 0

    def register(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        nonlocal count
        count += 1
        if count > most:
            raise CheckpointError("the model that the checkpoint describes has more parameters than the checkpoint")

    handle = register_module_parameter_registration_hook(register)
    try:
        yield
    finally:
        handle.remove()


def _check_memory(task: nn.Module, path: Path) -> None:
    """Refuses a task, built without memory, that would take far more than its checkpoint.

    Raises:
        CheckpointError: says how much.
    """
    tensors = [*task.parameters(), *task.buffers()]
    for metric in (module for module in task.modules() if isinstance(module, Metric)):
        # One that is empty yet is a list.
        tensors += [state for state in metric.metric_state.values() if isinstance(state, Tensor)]
    wanted = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    most = _TIMES_FILE * path.stat().st_size + _FREE_BYTES
    if wanted > most:
        raise CheckpointError(
            f"{path}: the model that the checkpoint describes takes {wanted:,} bytes, and its file explains {most:,}"
        )
