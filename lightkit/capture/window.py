"""The operations that wait to run, and their computation."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightkit.capture.calls import Call
from lightkit.capture.deferred import Deferred
from lightkit.capture.node import Node
from lightkit.capture.recorder import Context, current_settings
from lightkit.capture.saved_tensors import are_saved_tensors_packed, unpacked_saved_tensors

if TYPE_CHECKING:
    from lightkit.capture.capture import Capture


class Window:
    """Consecutive operations that have been recorded and not run.

    Args:
        capture: finds the way in which the operations run.
        context: the settings of torch under which all operations were called.
    """

    def __init__(self, capture: Capture, context: Context) -> None:
        self._capture = capture
        self.context = context
        self.nodes: list[Node] = []
        # The object that stands for each operation's value; None if an operation in place has taken it over.
        self._handles: list[Deferred | None] = []
        # The memory of running statistics that an operation will update.
        self._written: set[int] = set()
        self._last_call: Call | None = None

    def reads_written(self, arguments: Iterable[Any]) -> bool:
        """Returns True if one of the arguments of a call has memory that a waiting operation will write to."""
        return bool(self._written) and any(
            isinstance(argument, Tensor) and type(argument) is not Deferred and _memory(argument) in self._written
            for argument in arguments
        )

    def repeat(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Node | None:
        """Returns the operation of a call if it is the call that came next the last time; otherwise None."""
        call = self._capture.calls.after(self._last_call, self.context, function, args)
        node = None if call is None else call.repeat(function, args, kwargs, self)
        if node is not None:
            self._last_call = call
        return node

    def remember(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], node: Node
    ) -> None:
        """Expects a call from now on, of which `node` is the operation. Call it before `add` or `add_in_place`."""
        call = self._capture.calls.remember(self._last_call, self.context, function, args, kwargs, node)
        self._last_call = call or self._last_call

    def add(self, node: Node) -> Deferred:
        """Adds an operation, and returns a tensor that stands for its value."""
        node.index, node.window = len(self.nodes), self
        # Objects that nobody saw are used again: torch takes microseconds to make one.
        unused = self._capture.unused.get((node.shape, node.dtype))
        handle = unused.pop() if unused else Deferred(node)
        handle.node = node
        self.nodes.append(node)
        self._handles.append(handle)
        if node.kind == "batch_norm":
            self._written.update(_memory(tensor) for tensor in node.tensors[:2] if tensor is not None)
        return handle

    def add_in_place(self, node: Node, handle: Deferred) -> Deferred | None:
        """Adds an operation that writes its result to its first operand, for which ``handle`` stands.

        Returns:
            ``handle``, which stands for the result from now on; None if a view shares the memory of the operand.
        """
        before = handle.node
        if before.kind == "flatten" or any(n.kind == "flatten" and n.operands[0] is before for n in self.nodes):
            return None
        node.index, node.window = len(self.nodes), self
        self.nodes.append(node)
        self._handles[before.index] = None
        self._handles.append(handle)
        handle.node = node
        return handle

    def compute(self) -> None:
        """Computes the values that a program can still see, and turns the objects that stand for them into tensors.

        Each operation runs at most once. If one fails, the values of the others stay unknown.
        """
        nodes, handles = self.nodes, self._handles
        if not nodes:
            return
        self.nodes, self._handles, self._written = [], [], set()
        for node in nodes:
            node.window = None
        # Nobody can see the value of an object that only the list refers to.
        seen = [i for i in range(len(nodes)) if handles[i] is not None and sys.getrefcount(handles[i]) > _UNSEEN]
        for i in seen:
            nodes[i].handle = handles[i]
        # In most programs the settings are those of the calls.
        settings = nullcontext() if current_settings() == self.context else _entered(self.context)
        # Nothing packed saved tensors when the operations were called.
        hooks = unpacked_saved_tensors() if are_saved_tensors_packed() else nullcontext()
        with settings, hooks:
            self._capture.run(nodes, seen)
        for i in set(range(len(nodes))).difference(seen):
            handle = handles[i]
            if handle is not None:
                self._capture.keep_unused(nodes[i], handle)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else 0


def _unseen_count() -> int:
    """Returns the reference count that `sys.getrefcount` gives for an element of a list that nothing else refers to."""
    handles = [object()]
    return next(sys.getrefcount(handles[i]) for i in range(1))


_UNSEEN = _unseen_count()


@contextmanager
def _entered(context: Context) -> Iterator[None]:
    """Enters the settings of a context, unless they hold already."""
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled() != context.inference:
            stack.enter_context(torch.inference_mode(context.inference))
        if torch.is_grad_enabled() != context.grad:
            stack.enter_context(torch.set_grad_enabled(context.grad))
        autocast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
        if autocast != context.autocast:
            stack.enter_context(torch.autocast("cpu", context.autocast, enabled=context.autocast is not None))
        yield
