"""A table of the layers of a model: parameters, output sizes and multiply-adds."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from lightkit._util.printable import printable
from lightkit.flops import FlopCounter


@dataclass(frozen=True)
class LayerSummary:
    """One row of a `ModelSummary`.

    Args:
        name: the dotted name of the layer; empty for the model itself.
        kind: the name of the layer's class.
        parameters: the number of values in its parameters; a parameter that several layers share counts in each.
        trainable: the number of these values that are trained.
        output_size: the size of the output for one sample; None if it is unknown or no tensor.
        multiply_adds: the number of multiplications with an addition in forward for one sample; None if unknown.
    """

    name: str
    kind: str
    parameters: int
    trainable: int
    output_size: tuple[int, ...] | None
    multiply_adds: int | None


@dataclass(frozen=True)
class ModelSummary:
    """The layers of a model; ``str(summary)`` is a table.

    Args:
        layers: the model itself, then its layers in the order of their registration.
        size: the bytes of the parameters and buffers.
    """

    layers: tuple[LayerSummary, ...]
    size: int

    def __str__(self) -> str:
        rows = [("layer", "type", "output", "parameters", "multiply-adds")]
        for layer in self.layers:
            output = "-" if layer.output_size is None else " x ".join(map(str, layer.output_size)) or "scalar"
            count = "-" if layer.multiply_adds is None else f"{layer.multiply_adds:,}"
            name = printable(layer.name) or "(model)"
            rows.append((name, printable(layer.kind), output, f"{layer.parameters:,}", count))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        aligned = [
            "  ".join(
                f"{text:<{w}}" if i < 3 else f"{text:>{w}}" for i, (text, w) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]
        whole = self.layers[0]
        end = f"{whole.parameters:,} parameters, of which {whole.trainable:,} are trained; {self.size / 2**20:.2f} MiB"
        return "\n".join([*aligned, end])


def summarize(model: nn.Module, *inputs: Tensor, max_depth: int = 2) -> ModelSummary:
    """Returns the layers of a model, with their sizes for one sample if ``inputs`` are given.

    The function runs forward once in evaluation mode on the meta device, which computes sizes and no values. It changes
    neither the model nor the state of a random generator. A model that cannot run there, or that torch.compile has
    compiled, gets no output sizes and no multiply-adds.

    Args:
        model: the model.
        *inputs: the tensors that forward takes, with one sample or more in dimension 0.
        max_depth: the number of levels of layers below the model.

    Raises:
        ValueError: ``max_depth`` is negative.
    """
    if max_depth < 0:
        raise ValueError(f"max_depth must be at least 0, got {max_depth}")
    modules = {name: module for name, module in model.named_modules() if not name or name.count(".") < max_depth}
    sizes, counts = _measure(model, modules, inputs) if inputs else ({}, {})
    layers = []
    for name, module in modules.items():
        parameters = list(module.parameters())
        trainable = sum(_numel(p) for p in parameters if p.requires_grad)
        total = sum(map(_numel, parameters))
        kind = type(module).__name__
        layers.append(LayerSummary(name, kind, total, trainable, sizes.get(name), counts.get(name)))
    size = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()) if _numel(t))
    return ModelSummary(tuple(layers), size)


def _numel(tensor: Tensor) -> int:
    # A lazy layer has no size before its first call.
    return 0 if isinstance(tensor, (UninitializedParameter, UninitializedBuffer)) else tensor.numel()


def _measure(
    model: nn.Module, modules: dict[str, nn.Module], inputs: tuple[Tensor, ...]
) -> tuple[dict[str, tuple[int, ...]], dict[str, int]]:
    """Returns the output size and the number of multiply-adds of each module by name; both empty on failure."""
    sizes: dict[str, tuple[int, ...]] = {}
    counts: dict[str, int] = {}
    counter = FlopCounter()

    def before(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: Any) -> None:
            counts[name] = counts.get(name, 0) - (counter.total or 0)

        return hook

    def after(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: Any, output: Any) -> None:
            counts[name] += counter.total or 0
            first = output[0] if isinstance(output, (tuple, list)) and output else output
            if isinstance(first, Tensor):
                sizes[name] = tuple(first.shape[1:])

        return hook

    if getattr(model, "_compiled_call_impl", None) is not None:
        return {}, {}
    state = {name: tensor.detach().to("meta") for name, tensor in _tensors(model)}
    # A task may convert its input before it calls the model, as one of a series in float64 does.
    dtype = next((t.dtype for t in state.values() if t.is_floating_point()), None)
    samples = tuple(t[:1].detach().to("meta", dtype if t.is_floating_point() else None) for t in inputs)
    modes = [(module, module.training) for module in model.modules()]
    try:
        with ExitStack() as stack:
            for name, module in modules.items():
                stack.callback(module.register_forward_pre_hook(before(name)).remove)
                stack.callback(module.register_forward_hook(after(name)).remove)
            # A batch norm in training mode needs several samples.
            model.eval()
            stack.enter_context(torch.no_grad())
            stack.enter_context(counter)
            functional_call(model, state, samples)
    except Exception:
        # The forward of any model may fail without values; a table must not stop a training.
        return {}, {}
    finally:
        for module, training in modes:
            module.training = training
    return sizes, {name: count // 2 for name, count in counts.items()} if counter.total is not None else {}


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]
