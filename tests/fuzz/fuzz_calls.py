"""One call of the fuzz: made from a seed and a number alone, run, and judged.

What is fuzzed is what is registered: the schemas of the namespace `lightkit`, the functions of the native module that
are the short way to one of them, its step plans, and the optimizers of `lightkit.optim`.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from fuzz_examples import EXAMPLES
from fuzz_optimizers import optimizer_call, plan_call
from fuzz_values import change_tensor, change_value, random_value
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightkit import native

# What a wrong argument may raise.
REFUSALS = (RuntimeError, ValueError, TypeError, IndexError, OverflowError)

# What no message may say: it is no answer to a wrong argument.
_UNCLEAR = (
    "bad_alloc",
    "vector::",
    'INTERNAL ASSERT FAILED at "/',
    "returned NULL without setting",
    "bad internal call",
)

# Tensors of more elements are not compared with what they were.
_MOST_COMPARED = 1 << 16


class Failure(AssertionError):
    """A call that did what no call may do."""


@dataclass
class Outcome:
    """What became of a call: the class of its refusal, or None, and likewise of its derivatives."""

    name: str
    refusal: str | None = None
    derivatives: list[str] = field(default_factory=list)


@cache
def schemas() -> dict[str, torch._C.FunctionSchema]:
    """Returns the schemas of all registered ops, by name."""
    assert native.load() is not None
    found = [s for s in torch._C._jit_get_all_schemas() if s.name.startswith("lightkit::")]
    return {schema.name.partition("::")[2]: schema for schema in sorted(found, key=lambda s: s.name)}


class _Recorder(TorchDispatchMode):
    """Keeps what the ops are called with and what they return, by the names that their schemas give to it."""

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[str, Any] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        if func.namespace == "lightkit":
            schema = func._schema
            self.values.update(zip((a.name for a in schema.arguments), args, strict=False))
            returned = results if isinstance(results, tuple) else (results,)
            self.values.update((r.name, v) for r, v in zip(schema.returns, returned, strict=True) if r.name)
        return results


def right_values(example: Callable[[random.Random], dict[str, Any]], rng: random.Random) -> dict[str, Any]:
    """Returns right arguments by name: of one run of an example, so that they belong together."""
    with _Recorder() as recorder:
        given = example(rng)
    return {**recorder.values, **given}


@cache
def examples_of(op: str) -> tuple[Callable[[random.Random], dict[str, Any]], ...]:
    """Returns the examples some of whose runs give every argument of an op a value."""
    return tuple(e for e in EXAMPLES if any(_gives_all(op, names) for names in _names_of(e)))


@cache
def _names_of(example: Callable[[random.Random], dict[str, Any]]) -> tuple[frozenset[str], ...]:
    """Returns the names that have values after some runs of an example."""
    return tuple(frozenset(right_values(example, random.Random(seed))) for seed in range(12))


def _gives_all(op: str, names: Iterable[str]) -> bool:
    return {argument.name for argument in schemas()[op].arguments} <= set(names)


def _fresh(rng: random.Random, value: Any) -> Any:
    """Returns a leaf in place of a tensor, which requires gradients or does not; the same for those of a list."""
    if isinstance(value, (list, tuple)):
        return [_fresh(rng, v) for v in value]
    if not isinstance(value, Tensor):
        return value
    leaf = value.detach().clone()
    return leaf.requires_grad_(leaf.is_floating_point() and rng.random() < 0.5)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, (list, tuple)):
        return [tensor for v in value for tensor in _tensors(v)]
    return [value] if isinstance(value, Tensor) else []


def arguments_of(op: str, rng: random.Random) -> list[Any]:
    """Returns arguments of an op: random ones, or right ones of which none to three are changed."""
    schema = schemas()[op]
    examples = examples_of(op)
    if not examples or rng.random() < 0.15:
        return [random_value(rng, argument.type) for argument in schema.arguments]
    values: dict[str, Any] = {}
    while not _gives_all(op, values):
        values = right_values(rng.choice(examples), rng)
    arguments = [_fresh(rng, values[argument.name]) for argument in schema.arguments]
    others = _tensors(arguments)
    for _ in range(rng.choice([0, 1, 1, 1, 2, 3])):
        place = rng.randrange(len(arguments))
        arguments[place] = change_value(rng, arguments[place], others)
    return arguments


def _comparable(tensor: Tensor) -> bool:
    try:
        return (
            tensor.device.type == "cpu"
            and tensor.layout == torch.strided
            and not tensor.is_nested
            and not tensor.is_quantized
            and not tensor._is_zerotensor()
            and 0 < tensor.numel() <= _MOST_COMPARED
            and not isinstance(tensor, torch.nn.UninitializedParameter)
            and tensor.untyped_storage().nbytes() >= tensor.element_size() * (tensor.storage_offset() + _reach(tensor))
        )
    except (RuntimeError, ValueError, NotImplementedError):
        return False


def _reach(tensor: Tensor) -> int:
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8).clone()


def _check_results(schema: torch._C.FunctionSchema, results: Any) -> list[Tensor]:
    """Raises a Failure unless the results are of the schema's types; returns the tensors."""
    expected = schema.returns
    returned = results if isinstance(results, (tuple, list)) and len(expected) != 1 else (results,)
    if len(returned) != len(expected):
        raise Failure(f"{schema.name} returned {len(returned)} values, its schema has {len(expected)}")
    for value, declared in zip(returned, expected, strict=True):
        is_list = declared.type.kind() == "ListType"
        if not (isinstance(value, (list, tuple)) if is_list else isinstance(value, Tensor)):
            raise Failure(f"{schema.name} returned {type(value)}, its schema has {declared.type}")
    return _tensors(list(returned))


