"""A backend of torch.compile that runs the graph of a module on lightkit's kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from lightkit.capture.capture import Capture
from lightkit.capture.module_call import call_captured, can_capture

if TYPE_CHECKING:
    from torch import Tensor
    from torch.fx import GraphModule


def lightkit_backend(graph: GraphModule, example_inputs: Sequence[Tensor]) -> Callable[..., Any]:
    """Returns a function that computes a graph: ``torch.compile(model, backend="lightkit")``.

    The kernels compute consecutive operations as with `lightkit.callbacks.FuseKernels`; torch computes the others as
    without a compiler. The compiler's guards make a new graph where the module's code takes another way.

    Args:
        graph: the operations as functions of torch.
        example_inputs: the tensors of the first call.
    """
    capture = Capture()

    def run(*inputs: Any) -> Any:
        if not can_capture():
            return graph.forward(*inputs)
        return call_captured(capture, graph.forward, inputs, {})

    return run
