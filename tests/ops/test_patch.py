"""lightkit's cross-entropy behind torch's name: for whom, for which calls, and until when."""

from __future__ import annotations

import functools
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.functional import cross_entropy as imported
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import lightkit
from lightkit.flops import FlopCounter
from lightkit.ops import patch, patch_cross_entropy

KEPT = {"attribute": F.cross_entropy, "partial": functools.partial(F.cross_entropy, reduction="sum")}


def problem(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 5, generator=generator).to(dtype).requires_grad_()
    return logits, torch.tensor([0, 1, 4, -100, 2, 3])


@pytest.fixture
def calls(monkeypatch):
    """The calls that reach lightkit's function."""
    seen = []

    def recorded(*arguments):
        seen.append(arguments)
        return lightkit.ops.cross_entropy(*arguments)

    monkeypatch.setattr(patch, "cross_entropy", recorded)
    return seen


@pytest.mark.parametrize(
    "function",
    [
        lambda *a: F.cross_entropy(*a),
        lambda *a: nn.functional.cross_entropy(*a),
        imported,
        KEPT["attribute"],
        KEPT["partial"],
        nn.CrossEntropyLoss(weight=torch.rand(5), label_smoothing=0.1),
    ],
)
def test_every_way_to_the_function(function, calls):
    """It runs on the kernels by every name within the context, nested too, and not outside."""
    logits, target = problem()
    expected = function(logits, target)
    (expected_gradient,) = torch.autograd.grad(expected, logits)
    with patch_cross_entropy():
        with patch_cross_entropy():
            loss = function(logits, target)
        assert len(calls) == 1
        (gradient,) = torch.autograd.grad(function(logits, target), logits)
        assert len(calls) == 2
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, expected_gradient)
    assert torch.equal(function(logits, target), expected) and len(calls) == 2


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight": torch.tensor([1.0, 2.0, 0.5, 1.0, 3.0])},
        {"ignore_index": 2, "reduction": "none"},
        {"reduction": "sum", "label_smoothing": 0.2},
    ],
    ids=lambda options: ",".join(options) or "defaults",
)
@pytest.mark.parametrize("autocast", [False, True])
def test_arguments_arrive(options, autocast, calls):
    """Every argument, by keyword, means what it means to torch; so does autocast."""
    logits, target = problem(torch.bfloat16 if autocast else torch.float32)
    target = target.clamp(min=0)
    weight = options.get("weight")
    options = options | ({} if weight is None else {"weight": weight.to(logits.dtype)})
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = F.cross_entropy(logits, target, **options)
        with patch_cross_entropy():
            loss = F.cross_entropy(input=logits, target=target, **options)
    assert len(calls) == 1 and loss.dtype == expected.dtype
    torch.testing.assert_close(loss, expected)


class Tagged(torch.Tensor):
    pass


class SeesFunctions(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


class SeesOperators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def test_calls_that_stay_torchs(calls):
    """What the kernels do not cover, and what is being traced or transformed, is torch's, without recursion."""
    logits, target = problem()
    batched = torch.stack([logits, logits])
    # The kernels give no gradient for the target.
    probabilities = torch.full((6, 5), 0.2, requires_grad=True)
    cases = [
        lambda: F.cross_entropy(logits, probabilities),
        lambda: F.cross_entropy(logits, target, reduce=False),
        lambda: F.cross_entropy(logits, target, size_average=False),
        lambda: F.cross_entropy(logits.as_subclass(Tagged), target),
        lambda: torch.func.vmap(F.cross_entropy)(batched, torch.stack([target, target])),
        lambda: torch.func.grad(F.cross_entropy)(logits, target),
        lambda: torch.func.jvp(lambda x: F.cross_entropy(x, target), (logits.detach(),), (torch.ones(6, 5),)),
        lambda: torch.jit.trace(lambda x: F.cross_entropy(x, target), logits.detach(), check_trace=False)(logits),
        lambda: torch.compile(lambda x: F.cross_entropy(x, target), backend="aot_eager", fullgraph=True)(logits),
        lambda: lightkit.ops.cross_entropy(logits, probabilities, z_loss=0.1),
    ]
    for case in cases:
        expected = case()
        with patch_cross_entropy():
            torch.testing.assert_close(case(), expected)
    assert calls == []


def test_modes(calls):
    """A mode sees torch's function, the one object, and torch's operators; the kernel runs below the former."""
    logits, target = problem()
    with patch_cross_entropy():
        with SeesFunctions() as functions:
            F.cross_entropy(logits, target)
        assert functions.seen == [F.cross_entropy] and len(calls) == 1
        with SeesOperators() as operators:
            F.cross_entropy(logits, target)
    assert len(calls) == 1 and not any("lightkit" in str(operator) for operator in operators.seen)


def test_a_mode_that_only_watches(calls):
    """The counter of operations sees those that run without it."""
    logits, target = problem()
    # It does not watch where torch.compile is in use.
    torch._dynamo.reset()
    with patch_cross_entropy(), FlopCounter() as counter:
        F.cross_entropy(logits, target).backward()
        assert len(calls) == 1 and counter.total == 0
        with SeesOperators():
            F.cross_entropy(logits, target)
    assert len(calls) == 1


def test_compiled_before_and_within(calls):
    """Nothing of lightkit is in a graph, and entering again compiles nothing anew."""
    logits, target = problem()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda x: F.cross_entropy(x * 2, target), backend=backend, fullgraph=True)
    for _ in range(3):
        compiled(logits)
        with patch_cross_entropy():
            compiled(logits)
    # torch.compile notices that the function's code is another, and keeps a graph of the same content for each.
    assert len(graphs) == 2
    assert all("cross_entropy" in graph.code and "lightkit" not in graph.code for graph in graphs)


