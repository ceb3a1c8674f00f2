"""The memory of cross-entropy: gradients in place of the logits, and tensors of more elements than 32 bits count."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cross_entropy_losses import DTYPES, available_gib

from lightkit.ops import cross_entropy


@pytest.mark.slow
@pytest.mark.skipif(available_gib() < 14, reason="takes 9 GiB of memory, and some to spare")
def test_more_elements_than_32_bits_count():
    """Rows before, at and behind element 2^31 get the gradients that each gets alone."""
    rows, classes = 17_000, 130_000
    block = torch.randn(1000, classes, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    logits = block.repeat(17, 1).requires_grad_()
    target = torch.arange(rows) % classes
    assert logits.numel() > 2**31
    cross_entropy(logits, target, reduction="sum").backward()
    across = 2**31 // classes
    for row in (0, across - 1, across, across + 1, rows - 1):
        alone = block[row % 1000].double()[None].requires_grad_()
        F.cross_entropy(alone, target[row : row + 1]).backward()
        torch.testing.assert_close(logits.grad[row].double(), alone.grad[0], rtol=2**-8, atol=1e-9)


@pytest.mark.sanitized
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(9, 10), (5, 70), (3, 2050), (2, 6, 5), (2, 140, 3)])
def test_inplace(dtype, shape):
    """In place the same gradient comes out, in the memory of the logits."""
    base = torch.randn(shape).to(dtype).requires_grad_()
    target = torch.randint(0, shape[1], (shape[0], *shape[2:]))
    for reduction in ("mean", "none"):
        (expected,) = torch.autograd.grad(cross_entropy(base * 2, target, reduction=reduction).sum(), base)
        logits = base * 2
        memory = logits.data_ptr()
        loss = cross_entropy(logits, target, reduction=reduction, inplace=True)
        logits.register_hook(lambda g, memory=memory: pytest.fail("another memory") if g.data_ptr() != memory else None)
        (actual,) = torch.autograd.grad(loss.sum(), base)
        assert torch.equal(actual, expected)


def test_inplace_is_refused_where_it_is_unsafe():
    """A leaf, a view and a non-contiguous tensor keep their values; the error says why."""
    target = torch.zeros(4, dtype=torch.long)
    leaf = torch.randn(4, 4, requires_grad=True)
    kept = leaf.detach().clone()
    for logits, reason in ((leaf, "a leaf"), ((leaf * 1).view(4, 4), "a view"), ((leaf.t() * 1), "not contiguous")):
        with pytest.raises(ValueError, match=reason):
            cross_entropy(logits, target, inplace=True)
    assert torch.equal(leaf, kept)
    assert cross_entropy(leaf.detach(), target, inplace=True) == cross_entropy(leaf.detach(), target)


@pytest.mark.sanitized
def test_inplace_is_refused_while_others_hold_the_memory():
    """What else shows the logits keeps its values: an alias, NumPy's, or a result kept for backward; and once that is
    gone, the memory is taken."""
    base, target = torch.randn(4, 5, requires_grad=True), torch.zeros(4, dtype=torch.long)
    for hold in (torch.Tensor.detach, lambda z: z.detach().numpy(), lambda z: z.detach()[1:, 2:]):
        logits = base * 1
        held = hold(logits)
        with pytest.raises(ValueError, match="something else holds the memory"):
            cross_entropy(logits, target, inplace=True)
        assert torch.equal(logits, base)
        del held
        assert cross_entropy(logits, target, inplace=True) == cross_entropy(base, target)
        assert not torch.equal(logits, base)
    for function in (torch.exp, torch.tanh, torch.relu, torch.sigmoid):
        with pytest.raises(ValueError, match="keeps its result for backward"):
            cross_entropy(function(base), target, inplace=True)


@pytest.mark.parametrize(
    "model",
    [
        torch.nn.Linear(5, 4),
        torch.nn.Linear(5, 4, bias=False),
        torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4)),
        torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.BatchNorm1d(4)),
        torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.LayerNorm(4), torch.nn.Dropout(0.5)),
    ],
    ids=lambda model: (
        "-".join(type(layer).__name__ for layer in model.children()) or f"Linear-{model.bias is not None}"
    ),
)
@pytest.mark.parametrize("way", ["plain", "checkpoint", "autocast", "retained", "hooked"])
def test_inplace_takes_what_models_give(model, way):
    """Logits as models, checkpointing, autocast, hooks and retain_grad hand them over are nobody else's."""
    inputs, target = torch.randn(6, 5), torch.tensor([0, 3, 1, 2, 2, 0])
    seen = []
    handle = model.register_forward_hook(lambda module, given, result: seen.append(result)) if way == "hooked" else None
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=way == "autocast"):
        logits = (
            torch.utils.checkpoint.checkpoint(model, inputs, use_reentrant=False)
            if way == "checkpoint"
            else model(inputs)
        )
        if way == "retained":
            logits.retain_grad()
        # As a metric looks at them, and lets go.
        assert logits.detach().argmax(1).shape == target.shape
        loss = cross_entropy(logits, target, inplace=True)
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    if handle is not None:
        handle.remove()


def test_inplace_misuse_is_noticed():
    """Autograd raises if the logits were needed by somebody else; a second derivative says what is missing."""
    base, target = torch.randn(4, 5, requires_grad=True), torch.zeros(4, dtype=torch.long)
    logits = base * 1
    other = logits.square().sum()
    loss = cross_entropy(logits, target, inplace=True) + other
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    loss = cross_entropy(base * 1, target, inplace=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, base, create_graph=True)


@pytest.mark.sanitized
def test_large_gradients_reuse_memory_safely():
    """A gradient that is still in use never shares its memory with the next one."""
    logits, target = torch.randn(1024, 512, requires_grad=True), torch.randint(0, 512, (1024,))
    gradients = [torch.autograd.grad(cross_entropy(logits * k, target), logits)[0] for k in (1, 2, 3, 4)]
    for k, gradient in zip((1, 2, 3, 4), gradients, strict=True):
        (expected,) = torch.autograd.grad(F.cross_entropy(logits * k, target), logits)
        torch.testing.assert_close(gradient, expected)
    leaf = torch.autograd.grad(cross_entropy(logits, target), logits)[0]
    pointer, kept = leaf.data_ptr(), leaf.clone()
    del leaf
    again = torch.autograd.grad(cross_entropy(logits, target), logits)[0]
    assert again.data_ptr() == pointer
    assert torch.equal(again, kept)


@pytest.mark.slow
def test_more_than_2_to_the_31_elements():
    """Offsets are 64 bits wide."""
    rows, classes = 2**16 + 1, 2**15
    logits = torch.zeros(rows, classes, dtype=torch.bfloat16)
    logits[-1, -1] = 10
    target = torch.full((rows,), classes - 1)
    losses = cross_entropy(logits, target, reduction="none", dtype=torch.float32)
    exact = F.cross_entropy(logits[-1].double(), target[-1])
    torch.testing.assert_close(losses[-1].double(), exact, rtol=1e-6, atol=1e-6)