def _read(tensors: list[Tensor]) -> None:
    """Reads all memory of results."""
    for tensor in tensors:
        if _comparable(tensor):
            _bytes(tensor)


def _differentiate(rng: random.Random, results: list[Tensor], arguments: list[Any], outcome: Outcome) -> None:
    """Takes first and second derivatives, with upstream gradients that may be wrong or odd."""
    leaves = [t for t in _tensors(arguments) if t.requires_grad and t.is_leaf]
    outputs = [t for t in results if t.requires_grad]
    if not leaves or not outputs:
        return
    upstream: list[Any] = [torch.rand_like(t) for t in outputs]
    if rng.random() < 0.3:
        place = rng.randrange(len(upstream))
        # torch's own operations take part in second derivatives, and read beyond a storage that is too short.
        upstream[place] = change_tensor(rng, upstream[place], short=False)
    create_graph = rng.random() < 0.5
    for _ in range(3 if create_graph else 1):
        gradients = torch.autograd.grad(
            outputs, leaves, upstream, create_graph=create_graph, allow_unused=True, materialize_grads=False
        )
        present = [g for g in gradients if g is not None]
        _read(present)
        outcome.derivatives.append("returned")
        outputs = [g for g in present if g.requires_grad]
        upstream = [torch.rand_like(g) for g in outputs]
        if not outputs:
            return


def _refusal(error: Exception) -> str:
    """Returns the class of a refusal; raises a Failure where it is none."""
    if any(words in str(error) for words in _UNCLEAR):
        raise Failure(f"unclear: {type(error).__name__}: {error}") from error
    return type(error).__name__


def _call_op(op: str, function: Callable[..., Any], rng: random.Random) -> Outcome:
    schema = schemas()[op]
    arguments = arguments_of(op, rng)
    written = [a.alias_info is not None and a.alias_info.is_write for a in schema.arguments]
    constant = [t for a, w in zip(arguments, written, strict=True) if not w for t in _tensors(a) if _comparable(t)]
    writable = [t for a, w in zip(arguments, written, strict=True) if w for t in _tensors(a) if _comparable(t)]
    storages = {t.untyped_storage()._cdata for t in writable}
    # `inplace` takes the memory of the logits.
    if any(a.name == "inplace" and v is not False for a, v in zip(schema.arguments, arguments, strict=True)):
        constant = []
    constant = [t for t in constant if t.untyped_storage()._cdata not in storages]
    before = [_bytes(t) for t in constant]
    outcome = Outcome(op)
    try:
        results = function(*arguments)
    except REFUSALS as error:
        outcome.refusal = _refusal(error)
        results = NotImplemented
    if results is not NotImplemented:
        tensors = _check_results(schema, results)
        _read(tensors)
        try:
            _differentiate(rng, tensors, arguments, outcome)
        except REFUSALS as error:
            outcome.derivatives.append(_refusal(error))
    for tensor, old in zip(constant, before, strict=True):
        if not torch.equal(_bytes(tensor), old):
            raise Failure(f"{op} wrote into an argument that its schema does not let it write into")
    return outcome


def _short_call(op: str, rng: random.Random) -> Outcome:
    """Calls a function of the native module, which may leave a call to the op."""
    function = getattr(native.load(), op)
    return _call_op(op, lambda *arguments: _as_results(function(*arguments), arguments), rng)


def _as_results(results: Any, arguments: tuple[Any, ...]) -> Any:
    # Of `return_lse` the short way makes whether there is a second result.
    return (results, torch.empty(0)) if isinstance(results, Tensor) else results


@cache
def targets() -> dict[str, Callable[[random.Random], Outcome]]:
    """Returns all that is fuzzed, by name."""
    module = native.load()
    found: dict[str, Callable[[random.Random], Outcome]] = {}
    for op in schemas():
        function = getattr(torch.ops.lightkit, op).default
        found[op] = lambda rng, op=op, function=function: _call_op(op, function, rng)
        if callable(getattr(module, op, None)):
            found[f"native.{op}"] = lambda rng, op=op: _short_call(op, rng)
    for name in dir(module):
        if isinstance(getattr(module, name), type) and hasattr(getattr(module, name), "step"):
            found[f"native.{name}"] = lambda rng, name=name: _judged(name, plan_call, rng)
    from lightkit import optim

    for name in optim.__all__:
        # Not the base of all, which is no optimizer yet.
        if hasattr(getattr(optim, name), "_plan_name"):
            found[f"optim.{name}"] = lambda rng, name=name: _judged(name, optimizer_call, rng)
    return found


def _judged(name: str, call: Callable[[str, random.Random], None], rng: random.Random) -> Outcome:
    try:
        call(name, rng)
    # A group or an entry of the state may lack anything.
    except (*REFUSALS, KeyError, AttributeError) as error:
        return Outcome(name, _refusal(error))
    return Outcome(name)


def run(seed: int, number: int) -> Outcome:
    """Makes and runs a call; the same for the same seed and number, whatever was run before.

    Raises:
        Failure: the call did what no call may do.
    """
    rng = random.Random(f"{seed}:{number}")
    torch.manual_seed(rng.getrandbits(32))
    name = rng.choice(list(targets()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return targets()[name](rng)
