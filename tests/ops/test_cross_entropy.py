"""Cross-entropy against float64 and against torch's own answers, for any shapes, options and numbers of threads."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from cross_entropy_losses import DTYPES, assert_as_accurate_as_torch, loss_and_gradient
from hypothesis import given
from hypothesis import strategies as st
from support.threads import assert_same_with_any_threads

from lightkit.nn import CrossEntropyLoss
from lightkit.ops import cross_entropy, cross_entropy_reference

# A vector has 4, 8 or 16 lanes; rows of up to 64 classes go side by side; wide rows go in blocks of 1024.
CLASSES = [1, 2, 3, 7, 8, 9, 10, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 1000, 1023, 1024, 1025, 2049]


ROWS = [1, 2, 7, 8, 9, 15, 16, 17, 33]


@pytest.mark.sanitized
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", CLASSES)
def test_error_against_float64_over_widths(dtype, classes):
    """Every width at an edge of a vector, of the narrow path and of a block is right, forward and backward."""
    generator = torch.Generator().manual_seed(classes)
    for rows in ROWS:
        logits = (torch.randn(rows, classes, generator=generator) * 4).to(dtype)
        target = torch.randint(0, classes, (rows,), generator=generator)
        assert_as_accurate_as_torch(logits, target)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [10, 64, 65, 1030])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_error_against_float64_over_options(dtype, classes, reduction, weighted, smoothing):
    """Weights, smoothing, ignored rows and reductions hold together in both paths."""
    generator = torch.Generator().manual_seed(7)
    logits = (torch.randn(21, classes, generator=generator) * 3).to(dtype)
    target = torch.randint(0, classes, (21,), generator=generator)
    target[::5] = 3
    weight = torch.rand(classes, generator=generator).to(dtype) if weighted else None
    options = {"reduction": reduction, "label_smoothing": smoothing, "ignore_index": 3}
    assert_as_accurate_as_torch(logits, target, weight, **options)


@given(
    rows=st.integers(0, 40),
    classes=st.integers(1, 200),
    scale=st.sampled_from([0.01, 1.0, 30.0, 1000.0]),
    shift=st.sampled_from([0.0, -500.0, 1e4]),
    smoothing=st.sampled_from([0.0, 0.3]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    seed=st.integers(0, 2**31),
)
def test_any_input_is_as_accurate_as_torch(rows, classes, scale, shift, smoothing, reduction, seed):
    """Logits of any size and offset: no overflow, no cancellation that torch does not have."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, classes, generator=generator) * scale + shift
    target = torch.randint(0, classes, (rows,), generator=generator)
    target[torch.rand(rows, generator=generator) < 0.2] = -100
    if rows == 0 or (target == -100).all():
        reduction = "sum"
    assert_as_accurate_as_torch(logits, target, reduction=reduction, label_smoothing=smoothing)


