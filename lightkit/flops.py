"""A counter of floating-point operations, and the rate of a matrix product on this machine."""

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

from lightkit._util.deprecated import RenamedAttribute

Shape = Sequence[int]

# A product that takes this many seconds is large enough: the cost of its call is negligible.
_MIN_SECONDS = 3e-3
_MIN_SIZE, _MAX_SIZE, _REPEATS = 1024, 8192, 5

# Where torch multiplies a dtype by its slow fallback, as bfloat16 on a processor with AVX2 alone, a product of the size
# above takes seconds: from this size on, a product that takes this long is large enough.
_FALLBACK_SIZE, _FALLBACK_SECONDS = 256, 0.03


class FlopCounter:
    """Counts the floating-point operations within a context: ``with FlopCounter() as counter: ...``.

    The counter counts matrix products, convolutions, recurrent layers and attention of torch and of lightkit, forward
    and backward. A multiplication and an addition are two operations; elementwise operations are not counted. The count
    is that of the layers: zeros from a mask, a ReLU or padding count like other values, and the recomputation within a
    kernel, which saves memory, adds nothing. The recomputation of activation checkpointing is counted.

    The results of the operations are the same to the bit as without a counter. ``total`` is None if an
    operation cannot be counted, or if this process has compiled code by torch.compile, even outside the context.

    Attributes:
        unsupported_reason: the reason why ``total`` is None; None if every operation so far could be counted.
    """

    # The formulas are those of torch's FlopCounterMode. FlopCounterMode itself puts hooks on all modules, and
    # `lightkit.nn.FusedSequential` does not fuse layers with hooks: other kernels would run.

    obstacle = RenamedAttribute("unsupported_reason")

    def __init__(self) -> None:
        self.unsupported_reason: str | None = None
        self._by_dtype: Counter[torch.dtype] = Counter()
        self._active = ExitStack()

    @property
    def total(self) -> int | None:
        """The number of floating-point operations so far; None if an operation could not be counted."""
        return self._by_dtype.total() if self.unsupported_reason is None else None

    @property
    def dtype(self) -> torch.dtype | None:
        """The operand dtype with the most floating-point operations so far; None if no operation was counted."""
        return max(self._by_dtype, key=self._by_dtype.__getitem__, default=None)

    def __enter__(self) -> FlopCounter:
        self._check_for_compiled_code()
        # torch.compile does not compile under a dispatch mode.
        if self.unsupported_reason is None:
            self._active.enter_context(_Counting(self))
        return self

    def __exit__(self, *exception: object) -> None:
        self._active.close()
        self._check_for_compiled_code()

    def _check_for_compiled_code(self) -> None:
        dynamo = sys.modules.get("torch._dynamo.eval_frame")
        # The back end of code that is not compiled is None.
        if dynamo is not None and any(dynamo.cached_backends.values()):
            self._stop("torch.compile is in use, and operators in compiled code cannot be counted")

    def _stop(self, reason: str) -> None:
        self.unsupported_reason = self.unsupported_reason or reason

    def _count(self, func: Any, types: Sequence[type], args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
        """Adds the operations of one call of the operator ``func`` that returned ``out``."""
        if not isinstance(func, torch._ops.OpOverload):
            # A higher-order operator, such as torch.cond.
            self._stop(f"the operations of {func} are unknown")
            return
        # In-place operators have the formulas of the others.
        formula = _FORMULAS.get(func._schema.name.removesuffix("_"))
        if any(cls not in (Tensor, Parameter) for cls in types):
            self._stop(f"{func} ran on {', '.join(sorted(cls.__name__ for cls in types))}")
        elif formula is None:
            if _may_multiply(func):
                self._stop(f"the operations of {func} are unknown")
        elif any(isinstance(a, Tensor) and (a.layout is not torch.strided or a.is_complex()) for a in args):
            self._stop(f"{func} ran on sparse or complex tensors")
        else:
            try:
                self._by_dtype[args[0].dtype] += formula(*args, **kwargs, out_val=out)
            except Exception as error:
                # The operation itself was successful: an error of the formula must not stop a training.
                self._stop(f"the operations of {func} are unknown: {error}")


class _Counting(TorchDispatchMode):
    """Passes each operator that runs on a device, below autograd, to a `FlopCounter`."""

    # The cross-entropy of `lightkit.ops` would run torch's own under other modes.
    only_watches = True
    supports_higher_order_operators = True

    def __init__(self, counter: FlopCounter) -> None:
        super().__init__()
        self._counter = counter

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Makes torch.compile compile within the counter as without it."""
        return True

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self._counter._count(func, types, args, kwargs, out)
        return out


# torch's operators that multiply, decompose or transform matrices. Inference mode dispatches composite ones as a whole.
# The fused cells of _thnn_ run after their matrix products, which are counted by themselves.
_MULTIPLIES = re.compile(
    r"(?!_thnn_).*("
    r"m[mv](?![a-z])|matmul|multi_dot|tensordot|einsum|conv(?!ert)|linear(?!\d)|"
    r"rnn(?!_flatten)|lstm|gru(_|$)|attention|multi_head|transformer|"
    r"linalg_(?!vector_norm|cross|diagonal|check_errors|_powsum)|cholesky|geqrf|or[gm]qr|(?<!re)solve|matrix_(exp|power)|"
    r"cdist|fft_.2.)"
)

# Operators of other namespaces may multiply matrices. Those of these namespaces that do are above or have formulas.
_NAMESPACES = ("aten", "prim", "lightkit", "profiler", "c10d")


def _may_multiply(func: Any) -> bool:
    return func.namespace not in _NAMESPACES or (
        func.namespace == "aten" and _MULTIPLIES.match(func._schema.name.removeprefix("aten::")) is not None
    )


def matmul_rate(device: torch.device | str, dtype: torch.dtype) -> float:
    """Measures the number of floating-point operations a second of a large matrix product by `torch.mm`.

    The result is the median of five products, with torch's present settings of threads and precision. The measurement
    takes about 0.1 s. On a busy machine it takes longer, and the result is the rate of a part of the machine.

    Args:
        device: the device of the matrices.
        dtype: the dtype of the matrices, floating point.

    Returns:
        The number of operations a second; a multiplication and an addition are two.
    """
    size = _FALLBACK_SIZE
    while True:
        # Random values would advance the generator; equal values take a GPU less power than real data.
        matrix = torch.linspace(-1, 1, size * size, device=device).view(size, size).to(dtype)
        result = torch.empty_like(matrix)
        # The first product of a size includes memory allocation and the choice of a kernel.
        _, *seconds = (_time(matrix, result) for _ in range(1 + _REPEATS))
        # On a busy machine any single product may be slow: the fastest one decides on the size.
        enough = _MIN_SECONDS if size >= _MIN_SIZE else _FALLBACK_SECONDS
        if min(seconds) >= enough or size >= _MAX_SIZE:
            return 2 * size**3 / statistics.median(seconds)
        size *= 2


def _time(matrix: Tensor, result: Tensor) -> float:
    started = time.perf_counter()
    torch.mm(matrix, matrix, out=result)
    # .item() waits for the device.
    result[0, 0].item()
    return time.perf_counter() - started


# The formulas take shapes in place of tensors; `out_shape` has the shapes of the results.


def _mv(matrix: Shape, vector: Shape, *, out_shape: Any, **_: Any) -> int:
    return 2 * prod(matrix)


def _addmv(added: Shape, matrix: Shape, vector: Shape, *, out_shape: Any, **_: Any) -> int:
    return 2 * prod(matrix)


def _addbmm(added: Shape, left: Shape, right: Shape, *, out_shape: Any, **_: Any) -> int:
    return 2 * prod(left) * right[-1]


def _convolution_backward(grad_output: Shape, input: Shape, weight: Shape, *rest: Any, out_shape: Any, **_: Any) -> int:
    _, _, _, _, transposed, _, _, wanted = rest
    # torch's own formula counts the gradient of the weight once per group.
    return sum(wanted[:2]) * conv_flop_count(list(input), list(weight), list(grad_output), transposed)


def _conv_relu_pool(input: Shape, weight: Shape, bias: Any, padding: Shape, pool: bool, *, out_shape: Any) -> int:
    return _layer_chain(input, [weight], [bias], (*padding, True, pool), out_shape=None)


def _conv2d(input: Shape, weight: Shape, bias: Any, *settings: Any, out_shape: Any) -> int:
    output, _ = out_shape
    # A weight holds the products of one place of the output.
    return 2 * input[0] * prod(output[2:]) * prod(weight)


def _conv2d_backward(grad_output: Shape, input: Shape, weight: Shape, *settings: Any, out_shape: Any) -> int:
    *_, wanted = settings
    return sum(wanted[:2]) * 2 * input[0] * prod(grad_output[2:]) * prod(weight)


def _layer_chain(
    input: Shape, weights: Sequence[Shape], biases: Any, settings: Sequence[int], *_: Any, out_shape: Any
) -> int:
    return sum(_layer_flops(input, weights, settings))


def _layer_chain_backward(
    grad_output: Shape, input: Shape, weights: Sequence[Shape], *rest: Any, out_shape: Any
) -> int:
    *_, settings, wanted = rest
    each = _layer_flops(input, weights, settings)
    of_weights = wanted[1 : 1 + len(weights)]
    # The gradient of a layer's input is computed if the chain's input or a layer before it needs a gradient.
    of_inputs = [any(wanted[: 1 + layer]) or any(wanted[1 + len(weights) :][:layer]) for layer in range(len(weights))]
    return sum(flops * (w + i) for flops, w, i in zip(each, of_weights, of_inputs, strict=True))


def _layer_flops(input: Shape, weights: Sequence[Shape], settings: Sequence[int]) -> list[int]:
    """Returns the number of forward operations of each layer of a `lightkit.ops.layer_chain`.

    Args:
        input: the shape of the input of the chain.
        weights: the shape of each layer's weight.
        settings: four numbers for each layer: the padding of rows, the padding of columns, 1 for a ReLU, and 1 for a
            pool, which halves height and width, rounded down.
    """
    flops = []
    size = input[2:]
    for layer, weight in enumerate(weights):
        *padding, _, pool = settings[4 * layer : 4 * layer + 4]
        if len(weight) == 2:
            flops.append(2 * input[0] * prod(weight))
        else:
            size = [i + 2 * p - w + 1 for i, w, p in zip(size, weight[2:], padding, strict=True)]
            flops.append(conv_flop_count([input[0], weight[1]], list(weight), [input[0], weight[0], *size]))
            size = [s // 2 for s in size] if pool else size
    return flops


# The numbers of a layer in the plan of `lightkit.ops.Int8Chain`.
_PLANNED = 15


def _int8_chain(input: Shape, packed: Shape, plan: Sequence[int], *_: Any, out_shape: Any) -> int:
    # A multiplication of integers counts like one of floats.
    flops = 0
    size = [int(number) for number in input[2:]]
    for first in range(1, len(plan), _PLANNED):
        is_linear, outputs, inputs, *numbers = plan[first : first + _PLANNED]
        if is_linear:
            flops += 2 * input[0] * inputs * outputs
            continue
        kernel, stride, padding, dilation = (numbers[i : i + 2] for i in (0, 2, 4, 6))
        groups, pool = numbers[8], numbers[10]
        each = zip(size, kernel, stride, padding, dilation, strict=True)
        size = [(s + 2 * p - d * (k - 1) - 1) // step + 1 for s, k, step, p, d in each]
        flops += 2 * input[0] * prod(size) * outputs * (inputs // groups) * prod(kernel)
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
    # torch's own formula also counts the scores, which the kernels recompute.
    return 2 * sdpa_flop_count(query, key, value)


def _recurrent(input: Shape, weights: Sequence[Shape]) -> int:
    # Each step of each sequence, packed or not, is multiplied by each matrix once.
    return 2 * prod(input[:-1]) * sum(prod(weight) for weight in weights if len(weight) == 2)


def _mkldnn_rnn(input: Shape, *rest: Any, out_shape: Any) -> int:
    return _recurrent(input, rest[:2])


def _mkldnn_rnn_backward(input: Shape, *rest: Any, out_shape: Any) -> int:
    # The kernel computes the gradients of input, state and weights, needed or not.
    return 2 * _recurrent(input, rest[:2])


def _cudnn_rnn(input: Shape, weights: Sequence[Shape], *_: Any, out_shape: Any) -> int:
    return _recurrent(input, weights)


def _cudnn_rnn_backward(input: Shape, weights: Sequence[Shape], *rest: Any, out_shape: Any) -> int:
    *_, wanted = rest
    return (1 + wanted[3]) * _recurrent(input, weights)


# Formulas by name, since lightkit's operators exist only with native kernels.
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
    "lightkit::conv2d": _conv2d,
    "lightkit::_conv2d_backward": _conv2d_backward,
    "lightkit::layer_chain": _layer_chain,
    "lightkit::_layer_chain_forward": _layer_chain,
    "lightkit::_layer_chain_backward": _layer_chain_backward,
    "lightkit::int8_chain": _int8_chain,
    "lightkit::linear_cross_entropy": _linear_cross_entropy,
    "lightkit::_linear_cross_entropy_forward": _linear_cross_entropy_forward,
    "lightkit::_linear_cross_entropy_backward": _linear_cross_entropy_backward,
}

# torch's formulas for packed sequences of different lengths also count the recomputation.
_EXCLUDED = ("aten::_flash_attention_backward", "aten::_efficient_attention_backward")

_FORMULAS = {
    packet._qualified_op_name: formula
    for packet, formula in flop_registry.items()
    if isinstance(packet, torch._ops.OpOverloadPacket) and packet._qualified_op_name not in _EXCLUDED
} | {name: shape_wrapper(formula) for name, formula in _OWN.items()}
