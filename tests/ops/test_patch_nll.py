"""The negative log-likelihood of a log-softmax as one cross-entropy: torch's loss and gradients for every program."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lightkit
from lightkit.ops import _thresholds, patch_nll, patch_nll_loss

FUNCTION, CODE = F.nll_loss, F.nll_loss.__code__


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Lets the kernel take small calls, and checks that the patch ends."""
    monkeypatch.setattr(_thresholds, "MIN_NLL_LOSS", 0)
    yield
    assert FUNCTION.__code__ is CODE


@pytest.fixture
def calls(monkeypatch):
    """The losses that lightkit computed."""
    seen = []
    nll_loss = patch_nll._nll_loss

    def recorded(*arguments):
        loss = nll_loss(*arguments)
        if loss is not NotImplemented:
            seen.append(arguments)
        return loss

    monkeypatch.setattr(patch_nll, "_nll_loss", recorded)
    return seen


def logits_of(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).mul(3).to(dtype).requires_grad_()


TARGET = torch.tensor([0, 1, 4, -100, 2, 3])


@pytest.mark.parametrize(
    "loss",
    [
        lambda z, t: F.nll_loss(F.log_softmax(z, 1), t),
        lambda z, t: F.nll_loss(torch.log_softmax(z, -1), t),
        lambda z, t: F.nll_loss(input=z.log_softmax(1), target=t),
        lambda z, t: nn.NLLLoss()(nn.LogSoftmax(1)(z), t),
        lambda z, t: F.nll_loss((z * 2).log_softmax(1), t, ignore_index=2),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_way_to_write_it(loss, dtype, calls):
    """Functions, methods and modules run on the kernel with torch's loss and gradient, inside of the context alone."""
    z, target = logits_of(6, 5, dtype=dtype), TARGET.clamp(min=0)
    expected = loss(z, target)
    with patch_nll_loss():
        found = loss(z, target)
    assert len(calls) == 1
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, z), torch.autograd.grad(expected, z))
    loss(z, target)
    assert len(calls) == 1


@pytest.mark.parametrize("weight", [None, torch.tensor([1.0, 2.0, 0.5, 0.0, 3.0])])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("shape", [(6, 5), (5,), (2, 5, 3), (2, 5, 3, 1)], ids=str)
def test_options_and_shapes(shape, reduction, weight, calls):
    """Weights, ignored rows, reductions and further dimensions mean what they mean to torch, observed or not."""
    target = TARGET[1] if len(shape) == 1 else TARGET.view(*shape[:1], *shape[2:])
    results = []
    for observed in (False, True):
        for context in (torch.enable_grad(), patch_nll_loss()):
            z = logits_of(*shape)
            with context:
                y = z.log_softmax(1 if len(shape) > 1 else 0)
                if observed:
                    y.retain_grad()
                loss = F.nll_loss(y, target, weight, reduction=reduction)
                loss.backward(torch.linspace(1, 2, loss.numel()).view(loss.shape))
            results.append((loss.detach(), z.grad, y.grad if observed else None))
    assert len(calls) == 2
    torch.testing.assert_close(results[1], results[0])
    torch.testing.assert_close(results[3], results[2])


def observe_nothing(y):
    pass


def observe_hook(y):
    y.register_hook(lambda gradient: gradient * 2)


def observe_node(y):
    y.grad_fn.register_prehook(lambda gradients: tuple(g * 3 for g in gradients))


def observe_after_node(y):
    y.grad_fn.register_hook(lambda inputs, outputs: tuple(g * 3 for g in inputs))


@pytest.mark.parametrize("observe", [observe_nothing, observe_hook, observe_node, observe_after_node])
@pytest.mark.parametrize("when", ["before", "after"])
def test_who_observes_the_log_probabilities(observe, when, calls):
    """Hooks of the tensor and of its node see and change the gradient, whenever they are registered before backward."""
    found = []
    for context in (torch.enable_grad(), patch_nll_loss()):
        z = logits_of(6, 5)
        with context:
            y = F.log_softmax(z, 1)
            if when == "before":
                observe(y)
            loss = F.nll_loss(y, TARGET)
            if when == "after":
                observe(y)
            # The log-probabilities take part in the graph in other ways, too.
            (loss + y.exp().square().sum()).backward()
        found.append(z.grad)
    assert len(calls) == 1
    torch.testing.assert_close(found[1], found[0])


def test_gradient_with_respect_to_the_log_probabilities():
    """torch.autograd.grad finds them, alone and beside the logits, and backward with ``inputs`` does."""
    results = []
    for context in (torch.enable_grad(), patch_nll_loss()):
        z = logits_of(6, 5)
        with context:
            y = F.log_softmax(z * 2, 1)
            loss = F.nll_loss(y, TARGET)
        first = torch.autograd.grad(loss, [y, z], retain_graph=True)
        second = torch.autograd.grad(loss, y, retain_graph=True, create_graph=True)
        loss.backward(inputs=[z], retain_graph=True)
        results.append((*first, *second, z.grad, *torch.autograd.grad(loss, z)))
    torch.testing.assert_close(results[1], results[0])