@pytest.mark.sanitized
@pytest.mark.parametrize("shape", [(3,), (5, 3), (2, 3, 4), (2, 3, 4, 5), (2, 70, 3, 3), (0, 3), (0, 3, 4), (2, 3, 0)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_shapes_of_torch(shape, reduction):
    """(C), (N, C) and (N, C, d1, ...), empty ones too, give torch's values, shapes and NaN of an empty mean."""
    logits = torch.randn(shape, dtype=torch.float64)
    batch = shape[:0] if len(shape) == 1 else (shape[0], *shape[2:])
    classes = shape[0] if len(shape) == 1 else shape[1]
    target = torch.randint(0, classes, batch)
    expected = loss_and_gradient(F.cross_entropy, logits, target, reduction=reduction)
    actual = loss_and_gradient(cross_entropy, logits, target, reduction=reduction)
    torch.testing.assert_close(actual, expected, equal_nan=True)


@pytest.mark.sanitized
@pytest.mark.parametrize("classes", [10, 300])
def test_non_contiguous_logits_and_targets(classes):
    """Transposed, strided and channels-last inputs are read as they are meant."""
    base = torch.randn(classes, 24, dtype=torch.float64)
    target = torch.randint(0, classes, (24,))
    images = torch.randn(2, classes, 3, 4, dtype=torch.float64).to(memory_format=torch.channels_last)
    labels = torch.randint(0, classes, (4, 3, 2)).permute(2, 1, 0)
    for logits, indices in ((base.t(), target), (base.t()[::2], target[::2]), (images, labels)):
        torch.testing.assert_close(
            loss_and_gradient(cross_entropy, logits, indices), loss_and_gradient(F.cross_entropy, logits, indices)
        )


@pytest.mark.sanitized
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_target_dtypes(dtype):
    """Indices may come in any of three integer types."""
    logits, target = torch.randn(6, 5), torch.tensor([0, 4, 2, 3, 1, 4])
    assert torch.equal(cross_entropy(logits, target.to(dtype)), cross_entropy(logits, target))


@pytest.mark.parametrize("classes", [5, 100])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_logits_as_torch(classes, value):
    """NaN and Inf in a row give what torch gives in that row, and nothing in the others."""
    for position, target in itertools.product((0, 2, classes - 1), (0, 2)):
        logits = torch.randn(3, classes, dtype=torch.float64)
        logits[1, position] = value
        labels = torch.full((3,), target)
        torch.testing.assert_close(
            loss_and_gradient(cross_entropy, logits, labels, reduction="none"),
            loss_and_gradient(F.cross_entropy, logits, labels, reduction="none"),
            equal_nan=True,
        )


@pytest.mark.parametrize("classes", [5, 100])
def test_row_of_minus_infinity_is_nan(classes):
    """A row with no finite logit has no softmax: NaN, as torch says, in float32 as well."""
    logits = torch.full((2, classes), -float("inf"))
    logits[0] = 0
    target = torch.tensor([0, 1])
    expected = F.cross_entropy(logits, target, reduction="none")
    torch.testing.assert_close(cross_entropy(logits, target, reduction="none"), expected, equal_nan=True)


@pytest.mark.sanitized
@pytest.mark.parametrize("classes", [5, 1100])
def test_masked_logits_get_exactly_no_probability(classes):
    """Classes masked with -inf get gradient 0, not a small number, even in the first block of a row."""
    logits = torch.randn(4, classes)
    logits[:, : classes - 2] = -float("inf")
    _, gradient = loss_and_gradient(cross_entropy, logits, torch.full((4,), classes - 1))
    assert torch.equal(gradient[:, : classes - 2], torch.zeros(4, classes - 2, dtype=torch.float64))


def test_all_rows_ignored():
    """Torch's answers: the mean of nothing is NaN, the sum 0, the gradient 0."""
    logits, target = torch.randn(4, 6), torch.full((4,), -100)
    loss, gradient = loss_and_gradient(cross_entropy, logits, target)
    assert loss.isnan()
    assert torch.equal(gradient, torch.zeros(4, 6, dtype=torch.float64))
    assert cross_entropy(logits, target, reduction="sum") == 0


@pytest.mark.sanitized
@pytest.mark.parametrize("classes", [10, 500])
@pytest.mark.parametrize("label", [-1, "classes", 2**40])
def test_label_out_of_range_is_an_index_error(classes, label):
    """The error names the row, the label and the number of classes."""
    label = classes if label == "classes" else label
    target = torch.zeros(9, dtype=torch.long)
    target[6] = label
    with pytest.raises(IndexError, match=rf"Target {label} is out of bounds: row 6 .* {classes} classes"):
        cross_entropy(torch.randn(9, classes), target)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((torch.randn(4, 3), torch.zeros(5, dtype=torch.long)), {}, ValueError, r"target must have shape \[4\]"),
        ((torch.randn(4, 3), torch.zeros(4, 3, dtype=torch.long)), {}, ValueError, r"target must have shape \[4\]"),
        ((torch.randn(4, 3), torch.zeros(4, dtype=torch.bool)), {}, RuntimeError, "class indices must be int64"),
        ((torch.ones(4, 3).long(), torch.zeros(4).long()), {}, RuntimeError, "must be floating point"),
        ((torch.randn(4, 3), torch.zeros(4).long(), torch.ones(4)), {}, RuntimeError, "each of the 3 classes"),
        ((torch.randn(4, 3), torch.zeros(4).long()), {"label_smoothing": 1.5}, RuntimeError, "between 0.0 and 1.0"),
        ((torch.randn(4, 3), torch.zeros(4).long()), {"reduction": "avg"}, ValueError, "must be one of .*got 'avg'"),
        ((torch.randn(4, 3), torch.zeros(4).long()), {"softcap": -1.0}, ValueError, "softcap must not be negative"),
        ((torch.randn(4, 3), torch.zeros(4).long()), {"dtype": torch.int64}, ValueError, "must be floating point"),
        ((torch.randn(4, 3), torch.rand(4)), {}, ValueError, r"must have the shape of the logits, \[4, 3\]"),
        ((torch.tensor(1.0), torch.tensor(0)), {}, ValueError, "at least one dimension"),
    ],
)
def test_wrong_arguments(arguments, options, error, message):
    """Arguments that do not fit are named, with what was expected."""
    with pytest.raises(error, match=message):
        cross_entropy(*arguments, **options)