@pytest.mark.parametrize("name", KEPT)
def test_pickles_by_its_name(name):
    """The function, and what holds it, is pickled within the context, and found outside as torch's."""
    with patch_cross_entropy():
        pickled = pickle.dumps(KEPT[name])
    assert b"lightkit" not in pickled
    found = pickle.loads(pickled)
    assert getattr(found, "func", found) is F.cross_entropy


def test_errors_are_of_torchs_types():
    """Wrong calls raise what they raise without the context."""
    logits, target = problem()
    wrong = [
        (logits, target + 5),
        (logits, target[:4]),
        (logits, target, None, None, -100, None, "median"),
        (logits, target, torch.ones(4)),
        (logits, target, torch.ones(5, requires_grad=True)),
        (None, target),
        (logits, None),
        (logits.long(), target),
        (logits, target, None, None, -100, None, "mean", 2.0),
    ]
    for arguments in wrong:
        with pytest.raises(Exception) as expected:
            F.cross_entropy(*arguments)
        with patch_cross_entropy(), pytest.raises(Exception) as raised:
            F.cross_entropy(*arguments)
        assert isinstance(raised.value, expected.type) or raised.type in (ValueError, IndexError), arguments


def test_undone_by_an_exception():
    """An error within the context leaves torch's code behind."""
    code = F.cross_entropy.__code__
    with pytest.raises(KeyError), patch_cross_entropy():
        assert F.cross_entropy.__code__ is not code
        raise KeyError
    assert F.cross_entropy.__code__ is code


def test_somebody_elses_function_is_left_alone(monkeypatch):
    """Where another library has put its own function there, that is said."""
    monkeypatch.setattr(F, "cross_entropy", nn.functional.nll_loss)
    with (
        pytest.raises(RuntimeError, match=r"it has been replaced by torch\.nn\.functional\.nll_loss"),
        patch_cross_entropy(),
    ):
        pass


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
INDICES = [torch.int64, torch.int32, torch.uint8]


def seen_of(logits, target, weight, **options):
    """What a program sees of a loss and its gradient, but for their values; or the class of the error."""
    # A leaf of the layout of the logits.
    logits = logits.detach().requires_grad_()
    try:
        loss = F.cross_entropy(logits, target, weight, **options)
        loss.sum().backward()
    except (RuntimeError, ValueError, IndexError) as error:
        return type(error)
    gradient = logits.grad
    return loss.dtype, loss.shape, loss.stride(), loss.device, loss.requires_grad, gradient.dtype, gradient.stride()


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("input_dtype", DTYPES, ids=str)
def test_every_product_of_dtypes(input_dtype, autocast):
    """Dtype, shape, strides, device and class of error are torch's, for all dtypes of logits, target and weight."""
    logits = torch.randn(4, 5).to(input_dtype)
    indices, probabilities = torch.tensor([0, 4, 1, 2]), torch.rand(4, 5).softmax(1)
    targets = [indices.to(dtype) for dtype in INDICES] + [probabilities.to(dtype) for dtype in DTYPES]
    weights = [None, *(torch.ones(5, dtype=dtype) for dtype in (*DTYPES, torch.int64))]
    options = [{"reduction": r, "label_smoothing": s} for r in ("none", "mean", "sum") for s in (0.0, 0.1)]
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        for target, weight, chosen in itertools.product(targets, weights, options):
            expected = seen_of(logits, target, weight, **chosen)
            with patch_cross_entropy():
                seen = seen_of(logits, target, weight, **chosen)
            assert seen == expected, (target.dtype, None if weight is None else weight.dtype, chosen)


LAYOUTS = {
    "transposed": torch.randn(5, 4).t(),
    "with gaps": torch.randn(4, 10)[:, ::2],
    "one row": torch.randn(5),
    "images": torch.randn(2, 5, 3, 3),
    "channels last": torch.randn(2, 5, 3, 3).contiguous(memory_format=torch.channels_last),
    "expanded": torch.randn(1, 5).expand(4, 5),
    "no rows": torch.randn(0, 5),
    "no classes": torch.randn(3, 0),
    "no classes of images": torch.randn(2, 0, 3),
    "nothing": torch.randn(0, 0),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_and_empty_inputs(layout):
    """Shapes, strides and errors are torch's for logits that lie otherwise, or are empty; so are values."""
    logits = LAYOUTS[layout]
    sizes = logits.shape[1:] if logits.dim() == 1 else (*logits.shape[:1], *logits.shape[2:])
    ignored = torch.full(sizes, -100)
    targets = [torch.zeros(sizes, dtype=torch.int64), ignored, torch.rand(logits.shape)]
    for target, reduction, smoothing in itertools.product(targets, ("none", "mean", "sum"), (0.0, 0.1)):
        options = {"reduction": reduction, "label_smoothing": smoothing}
        expected = seen_of(logits, target, None, **options)
        with patch_cross_entropy():
            assert seen_of(logits, target, None, **options) == expected, options
        if isinstance(expected, type):
            with pytest.raises(expected):
                lightkit.ops.cross_entropy(logits, target, **options)
        else:
            torch.testing.assert_close(
                lightkit.ops.cross_entropy(logits, target, **options),
                F.cross_entropy(logits, target, **options),
                equal_nan=True,
            )


def test_the_old_name_still_works():
    """`substitute_cross_entropy` is the old name of the function, with a warning."""
    with pytest.warns(DeprecationWarning, match="patch_cross_entropy"):
        from lightkit.ops import substitute_cross_entropy

    assert substitute_cross_entropy is patch_cross_entropy
    with pytest.raises(ImportError, match="no_such_op"):
        from lightkit.ops import no_such_op  # noqa: F401