def test_derivatives():
    """First and second derivatives are right, for batches of upstream gradients as well."""
    z = logits_of(4, 5, dtype=torch.float64)
    target, weight = torch.tensor([0, 3, -100, 2]), torch.rand(5, dtype=torch.float64)

    def loss(z):
        return F.nll_loss(z.log_softmax(1), target, weight, reduction="none")

    with patch_nll_loss():
        torch.autograd.gradcheck(loss, z, check_batched_grad=True)
        torch.autograd.gradgradcheck(loss, z)


def test_log_probabilities_that_were_changed(calls):
    """A change in place, another dimension, a detached or a plain tensor, and a view of them are torch's."""
    z = logits_of(6, 6)

    def changed():
        y = F.log_softmax(z, 1)
        with torch.no_grad():
            y.mul_(2)
        return F.nll_loss(y, TARGET).detach()

    cases = [
        changed,
        lambda: F.nll_loss(F.log_softmax(z, 1).mul_(2), TARGET),
        lambda: F.nll_loss(F.log_softmax(z, 0), TARGET),
        lambda: F.nll_loss(F.log_softmax(z, 1).view(6, 6), TARGET),
        lambda: F.nll_loss(F.log_softmax(z, 1).detach(), TARGET),
        lambda: F.nll_loss(z, TARGET),
        lambda: F.nll_loss(F.log_softmax(z, 1), TARGET, reduce=False),
        lambda: F.nll_loss(F.log_softmax(z.bfloat16(), 1), TARGET),
    ]
    for case in cases:
        expected = case()
        with patch_nll_loss():
            torch.testing.assert_close(case(), expected, rtol=0, atol=0)
    with patch_nll_loss(), torch.no_grad():
        F.nll_loss(F.log_softmax(z, 1), TARGET)
    with patch_nll_loss(), torch.autocast("cpu", torch.bfloat16):
        F.nll_loss(F.log_softmax(z, 1), TARGET)
    assert calls == []


def test_transforms_and_tracers_see_torch(calls):
    """torch.func, a trace and a compiler get torch's function."""
    z = logits_of(6, 5)

    def loss(z):
        return F.nll_loss(F.log_softmax(z, 1), TARGET)

    for case in (
        lambda: torch.func.grad(loss)(z),
        lambda: torch.func.jvp(loss, (z.detach(),), (torch.ones(6, 5),)),
        lambda: torch.jit.trace(loss, z.detach(), check_trace=False)(z),
        lambda: torch.compile(loss, backend="aot_eager", fullgraph=True)(z),
    ):
        expected = case()
        with patch_nll_loss():
            torch.testing.assert_close(case(), expected)
    assert calls == []


def test_a_small_loss_is_torchs(calls, monkeypatch):
    """Below the limit torch is as fast."""
    monkeypatch.undo()
    z = logits_of(64, 10)
    with patch_nll_loss():
        loss = F.nll_loss(F.log_softmax(z, 1), torch.zeros(64, dtype=torch.int64))
    assert loss.grad_fn.name() == "NllLossBackward0"


@pytest.mark.parametrize(
    ("target", "options", "error"),
    [
        (TARGET + 4, {}, IndexError),
        (TARGET[:4], {}, ValueError),
        (TARGET.float(), {}, RuntimeError),
        (TARGET, {"reduction": "median"}, ValueError),
        (TARGET, {"weight": torch.ones(4)}, (RuntimeError, ValueError)),
        (TARGET, {"weight": torch.ones(5, requires_grad=True)}, RuntimeError),
        (None, {}, (TypeError, AttributeError)),
    ],
)
def test_wrong_arguments(target, options, error):
    """A wrong call raises an error of torch's class."""
    z = logits_of(6, 5)
    with pytest.raises(error):
        F.nll_loss(F.log_softmax(z, 1), target, **options)
    with patch_nll_loss(), pytest.raises(error):
        F.nll_loss(F.log_softmax(z, 1), target, **options)


def test_backward_twice_and_freed_graphs():
    """A kept graph gives the same gradient twice, and a freed one raises torch's error."""
    z = logits_of(6, 5)
    with patch_nll_loss():
        loss = F.nll_loss(F.log_softmax(z, 1), TARGET)
    first, second = (torch.autograd.grad(loss, z, retain_graph=True)[0] for _ in range(2))
    torch.testing.assert_close(first, second)
    torch.autograd.grad(loss, z)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, z)


def test_accuracy():
    """The gradient is at most twice as far from float64 as torch's, for confident predictions, too."""
    for scale in (1, 30):
        z = logits_of(64, 100).detach().mul(scale).requires_grad_()
        target = torch.randint(0, 100, (64,), generator=torch.Generator().manual_seed(1))

        def both(z, target=target):
            loss = F.nll_loss(F.log_softmax(z, 1), target)
            return loss.detach().double(), torch.autograd.grad(loss, z)[0].double()

        exact, torchs = both(z.detach().double().requires_grad_()), both(z)
        with patch_nll_loss():
            ours = both(z)
        for truth, theirs, own in zip(exact, torchs, ours, strict=True):
            assert (own - truth).abs().max() <= 2 * (theirs - truth).abs().max() + 1e-7 * truth.abs().max()


def test_somebody_elses_function_is_left_alone(monkeypatch):
    """Where another library has put its own function there, that is said."""
    monkeypatch.setattr(F, "nll_loss", lightkit.ops.cross_entropy)
    with pytest.raises(RuntimeError, match=r"it has been replaced by lightkit\.ops\.cross_entropy"), patch_nll_loss():
        pass
