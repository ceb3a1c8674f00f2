"""The floating-point operations of a piece of code, and how many a second this machine's matrix products reach."""

from __future__ import annotations

import re
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import conv_flop_count, flop_registry, sdpa_flop_count, shape_wrapper

Shape = Sequence[int]

# A product that takes this many seconds is large enough: calling it costs nothing against it.
_LONG = 3e-3
_SMALLEST, _LARGEST, _TIMES = 1024, 8192, 5


class FlopCounter:
    """Counts the floating-point operations of what runs within it: ``with FlopCounter() as counter: ...``.

    Counted are matrix products, convolutions, recurrent layers and attention, of torch and of lightkit, forward and
    backward, a multiplication and an addition as two; what is done value by value is not. The count is that of the
    layers: zeros that a mask, a ReLU or padding puts in are multiplied like other values, and what a kernel computes a
    second time to save memory adds nothing. What activation checkpointing recomputes is an operation like any other,
    and counted.

    Operations run as without it, to the bit. Of those that it cannot count it says so, instead of too small a number:
    ``total`` is None then, and ``obstacle`` tells why.
    """

    # The formulas are those of torch's FlopCounterMode. That itself hooks all modules, to tell them apart, and a hooked
    # layer is none that `lightkit.nn.FusedSequential` may run together with its neighbours: other kernels would run.

    def __init__(self) -> None:
        self.obstacle: str | None = None
        self._by_dtype: Counter[torch.dtype] = Counter()
        self._active = ExitStack()

    @property
    def total(self) -> int | None:
        """The operations so far, or None if something ran whose operations are unknown."""
        return self._by_dtype.total() if self.obstacle is None else None

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of the operands of most operations, or None before the first."""
        return max(self._by_dtype, key=self._by_dtype.__getitem__, default=None)

    def __enter__(self) -> FlopCounter:
        self._look_for_compiled_code()
        # A mode would keep torch.compile from compiling.
        if self.obstacle is None:
            self._active.enter_context(_Counting(self))
        return self

    def __exit__(self, *exception: object) -> None:
        self._active.close()
        self._look_for_compiled_code()

    def _look_for_compiled_code(self) -> None:
        dynamo = sys.modules.get("torch._dynamo.eval_frame")
        # None is the back end of what is not to be compiled.
        if dynamo is not None and any(dynamo.cached_backends.values()):
            self._give_up("torch.compile is in use, whose code does not tell what it computes")

    def _give_up(self, obstacle: str) -> None:
        self.obstacle = self.obstacle or obstacle

    def _count(self, func: Any, types: Sequence[type], args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
        if not isinstance(func, torch._ops.OpOverload):
            # An operator of functions, such as torch.cond.
            self._give_up(f"the operations of {func} are unknown")
            return
        # Those in place multiply as the others do.
        formula = _FORMULAS.get(func._schema.name.removesuffix("_"))
        if any(cls not in (Tensor, Parameter) for cls in types):
            self._give_up(f"{func} ran on {', '.join(sorted(cls.__name__ for cls in types))}")
        elif formula is None:
            if _may_multiply(func):
                self._give_up(f"the operations of {func} are unknown")
        elif any(isinstance(a, Tensor) and (a.layout is not torch.strided or a.is_complex()) for a in args):
            self._give_up(f"{func} ran on sparse or complex tensors")
        else:
            try:
                self._by_dtype[args[0].dtype] += formula(*args, **kwargs, out_val=out)
            except Exception as error:
                # The operation has run: what a formula thinks of its arguments is no reason to stop a training.
                self._give_up(f"the operations of {func} are unknown: {error}")


class _Counting(TorchDispatchMode):
    """Shows a `FlopCounter` each operation that runs on a device, below autograd."""

    # For code that does something else where it is watched: see `lightkit.ops.patch`.
    only_watches = True
    supports_higher_order_operators = True

    def __init__(self, counter: FlopCounter) -> None:
        super().__init__()
        self._counter = counter

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """What is first given to torch.compile within the counter is compiled as without it."""
        return True

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self._counter._count(func, types, args, kwargs, out)
        return out


# The families of torch's operators that multiply matrices, or decompose or transform them; composite ones among
# them, which come in one piece in inference mode. The cells of _thnn_ have had their products before.
_MULTIPLIES = re.compile(
    r"(?!_thnn_).*("
    r"m[mv](?![a-z])|matmul|multi_dot|tensordot|einsum|conv(?!ert)|linear(?!\d)|"
    r"rnn(?!_flatten)|lstm|gru(_|$)|attention|multi_head|transformer|"
    r"linalg_(?!vector_norm|cross|diagonal|check_errors|_powsum)|cholesky|geqrf|or[gm]qr|(?<!re)solve|matrix_(exp|power)|"
    r"cdist|fft_.2.)"
)

# The operators of others may do anything. Those of these that multiply matrices are above or have formulas below.
_NAMESPACES = ("aten", "prim", "lightkit", "profiler", "c10d")


def _may_multiply(func: Any) -> bool:
    return func.namespace not in _NAMESPACES or (
        func.namespace == "aten" and _MULTIPLIES.match(func._schema.name.removeprefix("aten::")) is not None
    )


def matmul_rate(device: torch.device | str, dtype: torch.dtype) -> float:
    """The floating-point operations a second of a large matrix product, as `torch.mm` runs it here and now.

    The median of a few, with the threads and the precision that torch is set to. Takes about 0.1 s, on a busy machine
    longer, where it is no more than that of a part of the machine.

    Args:
        device: where to measure.
        dtype: of the matrices, floating point.
    """
    size = _SMALLEST
    while True:
        # Not random: nobody's random numbers change. Not all the same: that takes a GPU less power than real values.
        matrix = torch.linspace(-1, 1, size * size, device=device).view(size, size).to(dtype)
        result = torch.empty_like(matrix)
        # The first product of a size pays for fresh memory and the choice of a kernel.
        _, *seconds = (_time(matrix, result) for _ in range(1 + _TIMES))
        # The shortest: on a busy machine any single one may be long.
        if min(seconds) >= _LONG or size >= _LARGEST:
            return 2 * size**3 / statistics.median(seconds)
        size *= 2


def _time(matrix: Tensor, result: Tensor) -> float:
    started = time.perf_counter()
    torch.mm(matrix, matrix, out=result)
    # Waits for the device.
    result[0, 0].item()
    return time.perf_counter() - started


# The formulas take shapes in place of tensors, with `out_shape` for those of the results.


def _mv(matrix: Shape, vector: Shape, *, out_shape: Any, **_: Any) -> int:
    return 2 * prod(matrix)


def _addmv(added: Shape, matrix: Shape, vector: Shape, *, out_shape: Any, **_: Any) -> int:
    return 2 * prod(matrix)


def _addbmm(added: Shape, left: Shape, right: Shape, *, out_shape: Any, **_: Any) -> int:
    return 2 * prod(left) * right[-1]


def _convolution_backward(grad_output: Shape, input: Shape, weight: Shape, *rest: Any, out_shape: Any, **_: Any) -> int:
    _, _, _, _, transposed, _, _, wanted = rest
    # torch's own formula has the gradient of the weight take as many times what it does as there are groups.
    return sum(wanted[:2]) * conv_flop_count(input, weight, grad_output, transposed)


def _conv_relu_pool(input: Shape, weight: Shape, bias: Any, padding: Shape, pool: bool, *, out_shape: Any) -> int:
    return _layer_chain(input, [weight], [bias], (*padding, True, pool), out_shape=None)


def _layer_chain(
    input: Shape, weights: Sequence[Shape], biases: Any, settings: Sequence[int], *_: Any, out_shape: Any
) -> int:
    return sum(_each_of_chain(input, weights, settings))


def _layer_chain_backward(
    grad_output: Shape, input: Shape, weights: Sequence[Shape], *rest: Any, out_shape: Any
) -> int:
    *_, settings, wanted = rest
    each = _each_of_chain(input, weights, settings)
    of_weights = wanted[1 : 1 + len(weights)]
    # The gradient of an input is wanted where one of the layers before, or the chain's own input, wants one.
    of_inputs = [any(wanted[: 1 + layer]) or any(wanted[1 + len(weights) :][:layer]) for layer in range(len(weights))]
    return sum(flops * (w + i) for flops, w, i in zip(each, of_weights, of_inputs, strict=True))


def _each_of_chain(input: Shape, weights: Sequence[Shape], settings: Sequence[int]) -> list[int]:
    """Of each layer: of a convolution as a whole, which a pool halves, dropping an odd last row."""
    flops = []
    size = input[2:]
    for layer, weight in enumerate(weights):
        *padding, _, pool = settings[4 * layer : 4 * layer + 4]
        if len(weight) == 2:
            flops.append(2 * input[0] * prod(weight))
        else:
            size = [i + 2 * p - w + 1 for i, w, p in zip(size, weight[2:], padding, strict=True)]
            flops.append(conv_flop_count([input[0], weight[1]], weight, (input[0], weight[0], *size)))
            size = [s // 2 for s in size] if pool else size
    return flops


def _linear_cross_entropy(hidden: Shape, weight: Shape, *_: Any, out_shape: Any) -> int:
    return 2 * prod(hidden) * weight[0]


def _linear_cross_entropy_forward(hidden: Shape, weight: Shape, *rest: Any, out_shape: Any) -> int:
    *_, hidden_wanted, weight_wanted, _ = rest
    return (1 + hidden_wanted + weight_wanted) * _linear_cross_entropy(hidden, weight, out_shape=None)


def _linear_cross_entropy_backward(
    grad_loss: Shape, row_statistics: Shape, hidden: Shape, weight: Shape, *rest: Any, out_shape: Any
) -> int:
    *_, hidden_wanted, weight_wanted, _ = rest
    return (hidden_wanted + weight_wanted) * _linear_cross_entropy(hidden, weight, out_shape=None)


def _attention(query: Shape, key: Shape, value: Shape, *_: Any, out_shape: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(grad: Shape, query: Shape, key: Shape, value: Shape, *_: Any, out_shape: Any, **__: Any) -> int:
    # torch's own formula has the scores once more, which the kernels compute again.
    return 2 * sdpa_flop_count(query, key, value)


def _recurrent(input: Shape, weights: Sequence[Shape]) -> int:
    # Each step of each sequence, packed or not, goes through each matrix once.
    return 2 * prod(input[:-1]) * sum(prod(weight) for weight in weights if len(weight) == 2)


def _mkldnn_rnn(input: Shape, *rest: Any, out_shape: Any) -> int:
    return _recurrent(input, rest[:2])


def _mkldnn_rnn_backward(input: Shape, *rest: Any, out_shape: Any) -> int:
    # The kernel makes the gradients of input, state and weights, wanted or not.
    return 2 * _recurrent(input, rest[:2])


def _cudnn_rnn(input: Shape, weights: Sequence[Shape], *_: Any, out_shape: Any) -> int:
    return _recurrent(input, weights)


def _cudnn_rnn_backward(input: Shape, weights: Sequence[Shape], *rest: Any, out_shape: Any) -> int:
    *_, wanted = rest
    return (1 + wanted[3]) * _recurrent(input, weights)


# By name: lightkit's operators need not exist.
_OWN = {
    "aten::mv": _mv,
    "aten::addmv": _addmv,
    "aten::addbmm": _addbmm,
    "aten::convolution_backward": _convolution_backward,
    "aten::mkldnn_rnn_layer": _mkldnn_rnn,
    "aten::mkldnn_rnn_layer_backward": _mkldnn_rnn_backward,
    "aten::_cudnn_rnn": _cudnn_rnn,
    "aten::_cudnn_rnn_backward": _cudnn_rnn_backward,
    "aten::_scaled_dot_product_flash_attention_for_cpu": _attention,
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
    "aten::_scaled_dot_product_flash_attention_backward": _attention_backward,
    "aten::_scaled_dot_product_efficient_attention_backward": _attention_backward,
    "aten::_scaled_dot_product_cudnn_attention_backward": _attention_backward,
    "lightkit::conv_relu_pool": _conv_relu_pool,
    "lightkit::layer_chain": _layer_chain,
    "lightkit::_layer_chain_forward": _layer_chain,
    "lightkit::_layer_chain_backward": _layer_chain_backward,
    "lightkit::linear_cross_entropy": _linear_cross_entropy,
    "lightkit::_linear_cross_entropy_forward": _linear_cross_entropy_forward,
    "lightkit::_linear_cross_entropy_backward": _linear_cross_entropy_backward,
}

# torch's for sequences of different lengths in one tensor, which also count what is recomputed.
_NOT_TAKEN = ("aten::_flash_attention_backward", "aten::_efficient_attention_backward")

_FORMULAS = {
    packet._qualified_op_name: formula
    for packet, formula in flop_registry.items()
    if isinstance(packet, torch._ops.OpOverloadPacket) and packet._qualified_op_name not in _NOT_TAKEN
} | {name: shape_wrapper(formula) for name, formula in _OWN.items()}
