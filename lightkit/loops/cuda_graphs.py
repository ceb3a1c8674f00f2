"""CUDA graphs of the forward and backward pass: one launch of a graph replaces the launches of all kernels."""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torchmetrics import Metric

from lightkit.loops.side_effects import (
    LogCall,
    LogRecorder,
    SideEffectRecorder,
    attribute_references,
    first_change,
    has_recorded_history,
    snapshot_attributes,
)

# Most trainings have one shape of batch. Sequences have one per length, and each graph takes memory.
_MAX_GRAPHS = 8

# The graphs are given up after this many changes of the module with fewer replays than these between two of them.
_MAX_CHANGES = 3
_MIN_REPLAYS = 10

# Maps a batch and its index to the loss that backward starts from, and to the outputs of training_step by name.
Forward = Callable[[Any, int], tuple[Tensor | None, dict[str, Any]]]


class CapturedPasses:
    """The forward and backward pass of a module for batches of one shape, captured in a CUDA graph.

    Args:
        module: the module; its parameters and buffers must keep their memory.
        batch: a batch of the shape.
        forward: the forward pass.
        pool: the memory pool that the graphs of one module share.

    Attributes:
        log_calls: the calls of ``self.log``, whose tensors a replay overwrites.

    Raises:
        RuntimeError: the passes do something that a graph cannot contain.
    """

    def __init__(self, module: pl.LightningModule, batch: Any, forward: Forward, pool: Any) -> None:
        leaves, spec = pytree.tree_flatten(batch)
        self._inputs = [torch.empty_like(t).copy_(t) for t in leaves]
        parameters = [p for p in module.parameters() if p.requires_grad]
        for parameter in parameters:
            parameter.grad = None
        recorder, log = LogRecorder(), module.log
        vars(module)["log"] = recorder
        self._graph = torch.cuda.CUDAGraph()
        try:
            with _capturing(self._graph, pool):
                loss, outputs = forward(pytree.tree_unflatten(self._inputs, spec), 0)
                if loss is None:
                    raise RuntimeError("training_step returned None")
                loss.backward()
        finally:
            vars(module)["log"] = log
        self.log_calls: list[LogCall] = recorder.calls
        # The history of the outputs would keep every activation.
        self._outputs = pytree.tree_map_only(Tensor, Tensor.detach, outputs)
        self._gradients = [(p, p.grad) for p in parameters]

    def __call__(self, batch: Any) -> dict[str, Any]:
        """Replays both passes on a batch and assigns the gradients to the parameters.

        Returns:
            The outputs of training_step by name, the loss under ``loss``.
        """
        if self._inputs:
            torch._foreach_copy_(self._inputs, pytree.tree_leaves(batch))
        self._graph.replay()
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        # The next replay overwrites the graph's own memory.
        return pytree.tree_map_only(Tensor, torch.clone, self._outputs)


@contextmanager
def _capturing(graph: torch.cuda.CUDAGraph, pool: Any) -> Iterator[None]:
    """Captures the kernels of the context in ``graph``.

    After a failure it restores the stream, the random generator and the memory pool, and raises the first error.
    """
    stream = torch.cuda.current_stream()
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    state = generator.clone_state()
    cause: BaseException | None = None
    try:
        # Other threads may go on using the GPU.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            try:
                yield
            except BaseException as error:
                cause = error
                raise
    except BaseException as error:
        # torch (2.11) leaves stream, generator and pool in the middle of a capture that cannot be ended.
        torch.cuda.set_stream(stream)
        generator.graphsafe_set_state(state)
        with suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
        raise cause or error from None


