"""Notes what Python does in a pass through a module that a replay of the GPU's work would leave out."""

from __future__ import annotations

import random
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from types import FunctionType, ModuleType
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils import _pytree as pytree

from lightkit._lightning.module import CURRENT_HOOK, TRAINER

# What a trainer says that stays the same for a whole fit.
_CONSTANT = {
    *("accumulate_grad_batches", "barebones", "estimated_stepping_batches", "global_rank", "is_global_zero"),
    *("local_rank", "max_epochs", "max_steps", "node_rank", "num_devices", "precision", "precision_plugin"),
    *("sanity_checking", "state", "testing", "training", "validating", "world_size"),
}

# Where the trainer, and whoever watches, keep their own.
_NOT_THE_MODULES = {TRAINER, CURRENT_HOOK, "log", "__getstate__"}

# Where a module keeps what is registered with it.
_REGISTERED = {"_parameters", "_buffers", "_modules"}

# Of the nodes by which a parameter takes part in a step: they live as long as the step's history.
_MARK = "lightkit: of a watched step"

_PLAIN = (bool, int, float, complex, str, bytes)
_CONTAINERS = (list, set, frozenset, tuple, deque)

# What an attribute holds is looked into so deep, and where there is no more of it.
_DEPTH = 4
_MOST_HELD = 10_000
_MOST_BYTES = 1 << 16


def is_marked(parameter: nn.Parameter) -> bool:
    """Whether the history of a step that was watched still lives.

    A graph cannot be captured then: the parameter would take part in it by the same node, which belongs to the stream
    of that step.
    """
    return _MARK in get_gradient_edge(parameter).node.metadata


class LogCall(NamedTuple):
    """A call of ``self.log``."""

    name: str
    value: Any
    arguments: tuple
    options: dict[str, Any]


class Watch:
    """While it is entered, a module's pass is watched; entered again, for its next part.

    Noted are: attributes of the module and of its parts that change, what is read of the trainer but constants, the
    use of `index`, random numbers drawn on the CPU, waiting for the GPU, and a logged ``Metric``. What is logged is
    logged when the watch is left.

    What it cannot see: variables outside of the module, files, the clock, what is printed.

    Attributes:
        cause: the first thing that was noted, or None.
    """

    def __init__(self, module: pl.LightningModule, batch_idx: int) -> None:
        self.cause: str | None = None
        self.index = _WatchedIndex(batch_idx)
        self._module = module
        self._on_gpu = module.device.type == "cuda"

    def __enter__(self) -> Watch:
        self._trainers = {m: vars(m)[TRAINER] for m in self._module.modules() if vars(m).get(TRAINER) is not None}
        for part, trainer in self._trainers.items():
            vars(part)[TRAINER] = _WatchedTrainer(trainer, self)
        self._log = self._module.log
        self._recorder = vars(self._module)["log"] = Recorder()
        self._attributes = attributes(self._module)
        self._randomness = _randomness()
        self._warnings = warnings.catch_warnings(record=True)
        self._warned = self._warnings.__enter__()
        warnings.simplefilter("always")
        if self._on_gpu:
            self._sync_mode = torch.cuda.get_sync_debug_mode()
            torch.cuda.set_sync_debug_mode("warn")
        return self

    def __exit__(self, exception: type[BaseException] | None, *_: object) -> None:
        if self._on_gpu:
            torch.cuda.set_sync_debug_mode(self._sync_mode)
        self._warnings.__exit__(None, None, None)
        for part, trainer in self._trainers.items():
            vars(part)[TRAINER] = trainer
        vars(self._module)["log"] = self._log
        if exception is not None:
            return
        self._look_at_warnings()
        self._compare()
        for parameter in self._module.parameters():
            if parameter.requires_grad:
                get_gradient_edge(parameter).node.metadata[_MARK] = True
        if self.index.is_used:
            self.note("uses batch_idx")
        if (cause := self._recorder.obstacle) is not None:
            self.note(cause)
        attributes = vars(self._module)
        before, attributes[CURRENT_HOOK] = attributes[CURRENT_HOOK], "training_step"
        for call in self._recorder.calls:
            value = int(call.value) if isinstance(call.value, _WatchedIndex) else call.value
            self._log(call.name, value, *call.arguments, **call.options)
        attributes[CURRENT_HOOK] = before

    def look_at_outputs(self, outputs: dict[str, Any]) -> None:
        """Notes what is returned beside tensors: a replay has it as it was."""
        for name, value in outputs.items():
            if not all(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value)):
                self.note(f"returns {name!r}, which is not all tensors")

    def note(self, cause: str) -> None:
        """Keeps the first cause."""
        if self.cause is None:
            self.cause = f"{type(self._module).__name__}.training_step {cause}"

    def _look_at_warnings(self) -> None:
        for warning in self._warned:
            if "called a synchronizing CUDA operation" in str(warning.message):
                self.note("waits for the GPU, as .item() and .cpu() do")
            elif "synchronization debug mode" not in str(warning.message).lower():
                warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)

    def _compare(self) -> None:
        if (name := first_change(self._attributes, attributes(self._module))) is not None:
            self.note(f"changes self.{name}")
        if not all(map(_is_equal, self._randomness, _randomness())):
            self.note("draws random numbers on the CPU")


