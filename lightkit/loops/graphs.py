"""The passes of a training step from a CUDA graph: one launch, where Python would launch every kernel."""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.utils import _pytree as pytree
from torchmetrics import Metric

from lightkit.loops.watch import LogCall, Recorder, Watch, attributes, first_change, is_marked, references

# A training has one shape of batch as a rule, and sequences as many as there are lengths: each takes memory.
_MOST_GRAPHS = 8

# A module that is another one so often, with fewer replays than these between, is so all the time.
_MOST_CHANGES = 3
_WORTH_A_CAPTURE = 10

# Of a batch and its index: the loss that backward starts from, and what training_step returned, as Lightning keeps it.
Forward = Callable[[Any, int], tuple[Tensor | None, dict[str, Any]]]


class CapturedPasses:
    """Forward and backward pass of a module for batches of one shape, in a CUDA graph.

    Args:
        module: its parameters and buffers stay where they are.
        batch: the first.
        forward: the forward pass.
        pool: of the graphs' memory.

    Raises:
        RuntimeError: the passes do something that a graph cannot hold.
    """

    def __init__(self, module: pl.LightningModule, batch: Any, forward: Forward, pool: Any) -> None:
        leaves, spec = pytree.tree_flatten(batch)
        self._inputs = [torch.empty_like(t).copy_(t) for t in leaves]
        parameters = [p for p in module.parameters() if p.requires_grad]
        for parameter in parameters:
            parameter.grad = None
        recorder, log = Recorder(), module.log
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
        # Without their history, which would keep all that the passes have computed.
        self._outputs = pytree.tree_map_only(Tensor, Tensor.detach, outputs)
        self._gradients = [(p, p.grad) for p in parameters]

    def __call__(self, batch: Any) -> dict[str, Any]:
        """Both passes on a batch; the gradients are those of the parameters then.

        Returns:
            What training_step returned, the loss under ``loss``.
        """
        if self._inputs:
            torch._foreach_copy_(self._inputs, pytree.tree_leaves(batch))
        self._graph.replay()
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        # The graph's own memory is written anew in the next step.
        return pytree.tree_map_only(Tensor, torch.clone, self._outputs)


@contextmanager
def _capturing(graph: torch.cuda.CUDAGraph, pool: Any) -> Iterator[None]:
    """Captures what is enqueued within; where that fails all is as before, and the first error is raised."""
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
        # torch (2.11) leaves all three in the middle of the capture where that cannot be ended.
        torch.cuda.set_stream(stream)
        generator.graphsafe_set_state(state)
        with suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
        raise cause or error from None


