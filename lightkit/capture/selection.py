"""The modules of a network whose calls are captured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import torch
from torch import nn

from lightkit.capture.capture import Capture
from lightkit.capture.module_call import CapturedCall, SkippedCall
from lightkit.capture.unseen_functions import patch_unseen_functions
from lightkit.nn import FusedSequential

_LAYERS = (nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)


def capture_calls(
    root: nn.Module, capture: Capture, skip: Callable[[str], bool] = lambda name: False
) -> Callable[[], None]:
    """Captures the calls of the modules in a network that may have operations for lightkit's kernels.

    Torch runs a module that is compiled or scripted, and those around it.

    Args:
        root: the network.
        capture: runs the calls.
        skip: returns True for the names of modules, "" for the root, that torch runs with all modules in them.

    Returns:
        A function that restores torch's calls.
    """
    undo = ExitStack()
    undo.callback(patch_unseen_functions())
    skipped = {name for name, _ in root.named_modules() if skip(name)}
    for name, module in root.named_modules():
        if vars(module).get("_compiled_call_impl") is not None:
            continue
        if any(is_within(name, other) for other in skipped):
            if name in skipped:
                undo.callback(SkippedCall(module).undo)
        elif (
            _is_custom(module)
            and any(map(_has_operations, _modules(module)))
            and not any(map(is_opaque, module.modules()))
        ):
            undo.callback(CapturedCall(module, capture).undo)
    return undo.close


def is_within(name: str, other: str) -> bool:
    """Returns True if ``name`` is the name of the module ``other``, or of one in it."""
    # "" is the name of the root, which contains all others.
    return other == "" or name == other or name.startswith(f"{other}.")


def is_opaque(module: nn.Module) -> bool:
    """Returns True for a module whose operations do not pass through torch's functions: compiled or scripted."""
    compiled = vars(module).get("_compiled_call_impl")
    is_compiled = compiled is not None and not isinstance(compiled, (CapturedCall, SkippedCall))
    return is_compiled or hasattr(module, "_orig_mod") or isinstance(module, torch.jit.ScriptModule)


def _is_custom(module: nn.Module) -> bool:
    # A layer of torch alone has nothing to join. The wrapper of a compiled module has the module as a child.
    return next(module.children(), None) is not None or not type(module).__module__.startswith("torch.nn.")


def _modules(module: nn.Module) -> Iterator[nn.Module]:
    """Yields a module and those in it, without those that run on lightkit's kernels by themselves."""
    if not isinstance(module, FusedSequential):
        yield module
        for child in module.children():
            yield from _modules(child)


def _has_operations(module: nn.Module) -> bool:
    # The weight of a convolution has four dimensions, in a module of any class.
    if isinstance(module, nn.GELU):
        return module.approximate == "tanh"
    return isinstance(module, _LAYERS) or any(p is not None and p.dim() == 4 for p in module._parameters.values())


def module_names(root: nn.Module) -> Iterator[tuple[int, str]]:
    """Yields the ``id`` of each parameter and buffer with the name of its module."""
    for tensors in (root.named_parameters(remove_duplicate=False), root.named_buffers(remove_duplicate=False)):
        for name, tensor in tensors:
            yield id(tensor), name.rpartition(".")[0]