class Recorder:
    """Takes the place of a module's ``log`` and keeps the calls."""

    def __init__(self) -> None:
        self.calls: list[LogCall] = []

    def __call__(self, name: str, value: Any, *arguments: Any, **options: Any) -> None:
        """See ``LightningModule.log``."""
        # A copy, as Lightning makes one: what is logged may be written to afterwards.
        value = value.detach().clone() if type(value) is Tensor else value
        self.calls.append(LogCall(name, value, arguments, options))

    @property
    def obstacle(self) -> str | None:
        """Why these calls cannot be made again with the tensors of another step, or None."""
        for call in self.calls:
            if isinstance(call.value, _WatchedIndex):
                return "uses batch_idx"
            if type(call.value) not in (Tensor, int, float):
                return f"logs {call.name!r}, which is no tensor but a {type(call.value).__name__}"
            if call.options.get("enable_graph"):
                return f"logs {call.name!r} with its graph"
            if type(call.options.get("batch_size")) not in (int, type(None)):
                return f"logs {call.name!r} with a batch_size that is no int"
        return None


class _WatchedTrainer:
    """A trainer that tells what is read of it."""

    def __init__(self, trainer: pl.Trainer, watch: Watch) -> None:
        self.__dict__.update(_trainer=trainer, _watch=watch)

    def __getattr__(self, name: str) -> Any:
        if name not in _CONSTANT:
            self._watch.note(f"reads trainer.{name}")
        return getattr(self._trainer, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._watch.note(f"sets trainer.{name}")
        setattr(self._trainer, name, value)


class _WatchedIndex(int):
    """A number that knows whether it has been used."""

    is_used = False


def _noting(name: str) -> Any:
    method = getattr(int, name)

    def note(self: _WatchedIndex, *arguments: Any) -> Any:
        self.is_used = True
        return method(self, *arguments)

    return note


for _name in (
    *("__add__", "__radd__", "__sub__", "__rsub__", "__mul__", "__rmul__", "__mod__", "__rmod__", "__divmod__"),
    *("__floordiv__", "__rfloordiv__", "__truediv__", "__rtruediv__", "__pow__", "__rpow__", "__neg__", "__abs__"),
    *("__and__", "__rand__", "__or__", "__ror__", "__xor__", "__lshift__", "__rlshift__", "__rshift__", "__invert__"),
    *("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "__bool__", "__hash__"),
    *("__index__", "__int__", "__float__", "__str__", "__repr__", "__format__"),
):
    setattr(_WatchedIndex, _name, _noting(_name))


def attributes(module: nn.Module, but_of: tuple[type, ...] = ()) -> dict[str, Any]:
    """What a module and its parts hold, some levels deep, by name; without those of some classes.

    References, so that nothing that is gone is taken for something new at the same place.
    """
    found = {}
    for prefix, part in module.named_modules():
        if isinstance(part, but_of):
            continue
        for name, value in vars(part).items():
            if name not in _NOT_THE_MODULES:
                # Parameters and buffers are with the module: a replay reads what is written into them.
                held = tuple(value.items()) if name in _REGISTERED else _contents(value)
                found[f"{prefix}.{name}" if prefix else name] = held
    return found


def references(parts: Iterable[nn.Module]) -> list[Any]:
    """What may be other objects after a change of some modules' attributes: quick to compare, by identity."""
    found: list[Any] = []
    for part in parts:
        held = vars(part)
        if isinstance(part, pl.LightningModule):
            found += [value for name, value in held.items() if name not in _NOT_THE_MODULES]
        else:
            found += held.values()
        found += held["_parameters"].values()
        found += held["_buffers"].values()
        found += held["_modules"].values()
        found += held["_forward_hooks"].values()
        found += held["_forward_pre_hooks"].values()
        found += held["_backward_hooks"].values()
        found += held["_backward_pre_hooks"].values()
    return found


def first_change(before: dict[str, Any], after: dict[str, Any]) -> str | None:
    """The first attribute that is another one now, or None."""
    missing = object()
    for name in (*before, *(after.keys() - before.keys())):
        if not _is_same(before.get(name, missing), after.get(name, missing)):
            return name
    return None


def _contents(value: Any, depth: int = _DEPTH) -> Any:
    """A value such that two of them are the same where nothing in it has changed."""
    if isinstance(value, (*_PLAIN, type(None), type, FunctionType, ModuleType)):
        return value
    if isinstance(value, Tensor):
        # What is written into a tensor with the module is read by a replay, too.
        is_number_of_host = value.device.type == "cpu" and value.dim() == 0 and not value.is_inference()
        return (value, value._version) if is_number_of_host else value
    if isinstance(value, np.ndarray):
        return (value, value.tobytes() if value.nbytes <= _MOST_BYTES else None)
    if (state := _state_of_generator(value)) is not None:
        return (value, state)
    if isinstance(value, Iterator):
        # Whoever asks it for the next one changes it.
        return object()
    if depth == 0 or isinstance(value, nn.Module):
        return value
    if isinstance(value, dict):
        parts = [part for item in list(value.items())[:_MOST_HELD] for part in item]
    elif isinstance(value, _CONTAINERS):
        parts = list(value)[:_MOST_HELD]
    else:
        return (value, *_contents_of_object(value, depth))
    return (len(value), *(_contents(part, depth - 1) for part in parts))


def _contents_of_object(value: Any, depth: int) -> Iterator[Any]:
    for name, held in getattr(value, "__dict__", {}).items():
        yield name
        yield _contents(held, depth - 1)


def _state_of_generator(value: Any) -> str | None:
    if isinstance(value, torch.Generator):
        return str(value.get_state().tolist()) if value.device.type == "cpu" else None
    if isinstance(value, np.random.Generator):
        return str(value.bit_generator.state)
    if isinstance(value, (np.random.RandomState, random.Random)):
        return str(value.get_state() if isinstance(value, np.random.RandomState) else value.getstate())
    return None


def _is_same(before: Any, after: Any) -> bool:
    if isinstance(before, tuple) and isinstance(after, tuple):
        return len(before) == len(after) and all(map(_is_same, before, after))
    return before is after or (type(before) is type(after) and type(before) in _PLAIN and before == after)


def _is_equal(before: Any, after: Any) -> bool:
    return torch.equal(before, after) if isinstance(before, Tensor) else before == after


def _randomness() -> tuple:
    """The states of the CPU's generators."""
    name, keys, position, *_ = np.random.get_state()
    return random.getstate(), torch.get_rng_state(), name, keys.tobytes(), position