@pytest.mark.parametrize("ignore_index", [-100, -1, 0, 2, 99])
def test_ignore_index_with_probabilities_as_torch(ignore_index):
    """Probabilities name no class to ignore: what torch refuses is refused, kernel or not, and nothing else."""
    logits, target = torch.randn(4, 3), torch.rand(4, 3).softmax(1)
    needs_gradient = target.clone().requires_grad_()
    try:
        expected = F.cross_entropy(logits, target, ignore_index=ignore_index)
    except RuntimeError:
        for probabilities in (target, needs_gradient):
            with pytest.raises(RuntimeError, match="ignore_index is not supported for floating point target"):
                cross_entropy(logits, probabilities, ignore_index=ignore_index)
    else:
        for probabilities in (target, needs_gradient):
            ours = cross_entropy(logits, probabilities, ignore_index=ignore_index)
            torch.testing.assert_close(ours.detach(), expected)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loss_of_half_precision_in_float32(dtype, reduction):
    """The loss of half-precision logits can be had as accurate as it was computed."""
    logits, target = torch.randn(50, 20).to(dtype), torch.randint(0, 20, (50,))
    loss = cross_entropy(logits, target, reduction=reduction, dtype=torch.float32)
    exact = F.cross_entropy(logits.double(), target, reduction=reduction)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=1e-6)


