"""What each kind of layer does with channels: which units it computes, which it reads, and what that costs."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.rnn import PackedSequence

from lightkit.compress.channel_record import ChannelRecord
from lightkit.compress.units import FIXED, HasInnerUnits, Multiplication
from lightkit.compress.widths import GATES, has_widths

# Modules that compute each value from the value at its place, or pool: their functions say the rest.
_PASSING = (
    *(nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Mish, nn.ELU, nn.SELU, nn.CELU, nn.LeakyReLU, nn.Tanh, nn.Sigmoid),
    *(nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.Softplus, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Identity),
)


def has_rule(module: nn.Module) -> bool:
    """Returns True if `apply_layer_rule` knows what a module does with channels."""
    return has_widths(module) or isinstance(module, (HasInnerUnits, *_PASSING))


def apply_layer_rule(record: ChannelRecord, module: nn.Module, x: Tensor, others: list[Tensor], output: Any) -> None:
    """Records what a call of a layer does with channels.

    Args:
        record: the record.
        module: the layer.
        x: its first input.
        others: its other inputs.
        output: what it returned.
    """
    name = record.names[module]
    if isinstance(module, HasInnerUnits):
        record.fix_tensors([x, *others], f"{name or 'the module'} reads it")
        _add_inner_units(record, name, module, x)
    elif isinstance(module, nn.Linear):
        _add_linear(record, name, module, x, output)
    elif isinstance(module, _ConvNd):
        _add_convolution(record, name, module, x, output)
    elif isinstance(module, nn.RNNBase):
        record.fix_tensors(others, f"it is the state of {name}")
        _add_recurrent(record, name, module, x, output)
    elif isinstance(module, (_BatchNorm, nn.LayerNorm, nn.RMSNorm, nn.PReLU)):
        _add_scale(record, name, module, x, output)
    elif isinstance(output, Tensor):
        record.pass_on(x, output)


def _add_linear(record: ChannelRecord, name: str, module: nn.Linear, x: Tensor, output: Tensor) -> None:
    read = record.labels_at(x, x.dim() - 1, name)
    places = output.numel() // output.shape[-1] / record.batch
    _add_layer(record, name, module, read, module.out_features, output, output.dim() - 1, places)


def _add_convolution(record: ChannelRecord, name: str, module: _ConvNd, x: Tensor, output: Tensor) -> None:
    spatial = len(module.kernel_size)
    axis = x.dim() - 1 - spatial
    read = record.labels_at(x, axis, name)
    places = prod(output.shape[output.dim() - spatial :]) * (output.shape[0] if axis else 1) / record.batch
    factor = places * prod(module.kernel_size)
    if module.groups == 1:
        _add_layer(record, name, module, read, module.out_channels, output, axis, factor)
    elif module.groups == module.in_channels == module.out_channels and not module.transposed:
        # A depthwise convolution scales and blurs the channels that another layer computes.
        record.add_axis(name, module, "weight", 0, read, False)
        record.add_axis(name, module, "bias", 0, read, False)
        record.multiplications.append(Multiplication(factor, read, torch.tensor([FIXED])))
        record.set_channels(output, axis, read)
    else:
        record.units.fix(read.tolist(), f"{name} convolves in groups")
        outputs = torch.full((module.out_channels,), FIXED)
        record.multiplications.append(Multiplication(factor / module.groups, outputs, read))


def _add_layer(
    record: ChannelRecord,
    name: str,
    module: nn.Module,
    read: Tensor,
    size: int,
    output: Tensor,
    axis: int,
    factor: float,
) -> None:
    """Adds a layer that multiplies all inputs by a weight of axes (outputs, inputs, ...)."""
    computed = record.computed.get(name)
    if computed is None:
        computed = record.computed[name] = record.units.allocate(size)
        for tensor in ("weight", "bias"):
            record.add_axis(name, module, tensor, 0, computed, False)
        record.add_axis(name, module, "weight", 1, read, True)
    else:
        # A layer that is called twice reads the same units each time.
        before = next(a.labels for a in record.axes if a.name == f"{name}.weight" and a.axis == 1)
        record.units.join(before, read)
    record.multiplications.append(Multiplication(factor, computed, read))
    record.set_channels(output, axis, computed)


def _add_recurrent(record: ChannelRecord, name: str, module: nn.RNNBase, x: Tensor, output: Any) -> None:
    read = record.labels_at(x, x.dim() - 1, name)
    if name in record.computed:
        record.units.fix(record.computed[name].tolist(), f"{name} is called twice")
        record.units.fix(read.tolist(), f"{name} is called twice")
        return
    units = record.computed[name] = record.units.allocate(module.hidden_size)
    directions = 2 if module.bidirectional else 1
    gates = GATES[module.mode]
    rows = units.repeat(gates)
    steps = x.numel() // x.shape[-1] / record.batch
    for layer in range(module.num_layers):
        source = read if layer == 0 else units.repeat(directions)
        for suffix in ("", "_reverse")[:directions]:
            for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
                record.add_axis(name, module, f"{kind}_l{layer}{suffix}", 0, rows, False)
            record.add_axis(name, module, f"weight_ih_l{layer}{suffix}", 1, source, True)
            record.add_axis(name, module, f"weight_hh_l{layer}{suffix}", 1, units, True)
            record.multiplications += [Multiplication(steps, rows, source), Multiplication(steps, rows, units)]
    sequence, state = output
    sequence = sequence.data if isinstance(sequence, PackedSequence) else sequence
    record.set_channels(sequence, sequence.dim() - 1, units.repeat(directions))
    for part in state if isinstance(state, tuple) else (state,):
        record.set_channels(part, part.dim() - 1, units)


def _add_scale(record: ChannelRecord, name: str, module: nn.Module, x: Tensor, output: Tensor) -> None:
    channels = record.channels_of(x)
    if channels is None:
        return
    tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    sizes = {own: tensor for own, tensor in tensors if tensor.dim() > 0}
    is_last = isinstance(module, (nn.LayerNorm, nn.RMSNorm))
    axis = x.dim() - 1 if is_last else 1
    is_shared = isinstance(module, nn.PReLU) and module.num_parameters == 1
    if is_shared:
        record.set_channels(output, channels.axis, channels.labels)
    elif channels.axis != axis or not sizes or any(t.shape != channels.labels.shape for t in sizes.values()):
        record.fix_tensors([x], f"{name} normalizes it")
    else:
        for own in sizes:
            record.add_axis(name, module, own, 0, channels.labels, False)
        record.set_channels(output, axis, channels.labels)


def _add_inner_units(record: ChannelRecord, name: str, module: HasInnerUnits, x: Tensor) -> None:
    count, places = module.inner_units()
    assert isinstance(module, nn.Module)
    if name in record.computed:
        return
    units = record.computed[name] = record.units.allocate(count)
    steps = x.numel() // x.shape[-1] / record.batch
    tensors = dict(module.named_parameters())
    for tensor, (axis, inner) in places.items():
        labels = units[inner]
        record.add_axis(name, module, tensor, axis, labels, axis == 1)
        other = torch.full((tensors[tensor].shape[1 - axis],), FIXED)
        pair = (labels, other) if axis == 0 else (other, labels)
        record.multiplications.append(Multiplication(steps, *pair))
