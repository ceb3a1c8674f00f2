"""The callbacks of the group ``compress``, which make the model of a job smaller."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig
from torch import nn

from lightkit._util.printable import printable
from lightkit.app.parts import model_of
from lightkit.app.restore import restore
from lightkit.compress import Distil, Prune, Quantize
from lightkit.config import build, to_plain
from lightkit.errors import ConfigError
from lightkit.targets import find_class

# The tasks of lightkit whose outputs are values.
_VALUE_TASKS = ("lightkit.tasks.ForecastTask", "lightkit.tasks.RegressionTask")


def build_compression(config: DictConfig) -> list[Callback]:
    """Builds the callbacks of the group ``compress``; an entry that is null is left out.

    Args:
        config: the configuration of the job.

    Raises:
        ConfigError: an entry is no configuration of a callback, or cannot go with the job.
        CheckpointError: the checkpoint of a teacher cannot be read.
    """
    entries = to_plain(config.get("compress")) or {}
    callbacks = []
    for name, node in entries.items():
        if node is None:
            continue
        if not isinstance(node, dict) or node.get("_target_") is None:
            raise ConfigError(f"compress.{name} must be null or have a _target_ that is a Callback, got {node!r}")
        callback = build(_resolved(node, config))
        if not isinstance(callback, Callback):
            raise ConfigError(f"compress.{name} must be null or have a _target_ that is a Callback, got {callback!r}")
        if config.get("compile") and isinstance(callback, (Distil, Prune, Quantize)):
            raise ConfigError(f"compile=true compiles the model as it is at the start; leave compress.{name} out")
        callbacks.append(callback)
    # A teacher is there before the callback that takes the dense model for it.
    return sorted(callbacks, key=lambda callback: not isinstance(callback, Distil))


def _resolved(node: dict[str, Any], config: DictConfig) -> dict[str, Any]:
    """Returns the configuration of a callback, in which the teacher of `Distil` is a module and its targets a kind."""
    if find_class(str(node["_target_"])) is not Distil:
        return node
    node = dict(node)
    if node.get("targets") == "auto":
        node["targets"] = "values" if str(config.task.get("_target_")) in _VALUE_TASKS else "classes"
    if isinstance(node.get("teacher"), str):
        node["teacher"] = load_teacher(node["teacher"])
    return node


def load_teacher(path: str) -> nn.Module:
    """Returns the model of a checkpoint.

    Raises:
        ConfigError: the task of the checkpoint has no ``model``.
        CheckpointError: the checkpoint cannot be read.
    """
    # The random numbers of the job are those of a job without a teacher.
    with torch.random.fork_rng(devices=[]):
        model = model_of(restore(path).task)
    if model is None:
        raise ConfigError(f"compress.distil.teacher={printable(path)}: its task has no model")
    return model
