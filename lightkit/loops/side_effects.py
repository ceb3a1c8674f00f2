"""A recorder of the side effects of a pass through a module, which a replay of a CUDA graph would leave out."""

from __future__ import annotations

import random
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from types import FunctionType, ModuleType
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils import _pytree as pytree

from lightkit._lightning.module import CURRENT_HOOK, TRAINER

# Attributes of a trainer that are constant during a fit.
_CONSTANT = {
    *("accumulate_grad_batches", "barebones", "estimated_stepping_batches", "global_rank", "is_global_zero"),
    *("local_rank", "max_epochs", "max_steps", "node_rank", "num_devices", "precision", "precision_plugin"),
    *("sanity_checking", "state", "testing", "training", "validating", "world_size"),
}

# Attributes of a module that belong to the trainer or to this recorder.
_NOT_THE_MODULES = {TRAINER, CURRENT_HOOK, "log", "__getstate__"}

# Attributes in which a module keeps what is registered with it.
_REGISTERED = {"_parameters", "_buffers", "_modules"}

# The key by which the gradient edges of parameters are marked. An edge lives as long as the history of the step.
_MARK = "lightkit: of a recorded step"

_PLAIN = (bool, int, float, complex, str, bytes)
_CONTAINERS = (list, set, frozenset, tuple, deque)

# Limits of a snapshot: levels of nesting, items of a container, bytes of a NumPy array.
_MAX_DEPTH = 4
_MAX_ITEMS = 10_000
_MAX_BYTES = 1 << 16


def has_recorded_history(parameter: nn.Parameter) -> bool:
    """Returns True if the autograd history of a step that `SideEffectRecorder` recorded is still alive.

    A capture must not start then: autograd would reuse the node of ``parameter``, which belongs to the stream of that
    step.
    """
    return _MARK in _node_metadata(parameter)


def _node_metadata(parameter: nn.Parameter) -> dict[Any, Any]:
    metadata: Any = get_gradient_edge(parameter).node.metadata
    return metadata


class LogCall(NamedTuple):
    """The arguments of a call of ``self.log``."""

    name: str
    value: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]


class SideEffectRecorder:
    """A context that records the side effects of the forward or backward pass; enter it once for each pass of a step.

    It records changed attributes of the module and of its submodules, reads of trainer attributes that may change
    during a fit, uses of `index`, random numbers drawn on the CPU, waits for the GPU and a logged ``Metric``. It delays
    the calls of ``self.log`` to the end of the context.

    It does not see variables outside of the module, files, the clock and printed text.

    Args:
        module: the module in a fit.
        batch_idx: the index of the batch.

    Attributes:
        first: the first side effect, as a sentence about ``training_step``; None if there is none.
        index: an int equal to ``batch_idx`` that records its uses; pass it to ``training_step``.
    """

    def __init__(self, module: pl.LightningModule, batch_idx: int) -> None:
        self.first: str | None = None
        self.index = _RecordingIndex(batch_idx)
        self._module = module
        self._on_gpu = module.device.type == "cuda"

    def __enter__(self) -> SideEffectRecorder:
        self._trainers = {m: vars(m)[TRAINER] for m in self._module.modules() if vars(m).get(TRAINER) is not None}
        for part, trainer in self._trainers.items():
            vars(part)[TRAINER] = _RecordingTrainer(trainer, self)
        self._log = self._module.log
        self._log_recorder = vars(self._module)["log"] = LogRecorder()
        self._attributes = snapshot_attributes(self._module)
        self._random_states = _random_states()
        self._warnings = warnings.catch_warnings(record=True)
        self._caught = self._warnings.__enter__()
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
        self._check_warnings()
        self._check_state()
        for parameter in self._module.parameters():
            if parameter.requires_grad:
                _node_metadata(parameter)[_MARK] = True
        if self.index.is_used:
            self.record("uses batch_idx")
        if (effect := self._log_recorder.side_effect()) is not None:
            self.record(effect)
        attributes = vars(self._module)
        before, attributes[CURRENT_HOOK] = attributes[CURRENT_HOOK], "training_step"
        for call in self._log_recorder.calls:
            value = int(call.value) if isinstance(call.value, _RecordingIndex) else call.value
            self._log(call.name, value, *call.arguments, **call.options)
        attributes[CURRENT_HOOK] = before

    def check_outputs(self, outputs: dict[str, Any]) -> None:
        """Records each output that is not all tensors, because a replay would return the captured step's object.

        Args:
            outputs: the outputs of ``training_step`` by name.
        """
        for name, value in outputs.items():
            if not all(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value)):
                self.record(f"returns {name!r}, which is not all tensors")

    def record(self, effect: str) -> None:
        """Sets ``first`` to the sentence "<class of the module>.training_step <effect>", unless it has an earlier one.

        Args:
            effect: a predicate whose subject is ``training_step``, such as ``"uses batch_idx"``.
        """
        if self.first is None:
            self.first = f"{type(self._module).__name__}.training_step {effect}"

    def _check_warnings(self) -> None:
        for warning in self._caught:
            if "called a synchronizing CUDA operation" in str(warning.message):
                self.record("waits for the GPU, as .item() and .cpu() do")
            elif "synchronization debug mode" not in str(warning.message).lower():
                warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)

    def _check_state(self) -> None:
        if (name := first_change(self._attributes, snapshot_attributes(self._module))) is not None:
            self.record(f"changes self.{name}")
        if not all(map(_is_equal, self._random_states, _random_states())):
            self.record("draws random numbers on the CPU")