class PassGraphs:
    """The CUDA graphs of a module's forward and backward pass, one for each shape of batch.

    For the first batch of a shape, Python runs the passes under a `SideEffectRecorder`. For the second batch the passes
    are captured, and the graph replays them for the second and all later batches. A change of the module drops the
    graphs, and new ones are captured. A side effect that a replay would leave out disables the graphs for good.

    Args:
        module: the module in a fit on one GPU.
        unsupported_reason: a reason to disable the graphs from the start; None enables them.

    Attributes:
        unsupported_reason: the reason why the graphs are disabled; None while they are enabled.
    """

    def __init__(self, module: pl.LightningModule, unsupported_reason: str | None = None) -> None:
        self.unsupported_reason: str | None = None
        self._module: pl.LightningModule = module
        self._parameters: list[nn.Parameter] = []
        self._graphs: dict[Hashable, CapturedPasses | None] = {}
        self._pool: Any = None
        # The state of the module at the last check: a full snapshot, and lists that are quick to compare.
        self._attributes: dict[str, Any] = {}
        self._submodules: list[nn.Module] = []
        self._references: list[Any] = []
        self._addresses: list[Any] = []
        self._changes = self._replays = 0
        if unsupported_reason is not None:
            self.disable(unsupported_reason)

    def release(self) -> None:
        """Frees the graphs' memory and the references to the module."""
        self._graphs.clear()
        del self._module
        self._pool = None
        self._parameters, self._submodules, self._references, self._attributes = [], [], [], {}

    def disable(self, reason: str) -> None:
        """Drops the graphs of all shapes for good, and logs ``reason``."""
        self.unsupported_reason = reason
        self._graphs.clear()
        self._references, self._attributes = [], {}
        rank_zero_info(f"LeanLoop takes no CUDA graphs: {reason}")

    def start(self) -> None:
        """Drops the graphs if the module has changed. Call it at the start of an epoch and after a validation."""
        if self.unsupported_reason is not None:
            return
        self._list_module()
        if self._first_change() is not None:
            self._graphs.clear()

    def get(self, batch: Any, forward: Forward) -> CapturedPasses | None:
        """Returns the graph for the shape of ``batch``; None if Python must run the passes.

        The graph is captured if this is the second batch of its shape.

        Args:
            batch: the batch.
            forward: the function that runs the forward pass in a capture.
        """
        self._check_for_changes()
        key = self._key(batch)
        if key is None or key not in self._graphs:
            return None
        if self._graphs[key] is None:
            self._capture(key, batch, forward)
        self._replays += 1
        return self._graphs.get(key)

    @contextmanager
    def recording(self, batch: Any, batch_idx: int) -> Iterator[SideEffectRecorder | None]:
        """Yields a `SideEffectRecorder` for the first batch of a shape, and None for any other batch.

        The caller runs the passes on the batch within this context, and enters the recorder around each pass. If the
        passes had a side effect or changed the batch, the end of the context disables the graphs of all shapes for
        good; otherwise `get` captures the passes on the next batch of this shape.

        Args:
            batch: the batch.
            batch_idx: the index of the batch in the epoch.
        """
        key = self._key(batch)
        if key is None or key in self._graphs or len(self._graphs) >= _MAX_GRAPHS:
            yield None
            return
        recorder = SideEffectRecorder(self._module, batch_idx)
        before = _versions(batch)
        yield recorder
        if _versions(batch) != before:
            recorder.record("changes the batch")
        if recorder.first is not None:
            self.disable(recorder.first)
        else:
            self._graphs[key] = None

    def _list_module(self) -> None:
        # Each validation replaces its metrics; a metric in training_step rules graphs out anyway.
        self._submodules = [module for module in self._module.modules() if not isinstance(module, Metric)]
        self._parameters = list(self._module.parameters())

    def _check_for_changes(self) -> None:
        """Drops the graphs if a callback or a hook has changed the module within the epoch."""
        addresses, references = self._memory_addresses(), attribute_references(self._submodules)
        if addresses == self._addresses and len(references) == len(self._references):
            if all(map(operator.is_, references, self._references)):
                return
        # The change may have replaced a submodule.
        self._list_module()
        changed = self._first_change()
        if changed is None:
            return
        self._graphs.clear()
        self._changes = self._changes + 1 if self._replays < _MIN_REPLAYS else 1
        self._replays = 0
        if self._changes > _MAX_CHANGES:
            self.disable(
                f"something changes {type(self._module).__name__}.{changed} between the steps, again and again"
            )

    def _first_change(self) -> str | None:
        """Returns the first attribute of the module that has changed since the previous call, or None."""
        addresses, attributes = self._memory_addresses(), snapshot_attributes(self._module, excluding=(Metric,))
        changed = first_change(self._attributes, attributes)
        if changed is None and addresses != self._addresses:
            changed = "parameters or buffers, which lie elsewhere,"
        self._attributes, self._addresses = attributes, addresses
        self._references = attribute_references(self._submodules)
        return changed

    def _memory_addresses(self) -> list[Any]:
        addresses: list[Any] = [(p.data_ptr(), p.requires_grad) for p in self._parameters]
        return addresses + [b.data_ptr() for b in self._module.buffers()]

    def _key(self, batch: Any) -> Hashable | None:
        """Returns the key of a batch's graph: structure, shapes, strides, dtypes; None if no graph can take the batch.

        A batch that no graph can take disables the graphs.
        """
        if self.unsupported_reason is not None:
            return None
        leaves, spec = pytree.tree_flatten(batch)
        device = self._module.device
        for leaf in leaves:
            if type(leaf) is not Tensor:
                self.disable(f"the batch has a {type(leaf).__name__} in it")
                return None
            if leaf.device != device or leaf.requires_grad or leaf.layout != torch.strided or leaf.is_nested:
                self.disable(
                    f"the batch has a tensor in it that is on the {leaf.device}, sparse, nested or with history"
                )
                return None
        return (str(spec), *((t.shape, t.stride(), t.dtype) for t in leaves))

    def _capture(self, key: Hashable, batch: Any, forward: Forward) -> None:
        if any(has_recorded_history(p) for p in self._parameters if p.requires_grad):
            self.disable(
                "a program still holds the history of an earlier step: what it keeps of a step's results, such as the "
                "outputs of training_step, must be detached"
            )
            return
        try:
            if not any(self._graphs.values()):
                # torch frees a pool with the last of its graphs.
                self._pool = torch.cuda.graph_pool_handle()
            self._graphs[key] = CapturedPasses(self._module, batch, forward, self._pool)
        except Exception as error:
            for parameter in self._parameters:
                parameter.grad = None
            self.disable(f"the passes cannot be captured: {(str(error) or type(error).__name__).splitlines()[0]}")


def _versions(batch: Any) -> tuple[pytree.TreeSpec, list[tuple[int, int]]]:
    """Returns a value that changes if a tensor of the batch is written to or is replaced by another tensor."""
    leaves, spec = pytree.tree_flatten(batch)
    return spec, [
        (id(leaf), leaf._version if isinstance(leaf, Tensor) and not leaf.is_inference() else 0) for leaf in leaves
    ]
