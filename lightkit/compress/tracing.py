"""Finds the units of a model: runs the model once and follows the channels from the layer that computes them.

The model may be written in any way. Its layers are seen as modules, and what happens between them as calls of torch's
functions. A function that the tracer does not know fixes the channels of its arguments.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from lightkit.compress.channel_record import ChannelRecord
from lightkit.compress.function_rules import apply_function_rule
from lightkit.compress.layer_rules import apply_layer_rule, has_rule
from lightkit.compress.units import UnitGraph


def trace(root: nn.Module, arguments: Sequence[Any], options: dict[str, Any] | None = None) -> UnitGraph:
    """Runs ``root`` in evaluation mode, and returns its units.

    Args:
        root: the module, whose state the function leaves as it is.
        arguments: positional arguments of its ``forward``.
        options: keyword arguments of its ``forward``; the first axis of the first tensor of all arguments is that of
            the samples.

    Raises:
        Exception: ``forward`` failed.
    """
    record = ChannelRecord(root, next((len(x) for x in tree_leaves([*arguments, options]) if _is_batch(x)), 1))
    with _Tracer(root, record).watching(), torch.no_grad():
        output = root.forward(*arguments, **(options or {}))
    record.fix_tensors([output], "it is the output of the model")
    return record.graph()


def _is_batch(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0


@contextmanager
def evaluating(root: nn.Module) -> Iterator[None]:
    """Puts a module into evaluation mode within the context, without compiled or captured calls of its submodules."""
    modes = [(module, module.training) for module in root.modules()]
    compiled = [(module, vars(module).get("_compiled_call_impl")) for module, _ in modes]
    try:
        for module, _ in modes:
            module.training = False
            if vars(module).get("_compiled_call_impl") is not None:
                vars(module)["_compiled_call_impl"] = None
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for module, implementation in compiled:
            if implementation is not None:
                vars(module)["_compiled_call_impl"] = implementation


class _Tracer(TorchFunctionMode):
    """Shows the calls of layers and functions within a call of a module to a record of channels.

    Args:
        root: the module.
        record: the record.
    """

    def __init__(self, root: nn.Module, record: ChannelRecord) -> None:
        super().__init__()
        self._root = root
        self._record = record
        # Above 0 within a layer and within the rules, whose functions count no further.
        self._depth = 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watches the calls of layers and of functions within the context."""
        with ExitStack() as stack:
            stack.enter_context(evaluating(self._root))
            for module in self._record.names:
                if has_rule(module):
                    stack.callback(module.register_forward_pre_hook(self._enter).remove)
                    stack.callback(module.register_forward_hook(self._leave, with_kwargs=True).remove)
            stack.enter_context(self)
            yield

    def _enter(self, module: nn.Module, arguments: Any) -> None:
        self._depth += 1

    def _leave(self, module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any], output: Any) -> None:
        self._depth -= 1
        if self._depth > 0:
            return
        tensors = [x for x in tree_leaves([*arguments, *options.values()]) if isinstance(x, Tensor)]
        if not tensors:
            return
        self._depth += 1
        try:
            apply_layer_rule(self._record, module, tensors[0], tensors[1:], output)
        finally:
            self._depth -= 1

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if self._depth == 0:
            self._depth += 1
            try:
                apply_function_rule(self._record, func, args, kwargs, output)
            finally:
                self._depth -= 1
        return output