class LogRecorder:
    """A replacement for a module's ``log`` that keeps the arguments of each call in ``calls`` and logs nothing."""

    def __init__(self) -> None:
        self.calls: list[LogCall] = []

    def __call__(self, name: str, value: Any, *arguments: Any, **options: Any) -> None:
        """See ``LightningModule.log``."""
        # The module may write into the tensor afterwards; Lightning copies it for that reason.
        value = value.detach().clone() if type(value) is Tensor else value
        self.calls.append(LogCall(name, value, arguments, options))

    def side_effect(self) -> str | None:
        """Returns why a replay cannot repeat the calls with its own tensors, as a predicate; None if it can."""
        for call in self.calls:
            if isinstance(call.value, _RecordingIndex):
                return "uses batch_idx"
            if type(call.value) not in (Tensor, int, float):
                return f"logs {call.name!r}, which is a {type(call.value).__name__} and no tensor"
            if call.options.get("enable_graph"):
                return f"logs {call.name!r} with its graph"
            if type(call.options.get("batch_size")) not in (int, type(None)):
                return f"logs {call.name!r} with a batch_size that is no int"
        return None


class _RecordingTrainer:
    """A proxy of a trainer that records writes of all attributes, and reads of those not in `_CONSTANT`."""

    def __init__(self, trainer: pl.Trainer, recorder: SideEffectRecorder) -> None:
        self.__dict__.update(_target=trainer, _recorder=recorder)

    def __getattr__(self, name: str) -> Any:
        if name not in _CONSTANT:
            self._recorder.record(f"reads trainer.{name}")
        return getattr(self._target, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._recorder.record(f"sets trainer.{name}")
        setattr(self._target, name, value)


class _RecordingIndex(int):
    """An int whose ``is_used`` becomes True when an operator or a conversion uses it."""

    is_used = False


def _recording(name: str) -> Callable[..., Any]:
    method = getattr(int, name)

    def call(self: _RecordingIndex, *arguments: Any) -> Any:
        self.is_used = True
        return method(self, *arguments)

    return call


for _name in (
    *("__add__", "__radd__", "__sub__", "__rsub__", "__mul__", "__rmul__", "__mod__", "__rmod__", "__divmod__"),
    *("__floordiv__", "__rfloordiv__", "__truediv__", "__rtruediv__", "__pow__", "__rpow__", "__neg__", "__abs__"),
    *("__and__", "__rand__", "__or__", "__ror__", "__xor__", "__lshift__", "__rlshift__", "__rshift__", "__invert__"),
    *("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "__bool__", "__hash__"),
    *("__index__", "__int__", "__float__", "__str__", "__repr__", "__format__"),
):
    setattr(_RecordingIndex, _name, _recording(_name))


def snapshot_attributes(module: nn.Module, excluding: tuple[type, ...] = ()) -> dict[str, Any]:
    """Returns a snapshot of the instance attributes of a module and its submodules, which `first_change` compares.

    Two snapshots differ if an attribute refers to another object, or if the content of a container, of a plain object,
    of a small NumPy array, of a random generator or of a 0-dimensional CPU tensor has changed. They do not show
    changes of the content of other tensors, parameters and buffers included.

    A snapshot holds references to the objects, so that no new object can get the address of an old one.

    Args:
        module: the module.
        excluding: the classes of modules whose attributes are left out; the attributes of their submodules are not.

    Returns:
        The content of each attribute by its dotted name, such as ``encoder.layers.0.training``.
    """
    found = {}
    for prefix, part in module.named_modules():
        if isinstance(part, excluding):
            continue
        for name, value in vars(part).items():
            if name not in _NOT_THE_MODULES:
                # A replay reads the present content of parameters and buffers: their identity is enough.
                content = tuple(value.items()) if name in _REGISTERED else _snapshot(value)
                found[f"{prefix}.{name}" if prefix else name] = content
    return found


def attribute_references(modules: Iterable[nn.Module]) -> list[Any]:
    """Returns the values of all attributes of `modules`, to compare them by identity with those of an earlier call.

    The comparison is quicker than that of `first_change`, and finds only attributes that refer to another object.
    """
    found: list[Any] = []
    for module in modules:
        attributes = vars(module)
        if isinstance(module, pl.LightningModule):
            found += [value for name, value in attributes.items() if name not in _NOT_THE_MODULES]
        else:
            found += attributes.values()
        found += attributes["_parameters"].values()
        found += attributes["_buffers"].values()
        found += attributes["_modules"].values()
        found += attributes["_forward_hooks"].values()
        found += attributes["_forward_pre_hooks"].values()
        found += attributes["_backward_hooks"].values()
        found += attributes["_backward_pre_hooks"].values()
    return found


def first_change(before: dict[str, Any], after: dict[str, Any]) -> str | None:
    """Returns the name of the first attribute that differs between two snapshots; None if they are the same."""
    missing = object()
    for name in (*before, *(after.keys() - before.keys())):
        if not _is_same(before.get(name, missing), after.get(name, missing)):
            return name
    return None


def _snapshot(value: Any, depth: int = _MAX_DEPTH) -> Any:
    """Returns a snapshot of ``value``; `_is_same` compares two snapshots and finds changes in between.

    Args:
        value: the value of an attribute.
        depth: the number of levels of containers and objects that the snapshot contains; deeper values count as
            changed only if they are other objects.
    """
    if isinstance(value, (*_PLAIN, type(None), type, FunctionType, ModuleType)):
        return value
    if isinstance(value, Tensor):
        # A replay reads the present content of tensors, except that of numbers on the CPU, which Python reads.
        is_number_of_host = value.device.type == "cpu" and value.dim() == 0 and not value.is_inference()
        return (value, value._version) if is_number_of_host else value
    if isinstance(value, np.ndarray):
        return (value, value.tobytes() if value.nbytes <= _MAX_BYTES else None)
    if (state := _generator_state(value)) is not None:
        return (value, state)
    if isinstance(value, Iterator):
        # Reading an iterator changes it: an iterator never equals an earlier one.
        return object()
    if depth == 0 or isinstance(value, nn.Module):
        return value
    if isinstance(value, dict):
        parts = [part for item in list(value.items())[:_MAX_ITEMS] for part in item]
    elif isinstance(value, _CONTAINERS):
        parts = list(value)[:_MAX_ITEMS]
    else:
        return (value, *_snapshot_object(value, depth))
    return (len(value), *(_snapshot(part, depth - 1) for part in parts))


def _snapshot_object(value: object, depth: int) -> Iterator[Any]:
    for name, content in getattr(value, "__dict__", {}).items():
        yield name
        yield _snapshot(content, depth - 1)


def _generator_state(value: object) -> str | None:
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


def _random_states() -> tuple[Any, ...]:
    """Returns the states of the global generators of Python, torch and NumPy on the CPU."""
    state: Any = np.random.get_state()
    name, keys, position, *_ = state
    return random.getstate(), torch.get_rng_state(), name, keys.tobytes(), position
