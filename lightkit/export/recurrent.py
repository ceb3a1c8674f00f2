"""Recurrent layers in an export: LSTM, GRU and Elman layers as one operation each, for sequences of any length.

torch.export unrolls a recurrent layer into as many steps as its example has. `keep_recurrent` records each layer as one
operator instead, which stands for torch's operator of the same arguments. `restore_torch` puts torch's operator into
the recorded graph, and `onnx_translations` has the functions that write ONNX's operators LSTM, GRU and RNN [1]_.

References:
    .. [1] https://onnx.ai/onnx/operators/
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph
from torch.overrides import TorchFunctionMode

_NAMES = ("lstm", "gru", "rnn_tanh", "rnn_relu")

_NAMESPACE = "lightkit_export"

# The number of arguments of torch's functions for padded sequences; those for packed ones have another one.
_NUM_ARGUMENTS = 9

# For each operator of ONNX, the index of its gates among torch's: input, output, forget and cell gate of an LSTM;
# update, reset and new gate of a GRU.
_GATES = {"lstm": (0, 3, 1, 2), "gru": (1, 0, 2)}


def _shapes(input: Tensor, hx: Any, params: Any, *settings: Any) -> tuple[Tensor, ...]:
    """Returns tensors of the shapes of an operator's outputs: the hidden states of all steps, and the last states."""
    *_, bidirectional, _ = settings
    states = list(hx) if isinstance(hx, (list, tuple)) else [hx]
    size = states[0].shape[-1] * (2 if bidirectional else 1)
    return (input.new_empty(*input.shape[:-1], size), *(torch.empty_like(state) for state in states))


def _define_operators() -> torch.library.Library:
    library = torch.library.Library(_NAMESPACE, "DEF")
    tail = "Tensor[] params, bool has_biases, int num_layers, float dropout, bool train, bool bidirectional"
    for name in _NAMES:
        state, outputs = ("Tensor[]", "Tensor, Tensor, Tensor") if name == "lstm" else ("Tensor", "Tensor, Tensor")
        library.define(f"{name}(Tensor input, {state} hx, {tail}, bool batch_first) -> ({outputs})")
        library.impl(name, _shapes, "Meta")
        library.impl(name, getattr(torch.ops.aten, name).input, "CPU")
    return library


# The operators exist as long as this object.
_library = _define_operators()

_OPERATORS = {name: getattr(getattr(torch.ops, _NAMESPACE), name).default for name in _NAMES}

_OPERATOR_OF_FUNCTION = {getattr(torch, name): operator for name, operator in _OPERATORS.items()}


class _KeepRecurrent(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operator = _OPERATOR_OF_FUNCTION.get(func)
        if operator is not None and len(args) == _NUM_ARGUMENTS and isinstance(args[-1], bool):
            return operator(*args)
        return func(*args, **(kwargs or {}))


def keep_recurrent() -> TorchFunctionMode:
    """Returns a context within which recurrent layers of padded sequences are one operator each."""
    return _KeepRecurrent()


def restore_torch(graph: Graph) -> None:
    """Replaces in a recorded graph the operators of `keep_recurrent` with torch's operators of the same arguments."""
    names = {operator: name for name, operator in _OPERATORS.items()}
    for node in graph.nodes:
        if node.op == "call_function" and node.target in names:
            node.target = getattr(torch.ops.aten, names[node.target]).input


def onnx_translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Returns the functions that write an operator of `keep_recurrent` as ONNX, for ``torch.onnx.export``."""
    return {operator: _translation(name) for name, operator in _OPERATORS.items()}


def _translation(name: str) -> Callable[..., Any]:
    import onnxscript

    # Its functions take Python's values in the place of constant tensors, which their types do not say.
    op: Any = onnxscript.opset18
    gates = _GATES.get(name, (0,))

    def in_order(weight: Any, hidden_size: int) -> Any:
        """Returns rows of torch's gates in ONNX's order."""
        if len(gates) == 1:
            return weight
        parts = [op.Slice(weight, [gate * hidden_size], [(gate + 1) * hidden_size], [0]) for gate in gates]
        return op.Concat(*parts, axis=0)

    def layer(x: Any, params: Sequence[Any], states: Sequence[Any], has_biases: bool, hidden_size: int) -> Any:
        """Writes one layer, with the parameters of one direction or of two."""
        per_direction = 4 if has_biases else 2
        directions = [params[begin : begin + per_direction] for begin in range(0, len(params), per_direction)]
        weights: list[list[Any]] = [[], [], []]
        for input_weight, hidden_weight, *biases in directions:
            arranged = [in_order(input_weight, hidden_size), in_order(hidden_weight, hidden_size)]
            if biases:
                arranged.append(op.Concat(*(in_order(bias, hidden_size) for bias in biases), axis=0))
            for all_directions, weight in zip(weights, arranged, strict=False):
                all_directions.append(op.Unsqueeze(weight, [0]))
        tensors = [_join(op, parts) if parts else None for parts in weights]
        direction = "bidirectional" if len(directions) == 2 else "forward"
        if name == "lstm":
            return op.LSTM(x, *tensors, None, *states, hidden_size=hidden_size, direction=direction)
        if name == "gru":
            # As in torch, the reset gate acts after the product with the hidden weights.
            return op.GRU(
                x, *tensors, None, *states, hidden_size=hidden_size, direction=direction, linear_before_reset=1
            )
        activations = [{"rnn_tanh": "Tanh", "rnn_relu": "Relu"}[name]] * len(directions)
        return op.RNN(x, *tensors, None, *states, hidden_size=hidden_size, direction=direction, activations=activations)

    def translate(
        input: Any,
        hx: Any,
        params: Sequence[Any],
        has_biases: bool,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
        batch_first: bool,
    ) -> Any:
        first = list(hx) if isinstance(hx, (list, tuple)) else [hx]
        ends: list[list[Any]] = [[] for _ in first]
        hidden_size = int(first[0].shape[-1])
        directions, per_layer = (2 if bidirectional else 1), len(params) // num_layers
        # (T, N, F), as ONNX has sequences.
        x = op.Transpose(input, perm=[1, 0, 2]) if batch_first else input
        for index in range(num_layers):
            own = params[index * per_layer : (index + 1) * per_layer]
            states = [op.Slice(state, [index * directions], [(index + 1) * directions], [0]) for state in first]
            hidden, *after = layer(x, own, states, has_biases, hidden_size)
            for all_layers, state in zip(ends, after, strict=True):
                all_layers.append(state)
            # (T, directions, N, D) becomes (T, N, directions * D).
            x = op.Reshape(op.Transpose(hidden, perm=[0, 2, 1, 3]), [0, 0, -1])
        output = op.Transpose(x, perm=[1, 0, 2]) if batch_first else x
        return (output, *(_join(op, parts) for parts in ends))

    return translate


def _join(op: Any, parts: Sequence[Any]) -> Any:
    return parts[0] if len(parts) == 1 else op.Concat(*parts, axis=0)