def test_autocast_gives_a_float32_loss():
    """Under autocast the loss has torch's dtype, and the gradient that of the logits."""
    logits, target = torch.randn(8, 5).bfloat16().requires_grad_(), torch.randint(0, 5, (8,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = cross_entropy(logits, target)
        expected = F.cross_entropy(logits, target)
    loss.backward()
    assert loss.dtype == expected.dtype == torch.float32
    assert logits.grad.dtype == torch.bfloat16
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.sanitized
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_smoothing_over_a_large_vocabulary(dtype):
    """The sum of 32,000 logits that smoothing takes is as accurate as that of ten."""
    generator = torch.Generator().manual_seed(1)
    logits = (torch.randn(5, 32000, generator=generator) * 3 + 50).to(dtype)
    target = torch.randint(0, 32000, (5,), generator=generator)
    assert_as_accurate_as_torch(logits, target, label_smoothing=0.2)


@pytest.mark.sanitized
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(7,), (5, 4), (17, 64), (9, 65), (3, 1030), (2, 5, 19), (2, 130, 3, 3)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_class_probabilities(dtype, shape, reduction):
    """Probabilities as targets, with weights and smoothing, are as accurate as torch's."""
    generator = torch.Generator().manual_seed(1)
    logits = (torch.randn(shape, generator=generator) * 3).to(dtype)
    target = torch.rand(shape, generator=generator).softmax(0 if len(shape) == 1 else 1).to(dtype)
    weight = torch.rand(shape[0] if len(shape) == 1 else shape[1], generator=generator).to(dtype)
    for options in ({}, {"label_smoothing": 0.2}):
        exact = loss_and_gradient(
            F.cross_entropy, logits.double(), target.double(), weight.double(), reduction=reduction, **options
        )
        torchs = loss_and_gradient(F.cross_entropy, logits, target, weight, reduction=reduction, **options)
        ours = loss_and_gradient(cross_entropy, logits, target, weight, reduction=reduction, **options)
        for own, other, truth in zip(ours, torchs, exact, strict=True):
            eps = max(torch.finfo(dtype).eps, 8 * torch.finfo(torch.float64).eps)
            allowed = (other - truth).abs().max() + truth.abs() * eps + 8 * min(eps, 1e-7) * (1 + truth.abs())
            assert ((own - truth).abs() <= allowed).all()


def test_no_classes():
    """Rows without classes, all ignored, lose nothing."""
    losses = cross_entropy(torch.randn(3, 0), torch.full((3,), -100), reduction="none")
    assert torch.equal(losses, torch.zeros(3))


@pytest.mark.sanitized
@pytest.mark.parametrize("shape", [(9,), (21, 10), (9, 70), (3, 1030), (2, 10, 5, 7), (2, 129, 3)])
@pytest.mark.parametrize("kind", ["index", "probability"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("extras", [{"z_loss": 0.1}, {"softcap": 3.0}, {"z_loss": 0.01, "softcap": 20.0}], ids=str)
def test_z_loss_and_softcap(shape, kind, reduction, extras):
    """Both extras follow their formulas, in every path, with everything else that is on."""
    torch.manual_seed(2)
    logits = torch.randn(shape, dtype=torch.float64) * 4
    batch = shape[:0] if len(shape) == 1 else (shape[0], *shape[2:])
    classes = shape[0] if len(shape) == 1 else shape[1]
    target = torch.randint(0, classes, batch)
    if kind == "probability":
        target = torch.rand(shape, dtype=torch.float64).softmax(0 if len(shape) == 1 else 1)
    elif target.dim():
        target.view(-1)[::4] = -100
    weight = torch.rand(classes, dtype=torch.float64)
    options = {"reduction": reduction, "label_smoothing": 0.1, **extras}

    def formula(z, t, w, reduction, label_smoothing, z_loss=0.0, softcap=None):
        u = z if softcap is None else softcap * torch.tanh(z / softcap)
        losses = F.cross_entropy(u, t, w, reduction="none", label_smoothing=label_smoothing)
        lse = u.logsumexp(0 if z.dim() == 1 else 1)
        counts = torch.ones_like(losses) if t.is_floating_point() else (t != -100).double()
        losses = losses + z_loss * lse**2 * counts
        divisor = counts.sum() if t.is_floating_point() else (w[t.clamp(min=0)] * counts).sum()
        return {"none": losses, "sum": losses.sum(), "mean": losses.sum() / divisor}[reduction]

    expected = loss_and_gradient(formula, logits, target, weight, **options)
    torch.testing.assert_close(loss_and_gradient(cross_entropy, logits, target, weight, **options), expected)
    torch.testing.assert_close(loss_and_gradient(cross_entropy_reference, logits, target, weight, **options), expected)


@pytest.mark.sanitized
@pytest.mark.parametrize("shape", [(6, 10), (6, 200), (2, 5, 3)])
def test_return_lse(shape):
    """The logsumexp of each row comes with the loss, in the accumulation dtype, 0 for ignored rows."""
    logits = torch.randn(shape, requires_grad=True)
    target = torch.zeros((shape[0], *shape[2:]), dtype=torch.long)
    target[0] = -100
    for function in (cross_entropy, cross_entropy_reference):
        loss, lse = function(logits, target, return_lse=True, softcap=2.0)
        expected = (2 * torch.tanh(logits / 2)).logsumexp(1).masked_fill(target == -100, 0)
        torch.testing.assert_close(lse, expected.detach())
        assert not lse.requires_grad
        torch.testing.assert_close(loss, cross_entropy(logits, target, softcap=2.0))
    assert cross_entropy(logits.bfloat16(), target, return_lse=True)[1].dtype == torch.float32


@pytest.mark.sanitized
@pytest.mark.parametrize("classes", [5, 128, 129])
@pytest.mark.parametrize("inner", [(1,), (15,), (16,), (17,), (5, 7)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_classes_in_the_middle(classes, inner, dtype):
    """(N, C, d1, ...) is read where it lies, at every edge of a tile, and its gradient is laid out like it."""
    torch.manual_seed(0)
    logits = torch.randn(3, classes, *inner).to(dtype)
    target = torch.randint(0, classes, (3, *inner))
    target.view(-1)[::5] = -100
    assert_as_accurate_as_torch(logits, target, label_smoothing=0.1)
    logits.requires_grad_()
    (gradient,) = torch.autograd.grad(cross_entropy(logits, target), logits)
    assert gradient.is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reference_agrees_with_kernel(dtype):
    """What stands in without a compiler has the signature and the values of the kernel."""
    logits, target = torch.randn(9, 12).to(dtype), torch.randint(0, 12, (9,), dtype=torch.int32)
    options = {"weight": torch.rand(12), "ignore_index": 2, "label_smoothing": 0.1, "dtype": torch.float32}
    torch.testing.assert_close(
        cross_entropy(logits, target, **options), cross_entropy_reference(logits, target, **options)
    )


def test_module_is_a_drop_in():
    """The module has torch's arguments, state dict and type."""
    weight = torch.rand(5)
    ours = CrossEntropyLoss(weight, ignore_index=1, reduction="sum", label_smoothing=0.1)
    torchs = torch.nn.CrossEntropyLoss(weight, ignore_index=1, reduction="sum", label_smoothing=0.1)
    logits, target = torch.randn(6, 5), torch.randint(0, 5, (6,))
    torch.testing.assert_close(ours(logits, target), torchs(logits, target))
    assert isinstance(ours, torch.nn.CrossEntropyLoss)
    torchs.load_state_dict(ours.state_dict())


@pytest.mark.parametrize("shape", [(4096, 10), (64, 5000)])
def test_bit_identical_across_threads_and_runs(shape):
    """The loss and its gradient do not depend on the number of threads."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(shape, generator=generator)
    target = torch.randint(0, shape[1], shape[:1], generator=generator)
    assert_same_with_any_threads(lambda: loss_and_gradient(cross_entropy, logits, target, label_smoothing=0.1))
