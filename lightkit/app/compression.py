"""The group ``compress`` of a job: callbacks that make its model smaller, or the search for the smallest one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig
from torch import nn

from lightkit._util.printable import printable
from lightkit.app.compression_request import AUTO, CompressionRequest
from lightkit.app.parts import model_of
from lightkit.app.restore import restore
from lightkit.compress import Distil, Prune, Quantize, Sparsify
from lightkit.config import build, to_plain
from lightkit.errors import ConfigError
from lightkit.targets import find_class
from lightkit.tasks import ForecastTask, RegressionTask

# The tasks of lightkit whose outputs are values.
_VALUE_TASKS = (ForecastTask, RegressionTask)

# The directory of the results of a search, in that of the run.
_DIRECTORY = "compressed"


def find_request(config: DictConfig) -> CompressionRequest | None:
    """Returns the search that ``compress.max_drop`` asks for; None if it is null.

    The entries of the group say what the search may change: `Prune` the widths, `Quantize` the bits of each weight,
    none of both the two. `Sparsify` and `Distil` give their shares.

    Args:
        config: the configuration of the job.

    Raises:
        ConfigError: the entries cannot be searched together.
    """
    entries = dict(to_plain(config.get("compress")) or {})
    max_drop = entries.pop("max_drop", None)
    if max_drop is None:
        return None
    if isinstance(max_drop, bool) or not isinstance(max_drop, (int, float)):
        raise ConfigError(f"compress.max_drop must be a share of the validation set, such as 0.003, got {max_drop!r}")
    by_class = {_class_of(name, node): node for name, node in entries.items() if node is not None}
    unknown = [found.__name__ for found in by_class if found not in (Prune, Quantize, Sparsify, Distil)]
    if unknown:
        raise ConfigError(f"compress.max_drop={max_drop}: lightkit does not search with {', '.join(unknown)}")
    if Sparsify in by_class and (Prune not in by_class or Quantize in by_class):
        raise ConfigError(f"compress.max_drop={max_drop} searches with zeros by compress=[prune,sparse] alone")
    has_all = Prune not in by_class and Quantize not in by_class
    distil: Mapping[str, Any] = by_class.get(Distil, {})
    if distil.get("teacher") is not None:
        raise ConfigError(f"compress.max_drop={max_drop} takes the trained model for the teacher of Distil, not a file")
    request = CompressionRequest(
        keep_macs=CompressionRequest.keep_macs if has_all or Prune in by_class else None,
        bits=AUTO if has_all or Quantize in by_class else None,
        zeros=by_class.get(Sparsify, {}).get("zeros"),
        distil=distil.get("weight", 0.0),
        max_drop=max_drop,
        accelerator=str(config.trainer.get("accelerator", "auto")),
        seed=config.seed,
        output=str(Path(config.run_dir) / _DIRECTORY),
    )
    request.check()
    if by_class:
        settings = [name for name in ("zeros", "weight") if any(name in node for node in by_class.values())]
        print(f"compress.max_drop: the search takes {' and '.join(settings) or 'no value'} from compress, no others")
    return request


def build_compression(config: DictConfig) -> list[Callback]:
    """Builds the callbacks of the group ``compress``; an entry that is null is left out, and with ``max_drop`` all are.

    Args:
        config: the configuration of the job.

    Raises:
        ConfigError: an entry is no configuration of a callback, or cannot go with the job.
        CheckpointError: the checkpoint of a teacher cannot be read.
    """
    entries = to_plain(config.get("compress")) or {}
    callbacks = []
    searches = entries.pop("max_drop", None) is not None
    for name, node in entries.items():
        if node is None:
            continue
        _class_of(name, node)
        if searches:
            # The entries say what the search after the training may change.
            continue
        callback = build(_resolved(node, config))
        if not isinstance(callback, Callback):
            raise ConfigError(f"compress.{name} must be null or have a _target_ that is a Callback, got {callback!r}")
        if config.get("compile") and isinstance(callback, (Distil, Prune, Quantize)):
            raise ConfigError(f"compile=true compiles the model as it is at the start; leave compress.{name} out")
        callbacks.append(callback)
    # A teacher is there before the callback that takes the dense model for it.
    return sorted(callbacks, key=lambda callback: not isinstance(callback, Distil))


def _class_of(name: str, node: Any) -> type:
    """Returns the class of the entry ``name`` of the group."""
    if not isinstance(node, dict) or node.get("_target_") is None:
        raise ConfigError(f"compress.{name} must be null or have a _target_ that is a Callback, got {node!r}")
    return find_class(str(node["_target_"]))


def _resolved(node: dict[str, Any], config: DictConfig) -> dict[str, Any]:
    """Returns the configuration of a callback, in which the teacher of `Distil` is a module and its targets a kind."""
    if find_class(str(node["_target_"])) is not Distil:
        return node
    node = dict(node)
    if node.get("targets") == "auto":
        task = find_class(str(config.task.get("_target_")))
        node["targets"] = "values" if isinstance(task, type) and issubclass(task, _VALUE_TASKS) else "classes"
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
