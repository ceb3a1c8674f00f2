"""Values that an op may be given: right ones changed in one way, and random ones of a schema's type."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# Elements of what is too large for any memory: an allocation of them fails at once.
HUGE = 1 << 50

DTYPES = (
    *(torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    *(torch.bool, torch.complex64, torch.complex128, torch.complex32),
)

INTEGERS = (-(2**63), -(2**31), -100, -2, -1, 0, 1, 2, 3, 4, 7, 64, 2**26, 2**30, 2**31, 2**62, 2**63 - 1)

NUMBERS = (float("nan"), float("inf"), -float("inf"), -1.0, -0.0, 0.0, 1e-320, 1e-45, 0.1, 0.5, 1.0, 2.0, 30.0, 1e308)


class Subclass(Tensor):
    """A tensor of another class, without ways of its own."""


def _other_dtype(rng: random.Random, tensor: Tensor) -> Tensor:
    return tensor.to(rng.choice(DTYPES))


def _quantized(rng: random.Random, tensor: Tensor) -> Tensor:
    return torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.qint8)


def _other_device(rng: random.Random, tensor: Tensor) -> Tensor:
    return tensor.to("meta")


def _other_layout(rng: random.Random, tensor: Tensor) -> Tensor:
    return rng.choice(
        [
            Tensor.to_sparse,
            Tensor.to_sparse_csr,
            Tensor.to_mkldnn,
            lambda t: torch.nested.nested_tensor([t, t]),
            lambda t: torch.nested.nested_tensor([t, t], layout=torch.jagged),
        ]
    )(tensor)


def _transposed(rng: random.Random, tensor: Tensor) -> Tensor:
    first, second = rng.sample(range(tensor.dim()), 2)
    return tensor.transpose(first, second).contiguous().transpose(first, second)


def _with_gaps(rng: random.Random, tensor: Tensor) -> Tensor:
    wider = torch.zeros([2 * size for size in tensor.shape], dtype=tensor.dtype)
    view = wider[tuple(slice(rng.randrange(2), None, 2) for _ in tensor.shape)]
    return view.copy_(tensor)


def _with_offset(rng: random.Random, tensor: Tensor) -> Tensor:
    longer = torch.zeros(tensor.numel() + 3, dtype=tensor.dtype)
    return longer[rng.choice([1, 3]) :][: tensor.numel()].view(tensor.shape).copy_(tensor)


def _overlapping(rng: random.Random, tensor: Tensor) -> Tensor:
    return tensor.contiguous().as_strided(tensor.shape, [rng.randrange(2) for _ in tensor.shape])


def _channels_last(rng: random.Random, tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


def _other_size(rng: random.Random, tensor: Tensor) -> Tensor:
    dim = rng.randrange(tensor.dim())
    size = tensor.shape[dim]
    wanted = rng.choice([0, 0, 1, size - 1, size + 1, 2 * size, HUGE, HUGE])
    if wanted <= size:
        return tensor.narrow(dim, 0, max(wanted, 0))
    sizes = list(tensor.shape)
    sizes[dim] = wanted
    if wanted == HUGE:
        return tensor.narrow(dim, 0, 1).expand(sizes)
    return tensor.repeat([2 if d == dim else 1 for d in range(tensor.dim())]).narrow(dim, 0, wanted)


def _other_dims(rng: random.Random, tensor: Tensor) -> Tensor:
    return rng.choice(
        [
            lambda: tensor.unsqueeze(rng.randrange(tensor.dim() + 1)),
            lambda: tensor.reshape(-1),
            lambda: tensor.reshape(-1)[0],
            lambda: tensor.select(rng.randrange(tensor.dim()), 0),
            lambda: tensor.new_empty(0),
            lambda: tensor.new_empty([0] * tensor.dim()),
            lambda: tensor.new_empty([HUGE, 0, HUGE]),
            lambda: tensor.new_empty([0]).as_strided([0, 3, HUGE, HUGE], [0, 0, 0, 0]),
        ]
    )()


def _huge_on_meta(rng: random.Random, tensor: Tensor) -> Tensor:
    sizes = [rng.choice([size, size, HUGE, 1 << 31]) for size in tensor.shape]
    return torch.empty(sizes, dtype=tensor.dtype, device="meta")


def _with_bit(rng: random.Random, tensor: Tensor) -> Tensor:
    return rng.choice(
        [
            torch._neg_view,
            lambda t: torch.complex(t, t).conj().imag,
            lambda t: torch._efficientzerotensor(t.shape, dtype=t.dtype),
        ]
    )(tensor)


def _of_other_memory(rng: random.Random, tensor: Tensor) -> Tensor:
    return rng.choice([torch._lazy_clone, _inference, lambda t: t.clone().as_subclass(Subclass), torch.nn.Parameter])(
        tensor
    )


def _inference(tensor: Tensor) -> Tensor:
    with torch.inference_mode():
        return tensor.clone()


def _other_values(rng: random.Random, tensor: Tensor) -> Tensor:
    changed = tensor.clone()
    place = changed.view(-1)[rng.randrange(changed.numel())] if rng.random() < 0.7 else changed
    if tensor.is_floating_point():
        return place.fill_(rng.choice(NUMBERS)) if place is changed else (place.fill_(rng.choice(NUMBERS)), changed)[1]
    limits = torch.iinfo(tensor.dtype)
    place.fill_(rng.choice([limits.min, limits.max, *(i for i in INTEGERS if limits.min <= i <= limits.max)]))
    return changed


def _none(rng: random.Random, tensor: Tensor) -> None:
    return None


def _no_tensor(rng: random.Random, tensor: Tensor) -> Any:
    return rng.choice([1, 1.5, "tensor", [tensor], (), torch.nn.UninitializedParameter()])


def _short(rng: random.Random, tensor: Tensor) -> Tensor:
    """A tensor whose storage was resized to less than its elements take."""
    short = tensor.clone()
    short.untyped_storage().resize_(rng.choice([0, short.untyped_storage().nbytes() // 2]))
    return short


def _is_short(tensor: Tensor) -> bool:
    is_own = type(tensor) is Tensor and tensor.device.type == "cpu" and tensor.layout == torch.strided
    if not is_own or tensor.is_nested or tensor._is_zerotensor() or tensor.numel() == 0:
        return False
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (tensor.storage_offset() + last + 1) * tensor.element_size() > tensor.untyped_storage().nbytes()


_CHANGES: tuple[Callable[[random.Random, Tensor], Any], ...] = (
    *(_other_dtype, _quantized, _other_device, _other_layout, _transposed, _with_gaps, _with_offset, _overlapping),
    *(_channels_last, _other_size, _other_size, _other_dims, _huge_on_meta, _with_bit, _of_other_memory),
    *(_other_values, _other_values, _none, _no_tensor),
)


def change_tensor(rng: random.Random, tensor: Tensor, others: Sequence[Tensor] = (), short: bool = True) -> Any:
    """Returns a tensor changed in one way, or one of `others`; the tensor itself where the way is none for it.

    Args:
        rng: makes the choices.
        tensor: a right argument.
        others: tensors of other arguments, which may take its place.
        short: may return a tensor that reaches beyond its storage, which torch's own functions do not survive.
    """
    if _is_short(tensor):
        # torch's functions would read beyond its storage.
        return tensor
    changes = [*_CHANGES, *([_short] if short else [])]
    change = rng.choice([*changes, None] if others else changes)
    if change is None:
        return rng.choice(others)
    try:
        with torch.no_grad():
            changed = change(rng, tensor.detach())
        differentiable = isinstance(changed, Tensor) and (changed.is_floating_point() or changed.is_complex())
        if differentiable and tensor.requires_grad and not changed.is_inference():
            changed = changed.detach().requires_grad_()
        return changed
    except (RuntimeError, ValueError, TypeError, IndexError):
        return tensor


def random_tensor(rng: random.Random) -> Tensor:
    """Returns a small tensor of any number of dimensions and, mostly, of a type that the kernels take."""
    sizes = [rng.choice([0, 1, 2, 3, 5, 8]) for _ in range(rng.choice([0, 1, 1, 2, 2, 4, 4, 5]))]
    dtype = rng.choice([torch.float32] * 4 + [torch.int64] * 3 + [torch.uint8] + list(DTYPES))
    return torch.randint(0, 3, sizes).to(dtype)


def random_value(rng: random.Random, kind: torch._C.JitType) -> Any:
    """Returns a random value of a schema's type."""
    name = kind.kind()
    if name == "OptionalType":
        return None if rng.random() < 0.4 else random_value(rng, kind.getElementType())
    if name == "ListType":
        return [random_value(rng, kind.getElementType()) for _ in range(rng.choice([0, 1, 1, 2, 3, 4, 8]))]
    if name == "TensorType":
        return random_tensor(rng)
    if name == "BoolType":
        return rng.random() < 0.5
    if name == "FloatType":
        return rng.choice(NUMBERS)
    # A ScalarType is an integer to a schema.
    return rng.choice(DTYPES) if "ScalarType" in str(kind) and rng.random() < 0.8 else rng.choice(INTEGERS)


