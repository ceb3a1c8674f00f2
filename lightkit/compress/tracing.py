"""Finds the units of a model: runs the model once and follows the channels from the layer that computes them.

The model may be written in any way. Its layers are seen as modules, and what happens between them as calls of torch's
functions. A function that the tracer does not know fixes the channels of its arguments.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from lightkit.compress.units import FIXED, HasInnerUnits, Multiplication, UnionFind, UnitAxis, UnitGraph, UnitGroup
from lightkit.compress.widths import GATES, has_widths

# Functions and methods that compute each value from the value at its place, by name.
_ELEMENTWISE = {
    *(
        "fake_quantize_per_tensor_affine",
        "relu",
        "relu_",
        "relu6",
        "gelu",
        "silu",
        "mish",
        "elu",
        "selu",
        "celu",
        "leaky_relu",
        "tanh",
        "sigmoid",
    ),
    *("hardtanh", "hardswish", "hardsigmoid", "softplus", "softsign", "logsigmoid", "tanhshrink", "hardshrink"),
    *("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_dropout", "exp", "log", "sqrt"),
    *("abs", "neg", "square", "clamp", "clamp_min", "contiguous", "clone", "detach", "to", "float", "double", "half"),
    *("bfloat16", "type", "requires_grad_"),
}

# Functions of one or two tensors that compute each value from the values at its place.
_BINARY = {
    *("add", "add_", "sub", "sub_", "mul", "mul_", "div", "div_", "true_divide", "maximum", "minimum", "pow"),
    *("__add__", "__radd__", "__iadd__", "__sub__", "__rsub__", "__isub__", "__mul__", "__rmul__", "__imul__"),
    *("__truediv__", "__rtruediv__", "rsub", "multiply", "subtract", "divide", "__pow__"),
}

# Functions that keep the channels at axis 1 and pool the axes after it.
_POOLS = {f"{kind}_pool{n}d" for kind in ("max", "avg", "adaptive_max", "adaptive_avg", "lp") for n in (1, 2, 3)}
_POOLS |= {f"max_pool{n}d_with_indices" for n in (1, 2, 3)} | {"interpolate", "pad", "upsample"}

_RESHAPES = {"flatten", "view", "reshape", "ravel", "unflatten", "view_as", "reshape_as"}
_REDUCTIONS = {"mean", "sum", "amax", "amin", "std", "var"}

# Modules that compute each value from the value at its place, or pool: their functions say the rest.
_PASSING = (
    *(nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Mish, nn.ELU, nn.SELU, nn.CELU, nn.LeakyReLU, nn.Tanh, nn.Sigmoid),
    *(nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.Softplus, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Identity),
)


# The indices of a tensor that take no values apart.
_INDICES = (int, slice, type(Ellipsis))


class _Channels:
    """The axis of a tensor along which its channels lie, and the unit of each index along the axis, int64."""

    def __init__(self, axis: int, labels: Tensor) -> None:
        self.axis = axis
        self.labels = labels


def trace(root: nn.Module, arguments: Sequence[Any], options: dict[str, Any] | None = None) -> UnitGraph:
    """Runs ``root`` in evaluation mode, and returns its units.

    Args:
        root: the module, whose state the function leaves as it is.
        arguments: positional arguments of its ``forward``; the first axis of the first tensor is that of the samples.
        options: keyword arguments of its ``forward``.

    Raises:
        Exception: ``forward`` failed.
    """
    tracer = _Tracer(root, next((len(x) for x in tree_leaves(list(arguments)) if _is_batch(x)), 1))
    with tracer.watching(), torch.no_grad():
        output = root.forward(*arguments, **(options or {}))
    tracer.fix_tensors([output], "it is the output of the model")
    return tracer.graph()


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
    """Follows channels through a call of a module.

    Args:
        root: the module.
        batch: the number of samples of the call.
    """

    def __init__(self, root: nn.Module, batch: int) -> None:
        super().__init__()
        self._root = root
        self._batch = max(1, batch)
        self._units = UnionFind()
        # The tensor is kept, so that no other one gets its id.
        self._channels: dict[int, tuple[Tensor, _Channels]] = {}
        self._axes: list[UnitAxis] = []
        self._multiplications: list[Multiplication] = []
        self._computed: dict[str, Tensor] = {}
        self._depth = 0
        self._names = {module: name for name, module in root.named_modules()}
        self._uses: dict[int, list[str]] = defaultdict(list)
        for name, parameter in root.named_parameters(remove_duplicate=False):
            self._uses[id(parameter)].append(name)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watches the calls of layers and of functions within the context."""
        with ExitStack() as stack:
            stack.enter_context(evaluating(self._root))
            modules: list[nn.Module] = list(self._names)
            for module in modules:
                if has_widths(module) or isinstance(module, (HasInnerUnits, *_PASSING)):
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
        # The depth keeps the functions that the rules call out of sight.
        self._depth += 1
        try:
            self._apply_rule(module, tensors[0], tensors[1:], output)
        finally:
            self._depth -= 1

    def _apply_rule(self, module: nn.Module, x: Tensor, others: list[Tensor], output: Any) -> None:
        name = self._names[module]
        if isinstance(module, HasInnerUnits):
            self.fix_tensors([x, *others], f"{name or 'the module'} reads it")
            self._add_inner_units(name, module, x)
        elif isinstance(module, nn.Linear):
            self._add_linear(name, module, x, output)
        elif isinstance(module, _ConvNd):
            self._add_convolution(name, module, x, output)
        elif isinstance(module, nn.RNNBase):
            self.fix_tensors(others, f"it is the state of {name}")
            self._add_recurrent(name, module, x, output)
        elif isinstance(module, (_BatchNorm, nn.LayerNorm, nn.RMSNorm, nn.PReLU)):
            self._add_scale(name, module, x, output)
        elif isinstance(output, Tensor):
            self._pass(x, output)

    # The layers.

    def _add_linear(self, name: str, module: nn.Linear, x: Tensor, output: Tensor) -> None:
        read = self._labels_at(x, x.dim() - 1, name)
        places = output.numel() // output.shape[-1] / self._batch
        self._add_layer(name, module, read, module.out_features, output, output.dim() - 1, places)

    def _add_convolution(self, name: str, module: _ConvNd, x: Tensor, output: Tensor) -> None:
        spatial = len(module.kernel_size)
        axis = x.dim() - 1 - spatial
        read = self._labels_at(x, axis, name)
        places = prod(output.shape[output.dim() - spatial :]) * (output.shape[0] if axis else 1) / self._batch
        factor = places * prod(module.kernel_size)
        if module.groups == 1:
            self._add_layer(name, module, read, module.out_channels, output, axis, factor)
        elif module.groups == module.in_channels == module.out_channels and not module.transposed:
            # A depthwise convolution scales and blurs the channels that another layer computes.
            self._add_axis(name, module, "weight", 0, read, False)
            self._add_axis(name, module, "bias", 0, read, False)
            self._multiplications.append(Multiplication(factor, read, torch.tensor([FIXED])))
            self._set(output, axis, read)
        else:
            self._units.fix(read.tolist(), f"{name} convolves in groups")
            outputs = torch.full((module.out_channels,), FIXED)
            self._multiplications.append(Multiplication(factor / module.groups, outputs, read))

    def _add_layer(
        self, name: str, module: nn.Module, read: Tensor, size: int, output: Tensor, axis: int, factor: float
    ) -> None:
        """Adds a layer that multiplies all inputs by a weight of axes (outputs, inputs, ...)."""
        computed = self._computed.get(name)
        if computed is None:
            computed = self._computed[name] = self._units.allocate(size)
            for tensor in ("weight", "bias"):
                self._add_axis(name, module, tensor, 0, computed, False)
            self._add_axis(name, module, "weight", 1, read, True)
        else:
            # A layer that is called twice reads the same units each time.
            before = next(a.labels for a in self._axes if a.name == f"{name}.weight" and a.axis == 1)
            self._units.join(before, read)
        self._multiplications.append(Multiplication(factor, computed, read))
        self._set(output, axis, computed)

    def _add_recurrent(self, name: str, module: nn.RNNBase, x: Tensor, output: Any) -> None:
        read = self._labels_at(x, x.dim() - 1, name)
        if name in self._computed:
            self._units.fix(self._computed[name].tolist(), f"{name} is called twice")
            self._units.fix(read.tolist(), f"{name} is called twice")
            return
        units = self._computed[name] = self._units.allocate(module.hidden_size)
        directions = 2 if module.bidirectional else 1
        gates = GATES[module.mode]
        rows = units.repeat(gates)
        steps = x.numel() // x.shape[-1] / self._batch
        for layer in range(module.num_layers):
            source = read if layer == 0 else units.repeat(directions)
            for suffix in ("", "_reverse")[:directions]:
                for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
                    self._add_axis(name, module, f"{kind}_l{layer}{suffix}", 0, rows, False)
                self._add_axis(name, module, f"weight_ih_l{layer}{suffix}", 1, source, True)
                self._add_axis(name, module, f"weight_hh_l{layer}{suffix}", 1, units, True)
                self._multiplications += [Multiplication(steps, rows, source), Multiplication(steps, rows, units)]
        sequence, state = output
        sequence = sequence.data if isinstance(sequence, PackedSequence) else sequence
        self._set(sequence, sequence.dim() - 1, units.repeat(directions))
        for part in state if isinstance(state, tuple) else (state,):
            self._set(part, part.dim() - 1, units)

    def _add_scale(self, name: str, module: nn.Module, x: Tensor, output: Tensor) -> None:
        channels = self._of(x)
        if channels is None:
            return
        tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        sizes = {own: tensor for own, tensor in tensors if tensor.dim() > 0}
        is_last = isinstance(module, (nn.LayerNorm, nn.RMSNorm))
        axis = x.dim() - 1 if is_last else 1
        is_shared = isinstance(module, nn.PReLU) and module.num_parameters == 1
        if is_shared:
            self._set(output, channels.axis, channels.labels)
        elif channels.axis != axis or not sizes or any(t.shape != channels.labels.shape for t in sizes.values()):
            self.fix_tensors([x], f"{name} normalizes it")
        else:
            for own in sizes:
                self._add_axis(name, module, own, 0, channels.labels, False)
            self._set(output, axis, channels.labels)

    def _add_inner_units(self, name: str, module: HasInnerUnits, x: Tensor) -> None:
        count, places = module.inner_units()
        assert isinstance(module, nn.Module)
        if name in self._computed:
            return
        units = self._computed[name] = self._units.allocate(count)
        steps = x.numel() // x.shape[-1] / self._batch
        tensors = dict(module.named_parameters())
        for tensor, (axis, inner) in places.items():
            labels = units[inner]
            self._add_axis(name, module, tensor, axis, labels, axis == 1)
            other = torch.full((tensors[tensor].shape[1 - axis],), FIXED)
            pair = (labels, other) if axis == 0 else (other, labels)
            self._multiplications.append(Multiplication(steps, *pair))

    def _add_axis(self, name: str, module: nn.Module, own: str, axis: int, labels: Tensor, reads: bool) -> None:
        full = f"{name}.{own}" if name else own
        tensor = dict([*module.named_parameters(), *module.named_buffers()]).get(own)
        if tensor is None:
            return
        if len(self._uses[id(tensor)]) > 1:
            self._units.fix(labels.tolist(), f"{full} is shared with another layer")
        self._axes.append(UnitAxis(full, axis, labels, reads))

    # The channels of tensors.

    def _of(self, tensor: Any) -> _Channels | None:
        entry = self._channels.get(id(tensor))
        return None if entry is None else entry[1]

    def _set(self, tensor: Any, axis: int, labels: Tensor) -> None:
        if isinstance(tensor, Tensor):
            self._channels[id(tensor)] = (tensor, _Channels(axis, labels))

    def _labels_at(self, x: Tensor, axis: int, name: str) -> Tensor:
        """Returns the unit of each index along ``axis``, by which the layer ``name`` reads ``x``."""
        channels = self._of(x)
        if channels is None:
            return torch.full((x.shape[axis],), FIXED)
        if channels.axis != axis:
            self.fix_tensors([x], f"{name} reads it along another axis")
            return torch.full((x.shape[axis],), FIXED)
        return channels.labels

    def _pass(self, x: Tensor, output: Tensor) -> None:
        channels = self._of(x)
        if channels is None:
            return
        axis = channels.axis
        if output.dim() == x.dim() and output.shape[axis] == len(channels.labels):
            self._set(output, axis, channels.labels)
        else:
            self.fix_tensors([x], "a function changes its channels")

    def fix_tensors(self, values: Any, reason: str) -> None:
        """Fixes the channels of all tensors in ``values``."""
        for value in tree_leaves(values):
            if (channels := self._of(value)) is not None:
                self._units.fix(channels.labels.tolist(), reason)

    # The functions between the layers.

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if self._depth == 0:
            self._depth += 1
            try:
                self._see(func, args, kwargs, output)
            finally:
                self._depth -= 1
        return output

    def _see(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        inputs = [x for x in tree_leaves([args, kwargs]) if isinstance(x, Tensor)]
        for x in inputs:
            # A parameter that a function reads by itself, outside of its layer.
            if isinstance(x, nn.Parameter) and id(x) in self._uses and isinstance(output, Tensor):
                self._fix_parameter(x)
        labelled = [x for x in inputs if self._of(x) is not None]
        if not labelled or not any(isinstance(x, Tensor) for x in tree_leaves(output)):
            return
        name = getattr(func, "__name__", "")
        x = labelled[0]
        handled = False
        if name in _ELEMENTWISE or name in _POOLS:
            handled = self._see_same_axis(x, name, output)
        elif name in _BINARY and isinstance(output, Tensor):
            handled = self._see_binary(inputs, output)
        elif name in _RESHAPES and isinstance(output, Tensor):
            handled = self._see_reshape(x, output)
        elif name in _REDUCTIONS and isinstance(output, Tensor):
            handled = self._see_reduction(x, args, kwargs, output)
        elif name in ("permute", "transpose", "swapaxes", "movedim", "t", "mT", "T"):
            handled = self._see_transposition(x, output)
        elif name in ("cat", "concat", "concatenate"):
            handled = self._see_concatenation(args, kwargs, output)
        elif name in ("squeeze", "unsqueeze"):
            handled = self._see_reshape(x, output)
        elif name == "__getitem__":
            handled = self._see_index(x, args[1], output)
        if not handled:
            self.fix_tensors(labelled, f"{name or 'a function'} reads it")

    def _see_same_axis(self, x: Tensor, name: str, output: Any) -> bool:
        channels = self._of(x)
        assert channels is not None
        outputs = [part for part in tree_leaves(output) if isinstance(part, Tensor)]
        if name in _POOLS and channels.axis != 1:
            return False
        if any(part.dim() != x.dim() or part.shape[channels.axis] != len(channels.labels) for part in outputs):
            return False
        for part in outputs:
            self._set(part, channels.axis, channels.labels)
        return True

    def _see_binary(self, inputs: list[Tensor], output: Tensor) -> bool:
        found: tuple[int, Tensor] | None = None
        for x in inputs:
            channels = self._of(x)
            # Axes count from the end, as broadcasting does.
            if channels is not None:
                place = (channels.axis - x.dim(), channels.labels)
                if found is None:
                    found = place
                elif found[0] != place[0]:
                    return False
                else:
                    self._units.join(found[1], place[1])
        assert found is not None
        axis, labels = found
        if output.shape[axis] != len(labels):
            return False
        for x in inputs:
            if self._of(x) is None and x.dim() >= -axis and x.shape[axis] != 1:
                # Values that belong to single channels, and that no layer computes.
                return False
        self._set(output, output.dim() + axis, labels)
        return True

    def _see_reshape(self, x: Tensor, output: Tensor) -> bool:
        """Follows channels whose axis stays as it is, or is merged with the axes after it."""
        channels = self._of(x)
        assert channels is not None
        before = prod(x.shape[: channels.axis])
        count = len(channels.labels)
        for axis in range(output.dim()):
            size = output.shape[axis]
            if prod(output.shape[:axis]) == before and size % count == 0 and size > 1 - (count == 1):
                inner = size // count
                if prod(x.shape[channels.axis + 1 :]) % inner == 0 and _is_leading(x.shape[channels.axis + 1 :], inner):
                    self._set(output, axis, channels.labels.repeat_interleave(inner))
                    return True
        return False

    def _see_reduction(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> bool:
        channels = self._of(x)
        assert channels is not None
        dims = kwargs.get("dim", args[1] if len(args) > 1 else None)
        if dims is None or not (isinstance(dims, int) or all(isinstance(d, int) for d in dims)):
            return False
        reduced = {d % x.dim() for d in ([dims] if isinstance(dims, int) else dims)}
        if channels.axis in reduced:
            return False
        keeps = output.dim() == x.dim()
        self._set(output, channels.axis - (0 if keeps else sum(d < channels.axis for d in reduced)), channels.labels)
        return True

    def _see_transposition(self, x: Tensor, output: Any) -> bool:
        channels = self._of(x)
        if not isinstance(output, Tensor) or output.dim() != x.dim() or channels is None:
            return False
        # The strides of a view tell where the axis is, unless another axis has the same stride and size.
        wanted = (x.stride(channels.axis), x.shape[channels.axis])
        places = [axis for axis in range(output.dim()) if (output.stride(axis), output.shape[axis]) == wanted]
        if len(places) != 1:
            return False
        self._set(output, places[0], channels.labels)
        return True

    def _see_concatenation(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> bool:
        parts = kwargs.get("tensors", args[0] if args else ())
        dim = kwargs.get("dim", args[1] if len(args) > 1 else 0) % output.dim()
        channels = [self._of(part) for part in parts]
        axes = {c.axis for c in channels if c is not None}
        if axes != {dim}:
            return False
        labels = [
            torch.full((part.shape[dim],), FIXED) if c is None else c.labels
            for part, c in zip(parts, channels, strict=True)
        ]
        self._set(output, dim, torch.cat(labels))
        return True

    def _see_index(self, x: Tensor, index: Any, output: Any) -> bool:
        channels = self._of(x)
        assert channels is not None
        indices = index if isinstance(index, tuple) else (index,)
        if not isinstance(output, Tensor) or not all(i is None or isinstance(i, _INDICES) for i in indices):
            return False
        indexed = sum(i is not None and i is not Ellipsis for i in indices)
        whole = [slice(None)] * (x.dim() - indexed)
        at = indices.index(Ellipsis) if Ellipsis in indices else len(indices)
        taken, given = 0, 0
        for i in (*indices[:at], *whole, *indices[at + 1 :]):
            if i is not None and taken == channels.axis:
                if i != slice(None):
                    return False
                self._set(output, given, channels.labels)
                return True
            taken += i is not None
            given += not isinstance(i, int)
        return False

    def _fix_parameter(self, parameter: Tensor) -> None:
        names = set(self._uses[id(parameter)])
        for axis in self._axes:
            if axis.name in names:
                self._units.fix(axis.labels.tolist(), f"{axis.name} is read by a function")
        # A layer may use the parameter later.
        self._uses[id(parameter)].append("a function")

    def graph(self) -> UnitGraph:
        """Returns the units that can be removed, after the call."""
        groups: dict[frozenset[str], set[int]] = defaultdict(set)
        owners: dict[int, set[str]] = defaultdict(set)
        kept: dict[str, str] = {}
        for name, units in self._computed.items():
            for unit in units.tolist():
                owners[self._units.root(unit)].add(name)
        for unit, names in owners.items():
            reason = self._units.fixed_reason(unit)
            if reason is None:
                groups[frozenset(names)].add(unit)
            else:
                kept |= dict.fromkeys(names, reason)
        found = tuple(
            UnitGroup(" + ".join(sorted(names)), tuple(sorted(units)), len(units)) for names, units in groups.items()
        )
        free = {unit for group in found for unit in group.units}
        lookup = {label: self._units.root(label) for name in self._computed for label in self._computed[name].tolist()}
        lookup = {label: root if root in free else FIXED for label, root in lookup.items()} | {FIXED: FIXED}

        def resolve(labels: Tensor) -> Tensor:
            return torch.tensor([lookup[label] for label in labels.tolist()], dtype=torch.int64)

        axes = [UnitAxis(a.name, a.axis, resolve(a.labels), a.reads) for a in self._axes]
        layers = [Multiplication(m.factor, resolve(m.out_labels), resolve(m.in_labels)) for m in self._multiplications]
        changing = tuple(axis for axis in axes if bool((axis.labels != FIXED).any()))
        return UnitGraph(changing, found, tuple(layers), kept, 1 + max(free, default=-1))


def _is_leading(sizes: Sequence[int], inner: int) -> bool:
    """Returns True if ``inner`` is the product of the first of ``sizes``."""
    product = 1
    for size in sizes:
        if product == inner:
            return True
        product *= size
    return product == inner
