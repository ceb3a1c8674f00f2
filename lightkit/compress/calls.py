"""Records how a training step calls the model."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lightkit.compress.units import HasInnerUnits
from lightkit.compress.widths import has_widths
from lightkit.models.language_model import LanguageModel


@dataclass(frozen=True)
class ModelCall:
    """A call of a module.

    Args:
        module: the module.
        arguments: the positional arguments, with detached tensors.
        options: the keyword arguments.
    """

    module: nn.Module
    arguments: tuple[Any, ...]
    options: dict[str, Any]


class CallRecorder:
    """Records the outermost calls of the modules of a LightningModule, from `start` to `stop`.

    At first it watches the LightningModule and its own attributes, so that the layers within them run as they do
    without hooks. If a step calls none of these, the next recording watches all modules. A call of ``hidden`` of a
    `lightkit.models.LanguageModel`, by which losses without logits read it, counts as a call of the model.

    Args:
        pl_module: the LightningModule.
    """

    def __init__(self, pl_module: pl.LightningModule) -> None:
        self._pl_module = pl_module
        self._watches_all = False
        # For each call that has not returned, True if it is a call of the model and not the training step.
        self._inside: list[bool] = []
        self._calls: list[ModelCall] = []
        self._hooks = ExitStack()

    def start(self) -> None:
        """Begins to record."""
        self._inside, self._calls = [], []
        for module in self._watched():
            self._hooks.callback(module.register_forward_pre_hook(self._enter, with_kwargs=True).remove)
            self._hooks.callback(module.register_forward_hook(self._leave, always_call=True).remove)
            if isinstance(module, LanguageModel):
                vars(module)["hidden"] = functools.partial(self._read_hidden, module, module.hidden)
                self._hooks.callback(vars(module).pop, "hidden")

    def stop(self) -> list[ModelCall] | None:
        """Ends the recording.

        Returns:
            The calls, the first one of each module; None if another recording should follow, which finds more.
        """
        self._hooks.close()
        calls = {id(call.module): call for call in reversed(self._calls)}
        found = list(reversed(calls.values()))
        self._calls = []
        if not found and not self._watches_all:
            self._watches_all = True
            return None
        return found

    def _watched(self) -> list[nn.Module]:
        if self._watches_all:
            return [module for module in self._pl_module.modules() if _has_layers(module)]
        modules: list[nn.Module] = [self._pl_module]
        for child in self._pl_module.children():
            modules += child.children() if isinstance(child, (nn.ModuleList, nn.ModuleDict)) else [child]
        return [module for module in modules if _has_layers(module)]

    def _read_hidden(self, model: LanguageModel, hidden: Callable[..., Any], tokens: Tensor, state: Any = None) -> Any:
        # With a state the model continues another call.
        if state is None:
            self._enter(model, (tokens,), {})
        try:
            return hidden(tokens, state)
        finally:
            if state is None:
                self._leave(model, None, None)

    def _enter(self, module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        # With a wrapper such as DistributedDataParallel, Lightning calls training_step through the module's forward.
        is_step = module is self._pl_module and "forward" in vars(module)
        if not is_step and not any(self._inside):
            detached = tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, (arguments, options))
            self._calls.append(ModelCall(module, *detached))
        self._inside.append(not is_step)

    def _leave(self, module: nn.Module, arguments: Any, output: Any) -> None:
        self._inside.pop()


def _has_layers(module: nn.Module) -> bool:
    return any(has_widths(layer) or isinstance(layer, HasInnerUnits) for layer in module.modules())