def change_value(rng: random.Random, value: Any, others: Sequence[Tensor] = ()) -> Any:
    """Returns an argument changed in one way: a tensor, a list, a number, a flag, a dtype or None."""
    if isinstance(value, Tensor):
        return change_tensor(rng, value, others)
    if isinstance(value, (list, tuple)):
        return _change_list(rng, list(value), others)
    if isinstance(value, bool):
        return rng.choice([not value, None, 2, -1, 0.5])
    if isinstance(value, int):
        return rng.choice([value - 1, value + 1, -value, 1.5, None, True, rng.choice(INTEGERS), rng.choice(INTEGERS)])
    if isinstance(value, float):
        return rng.choice([*NUMBERS, None, 1, 2**63, "1"])
    if isinstance(value, torch.dtype):
        return rng.choice([*DTYPES, None, rng.choice(INTEGERS)])
    return rng.choice([random_tensor(rng), random_tensor(rng), 1, 0.5, rng.choice(DTYPES), *others])


def _change_list(rng: random.Random, values: list[Any], others: Sequence[Tensor]) -> Any:
    place = rng.randrange(len(values) + 1)
    way = rng.randrange(6)
    if way == 0 or not values:
        return rng.choice([[], None, 1, values[:place], [*values, *values]])
    if way == 1:
        return values[:place] + [rng.choice([None, *values, *others])] + values[place:]
    place = min(place, len(values) - 1)
    if way == 2:
        return values[:place] + values[place + 1 :]
    values[place] = change_value(rng, values[place], others)
    return values
