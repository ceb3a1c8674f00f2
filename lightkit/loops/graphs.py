"""The passes of a training step from a CUDA graph: one launch, where Python would launch every kernel."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.utils import _pytree as pytree
from torchmetrics import Metric

from lightkit.loops.watch import LogCall, Recorder, Watch, attributes, first_change, is_marked, own_attributes

# A training has one shape of batch as a rule, and sequences as many as there are lengths: each takes memory.
_MOST_GRAPHS = 8

# A module that is another one more often than this between two steps is so all the time.
_MOST_CHANGES = 3

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
            if parameter.grad is not gradient:
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
        # What the module was like when it was looked at last: at all of its parts, and at what is looked at every step.
        self._attributes: dict[str, Any] = {}
        self._own: dict[str, int] = {}
        self._buffers: list[int] = []
        self._weights: list[tuple[int, bool]] = []
        self._changes = 0
        if obstacle is not None:
            self._give_up(obstacle)

    def release(self) -> None:
        """Gives the graphs' memory back, and lets go of the module."""
        self._graphs.clear()
        self._module = self._pool = None
        self._parameters, self._attributes = [], {}

    def start(self) -> None:
        """Looks at all parts of the module, as is due at the start of an epoch and after a validation."""
        # A metric of the validation is another one after each; one in training_step is no case for a graph.
        now = attributes(self._module, but_of=(Metric,))
        buffers = [b.data_ptr() for b in self._module.buffers()]
        if buffers != self._buffers or first_change(self._attributes, now) is not None:
            self._graphs.clear()
        self._attributes, self._buffers = now, buffers
        self._parameters = list(self._module.parameters())

    def get(self, batch: Any, forward: Forward) -> CapturedPasses | None:
        """The graph for a batch, or None where Python is to take the passes."""
        if self.obstacle is None:
            self._look()
        key = self._key(batch)
        if key is None or key not in self._graphs:
            return None
        if self._graphs[key] is None:
            self._capture(key, batch, forward)
        return self._graphs.get(key)

    @contextmanager
    def watching(self, batch: Any, batch_idx: int) -> Iterator[Watch | AbstractContextManager]:
        """Gives what the passes on a batch are to be watched by: a context for each part of them."""
        key = self._key(batch)
        if key is None or key in self._graphs or len(self._graphs) >= _MOST_GRAPHS:
            yield nullcontext()
            return
        watch = Watch(self._module, batch_idx)
        yield watch
        if watch.cause is not None:
            self._give_up(watch.cause)
        else:
            self._graphs[key] = None

    def _look(self) -> None:
        """Looks at what callbacks and hooks of the module may change in the middle of an epoch."""
        weights = [(p.data_ptr(), p.requires_grad) for p in self._parameters]
        own = {name: id(value) for name, value in own_attributes(self._module)}
        if weights == self._weights and own == self._own:
            return
        self._graphs.clear()
        changed = [name for name in own if own[name] != self._own.get(name)]
        self._changes += bool(self._own and changed)
        self._weights, self._own = weights, own
        if self._changes > _MOST_CHANGES:
            self._give_up(f"something changes {type(self._module).__name__}.{changed[0]} between the steps")

    def _key(self, batch: Any) -> Hashable | None:
        """What batches have in common that one graph serves; None where no graph does."""
        if self.obstacle is not None:
            return None
        leaves, spec = pytree.tree_flatten(batch)
        device = self._module.device
        for leaf in leaves:
            if type(leaf) is not Tensor or leaf.device != device or leaf.requires_grad:
                what = f"a tensor on the {leaf.device}" if isinstance(leaf, Tensor) else f"a {type(leaf).__name__}"
                self._give_up(f"the batch has {what} in it")
                return None
        return (str(spec), *((t.shape, t.stride(), t.dtype) for t in leaves))

    def _capture(self, key: Hashable, batch: Any, forward: Forward) -> None:
        if any(is_marked(p) for p in self._parameters if p.requires_grad):
            self._give_up(
                "the history of an earlier step is still held by somebody: what is kept of a step's results, such as "
                "the outputs of training_step, must be detached"
            )
            return
        try:
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            self._graphs[key] = CapturedPasses(self._module, batch, forward, self._pool)
        except (RuntimeError, torch.OutOfMemoryError) as error:
            for parameter in self._parameters:
                parameter.grad = None
            self._give_up(f"the passes cannot be captured: {str(error).splitlines()[0]}")

    def _give_up(self, obstacle: str) -> None:
        self.obstacle = obstacle
        self._graphs.clear()
        rank_zero_info(f"LeanLoop takes no CUDA graphs: {obstacle}")