class PassGraphs:
    """Has a module's passes taken by graphs, where that gives the same.

    The first batch of a shape is watched (`Watch`), the second is captured, those that follow are replays.

    Args:
        module: in a fit on one GPU.
        obstacle: why there are to be none, if there is a reason already.

    Attributes:
        obstacle: why there are none, or None.
    """

    def __init__(self, module: pl.LightningModule, obstacle: str | None = None) -> None:
        self.obstacle: str | None = None
        self._module: pl.LightningModule | None = module
        self._parameters: list[Tensor] = []
        self._graphs: dict[Hashable, CapturedPasses | None] = {}
        self._pool: Any = None
        # What the module was like when it was looked at last: in full, and what is quick to compare.
        self._attributes: dict[str, Any] = {}
        self._parts: list[torch.nn.Module] = []
        self._references: list[Any] = []
        self._memory: list[Any] = []
        self._changes = self._replays = 0
        if obstacle is not None:
            self.give_up(obstacle)

    def release(self) -> None:
        """Gives the graphs' memory back, and lets go of the module."""
        self._graphs.clear()
        self._module = self._pool = None
        self._parameters, self._parts, self._references, self._attributes = [], [], [], {}

    def give_up(self, obstacle: str) -> None:
        """Takes no graphs any more."""
        self.obstacle = obstacle
        self._graphs.clear()
        self._references, self._attributes = [], {}
        rank_zero_info(f"LeanLoop takes no CUDA graphs: {obstacle}")

    def start(self) -> None:
        """Looks at the whole module, as is due at the start of an epoch and after a validation."""
        if self.obstacle is not None:
            return
        # A metric of the validation is another one after each; one in training_step is no case for a graph.
        self._parts = [part for part in self._module.modules() if not isinstance(part, Metric)]
        self._parameters = list(self._module.parameters())
        if self._has_changed() is not None:
            self._graphs.clear()

    def get(self, batch: Any, forward: Forward) -> CapturedPasses | None:
        """The graph for a batch, or None where Python is to take the passes."""
        self._look()
        key = self._key(batch)
        if key is None or key not in self._graphs:
            return None
        if self._graphs[key] is None:
            self._capture(key, batch, forward)
        self._replays += 1
        return self._graphs.get(key)

    @contextmanager
    def watching(self, batch: Any, batch_idx: int) -> Iterator[Watch | None]:
        """Gives what the passes on a batch are to be watched by, or None."""
        key = self._key(batch)
        if key is None or key in self._graphs or len(self._graphs) >= _MOST_GRAPHS:
            yield None
            return
        watch = Watch(self._module, batch_idx)
        before = _versions(batch)
        yield watch
        if _versions(batch) != before:
            watch.note("changes the batch")
        if watch.cause is not None:
            self.give_up(watch.cause)
        else:
            self._graphs[key] = None

    def _look(self) -> None:
        """Looks for what callbacks and hooks of the module have changed in the middle of an epoch."""
        memory, found = self._lay_of_memory(), references(self._parts)
        if memory == self._memory and len(found) == len(self._references):
            if all(map(operator.is_, found, self._references)):
                return
        # A part may be another one, too.
        self._parts = [part for part in self._module.modules() if not isinstance(part, Metric)]
        self._parameters = list(self._module.parameters())
        changed = self._has_changed()
        if changed is None:
            return
        self._graphs.clear()
        self._changes = self._changes + 1 if self._replays < _WORTH_A_CAPTURE else 1
        self._replays = 0
        if self._changes > _MOST_CHANGES:
            self.give_up(
                f"something changes {type(self._module).__name__}.{changed} between the steps, again and again"
            )

    def _has_changed(self) -> str | None:
        """What of the module is not as it was when this was asked last, or None."""
        memory, now = self._lay_of_memory(), attributes(self._module, but_of=(Metric,))
        changed = first_change(self._attributes, now)
        if changed is None and memory != self._memory:
            changed = "parameters or buffers, which lie elsewhere,"
        self._attributes, self._memory, self._references = now, memory, references(self._parts)
        return changed

    def _lay_of_memory(self) -> list[Any]:
        lay: list[Any] = [(p.data_ptr(), p.requires_grad) for p in self._parameters]
        return lay + [b.data_ptr() for b in self._module.buffers()]

    def _key(self, batch: Any) -> Hashable | None:
        """What batches have in common that one graph serves; None where no graph does."""
        if self.obstacle is not None:
            return None
        leaves, spec = pytree.tree_flatten(batch)
        device = self._module.device
        for leaf in leaves:
            if type(leaf) is not Tensor:
                self.give_up(f"the batch has a {type(leaf).__name__} in it")
                return None
            if leaf.device != device or leaf.requires_grad or leaf.layout != torch.strided or leaf.is_nested:
                self.give_up(
                    f"the batch has a tensor in it that is on the {leaf.device}, sparse, nested or with history"
                )
                return None
        return (str(spec), *((t.shape, t.stride(), t.dtype) for t in leaves))

    def _capture(self, key: Hashable, batch: Any, forward: Forward) -> None:
        if any(is_marked(p) for p in self._parameters if p.requires_grad):
            self.give_up(
                "the history of an earlier step is still held by somebody: what is kept of a step's results, such as "
                "the outputs of training_step, must be detached"
            )
            return
        try:
            if not any(self._graphs.values()):
                # The pool of graphs that are gone is gone with them.
                self._pool = torch.cuda.graph_pool_handle()
            self._graphs[key] = CapturedPasses(self._module, batch, forward, self._pool)
        except Exception as error:
            for parameter in self._parameters:
                parameter.grad = None
            self.give_up(f"the passes cannot be captured: {(str(error) or type(error).__name__).splitlines()[0]}")


def _versions(batch: Any) -> tuple:
    """What changes where a batch is written to, or gets other parts."""
    leaves, spec = pytree.tree_flatten(batch)
    return spec, [
        (id(leaf), leaf._version if isinstance(leaf, Tensor) and not leaf.is_inference() else 0) for leaf in leaves
    ]
