"""Checks of the training state in an untrusted checkpoint, before a training resumes from it.

torch and Lightning do not check states. An optimizer's kernel reads beyond the end of a state that is smaller than its
parameter, and schedulers and loops set their attributes to any values in the file.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from pathlib import Path
from typing import Any, TypeGuard

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.optim import Optimizer

from lightkit._util.printable import printable
from lightkit.errors import CheckpointError

_DTYPES = {
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128, torch.bool),
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
}

# The options of an optimizer's implementation, for which the values of the present run replace those in a checkpoint.
_IMPLEMENTATION = ("fused", "foreach", "capturable", "differentiable")

# Optimizers of torch whose states have other shapes than the parameters.
_OTHER_SHAPES = (torch.optim.LBFGS, torch.optim.Adafactor)

# The largest value of a counter, such as ``global_step``.
_MAX_COUNT = 2**53
_VERSION = re.compile(r"[1-9]\d?\.\d+[\w.+-]*")

# The types of entries that Lightning writes.
_KINDS = {"loops": dict, "callbacks": dict, "optimizer_states": list, "lr_schedulers": list}


def checked_weights(checkpoint: dict[str, Any], path: str | Path) -> dict[str, Tensor]:
    """Returns a copy of a checkpoint's state dict after a check that its values are plain tensors on the CPU.

    The extra state of a module, under a name that ends in ``_extra_state``, may be of any type.

    Args:
        checkpoint: the content of the checkpoint.
        path: the path of the checkpoint, for the message.

    Raises:
        CheckpointError: the state dict is no mapping, a name is no string, or a value is something else; the message
            names the first such entry.
    """
    weights = checkpoint["state_dict"]
    if type(weights) not in (dict, OrderedDict):
        raise CheckpointError(f"{path}: its state_dict is a {type(weights).__name__}, expected a mapping")
    # A file can replace the methods of an OrderedDict, but not those of dict.
    weights = dict(dict.items(weights))
    for name, value in weights.items():
        # The extra state of a module may be of any type.
        is_extra = type(name) is str and name.endswith("_extra_state")
        if type(name) is not str or not (_is_plain(value) or is_extra):
            kind = f"{type(value).__name__} of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
            raise CheckpointError(f"{path}: {printable(str(name))} must be a plain tensor on the CPU, got {kind}")
    return weights


def check_training_state(checkpoint: dict[str, Any], path: str | Path) -> None:
    """Rejects a checkpoint whose entries have other types than those that Lightning writes.

    Args:
        checkpoint: the content of the checkpoint.
        path: the path of the checkpoint, for the message.

    Raises:
        CheckpointError: an entry has another type, or a counter is out of range; the message names the entry.
    """
    checked_weights(checkpoint, path)
    for key, kind in _KINDS.items():
        if type(checkpoint.get(key, kind())) is not kind:
            raise _wrong(path, key, checkpoint[key])
    if "callbacks" not in checkpoint:
        raise CheckpointError(f"{path} cannot be resumed: it has no states of callbacks")
    for key in ("epoch", "global_step"):
        _check_counter(path, key, checkpoint.get(key, 0))
    version = checkpoint.get("pytorch-lightning_version", "2.0")
    if type(version) is not str or not _VERSION.fullmatch(version):
        raise _wrong(path, "pytorch-lightning_version", version)
    for name, state in checkpoint.get("callbacks", {}).items():
        if type(name) is not str or type(state) is not dict:
            raise _wrong(path, f"callbacks.{name}", state)
    _check_counters(path, "loops", checkpoint.get("loops", {}), 0)
    for state in checkpoint.get("optimizer_states", []):
        groups = state.get("param_groups") if type(state) is dict else None
        if type(groups) is not list or type(state.get("state")) is not dict:
            raise _wrong(path, "optimizer_states", state)


def _check_counters(path: str | Path, name: str, value: Any, depth: int) -> None:
    if type(value) is int:
        _check_counter(path, name, value)
    elif type(value) is dict and depth < 8:
        for key, part in value.items():
            # The states of modules and data loaders may be of any type.
            if key != "state_dict" and "combined_loader" not in str(key):
                _check_counters(path, f"{name}.{key}", part, depth + 1)


def _check_counter(path: str | Path, name: str, value: Any) -> None:
    if type(value) is not int or not 0 <= value <= _MAX_COUNT:
        raise _wrong(path, name, value)


def _wrong(path: str | Path, name: str, value: Any) -> CheckpointError:
    shown = repr(value) if isinstance(value, (int, float, str)) else f"a {type(value).__name__}"
    return CheckpointError(f"{path} cannot be resumed: its {printable(name[:100])} is {printable(shown[:100])}")


def _is_plain(value: object) -> TypeGuard[Tensor]:
    return (
        isinstance(value, Tensor)
        and type(value) in (Tensor, nn.Parameter)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and value.dtype in _DTYPES
    )


class CheckTrainingState(Callback):
    """A callback that checks the states of optimizers and schedulers before Lightning restores them.

    The hooks raise a `CheckpointError` that names the entry if a state does not fit its optimizer or scheduler.

    Args:
        path: the path of the checkpoint, for messages.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = path
        self._checkpoint: dict[str, Any] = {}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Checks the weights and counters, and keeps the checkpoint for `on_fit_start`, when the optimizers exist.

        The weights become a plain dict: an ``OrderedDict`` in a file could have other methods.

        Raises:
            CheckpointError: a weight or a counter is not what a training saves.
        """
        check_training_state(checkpoint, self._path)
        checkpoint["state_dict"] = checked_weights(checkpoint, self._path)
        self._checkpoint = checkpoint

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Checks the optimizers' and schedulers' states, and replaces saved implementation options by the present ones.

        These options, such as ``fused`` and ``foreach``, choose the implementation of an optimizer's step.
        """
        states = self._checkpoint.get("optimizer_states", [])
        for optimizer, state in zip(trainer.optimizers, states, strict=False):
            self._check_optimizer(optimizer, state)
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        for scheduler, state in zip(schedulers, self._checkpoint.get("lr_schedulers", []), strict=False):
            own = scheduler.state_dict()
            strange = {str(name) for name in state.keys() - own.keys()} if type(state) is dict else {"state"}
            strange |= {name for name in own.keys() & state.keys() if not _is_alike(state[name], own[name])}
            if strange:
                raise CheckpointError(
                    f"{self._path} cannot be resumed: {type(scheduler).__name__} has no such {printable(min(strange))}"
                )
        self._checkpoint = {}

    def _check_optimizer(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        cls = type(optimizer)
        has_shapes = cls.__module__.startswith(("torch.optim", "lightkit.optim")) and not issubclass(cls, _OTHER_SHAPES)
        for index, entry in state["state"].items():
            known = type(index) is int and 0 <= index < len(parameters) and type(entry) is dict
            for name, value in entry.items() if known else [("state", index)]:
                fits = not isinstance(value, Tensor) or (
                    _is_plain(value) and (not has_shapes or value.dim() == 0 or value.shape == parameters[index].shape)
                )
                if not known or not fits:
                    raise CheckpointError(
                        f"{self._path} cannot be resumed: the {printable(str(name))} of {type(optimizer).__name__} "
                        "does not fit the parameters"
                    )
        for own, group in zip(optimizer.param_groups, state["param_groups"], strict=False):
            if type(group) is not dict:
                raise _wrong(self._path, "param_groups", group)
            group.update({name: own[name] for name in _IMPLEMENTATION if name in own})
            for name in own.keys() & group.keys() - {"params"}:
                if not _is_alike(group[name], own[name]):
                    raise _wrong(self._path, f"param_groups.{name}", group[name])


def _is_alike(value: Any, own: Any) -> bool:
    """Returns True if ``value`` from a checkpoint may replace the present value ``own``.

    Both must be numbers, tensors or None, or both lists or tuples, or ``value`` has the type of ``own``. If ``own`` is
    None, ``value`` may be any plain value.
    """
    plain = (int, float, bool, Tensor, type(None))
    if own is None:
        return type(value) in (*plain, str, list, tuple, dict)
    if isinstance(own, plain):
        return type(value) in plain
    if isinstance(own, (list, tuple)):
        return isinstance(value, (list, tuple))
    return type(value) is type(own) or isinstance(value, type(own))
