"""Cross-entropy under autograd, functional transforms and torch.compile, and as a distributed tensor."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cross_entropy_losses import loss_and_gradient
from torch._dynamo.testing import AotEagerAndRecordGraphs

from lightkit.ops import cross_entropy


@pytest.mark.parametrize("classes", [4, 70])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.2}, {"ignore_index": 1}, {"z_loss": 0.1, "softcap": 2.0}], ids=str
)
@pytest.mark.parametrize("probabilities", [False, True])
def test_gradcheck_and_gradgradcheck(classes, reduction, options, probabilities):
    """First and second derivatives agree with finite differences."""
    torch.manual_seed(0)
    logits = torch.randn(5, classes, dtype=torch.float64, requires_grad=True)
    target, weight = torch.tensor([0, 1, 2, 3, 1]), torch.rand(classes, dtype=torch.float64)
    if probabilities:
        target = torch.rand(5, classes, dtype=torch.float64).softmax(1)
        # Which is for indices.
        options = {name: value for name, value in options.items() if name != "ignore_index"}

    def function(z):
        return cross_entropy(z, target, weight, reduction=reduction, **options)

    # A little slack in the second: finite differences of a gradient are themselves inexact.
    assert torch.autograd.gradcheck(function, (logits,))
    assert torch.autograd.gradgradcheck(function, (logits,), atol=1e-4)


@pytest.mark.parametrize("shape", [(6, 5), (6, 90), (2, 5, 3), (5,)])
@pytest.mark.parametrize("upstream", [1.0, 3.0, 0.0])
def test_upstream_gradient(shape, upstream):
    """Whatever comes from above is multiplied in once, where it is 1 and where it is not."""
    logits = torch.randn(shape, dtype=torch.float64)
    target = torch.randint(0, 3, shape[:0] if len(shape) == 1 else (shape[0], *shape[2:]))
    for reduction in ("mean", "none"):
        scaled = [
            loss_and_gradient(lambda *a, f=f, **o: f(*a, **o) * upstream, logits, target, reduction=reduction)[1]
            for f in (cross_entropy, F.cross_entropy)
        ]
        torch.testing.assert_close(*scaled)


def test_backward_twice():
    """With retain_graph the second backward equals the first; without, it is refused in torch's words."""
    logits, target = torch.randn(4, 6, requires_grad=True), torch.randint(0, 6, (4,))
    loss = cross_entropy(logits, target) * 2
    (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
    first = first.clone()
    (second,) = torch.autograd.grad(loss, logits, retain_graph=True)
    assert torch.equal(first, second)

    loss = cross_entropy(logits, target)
    loss.backward()
    with pytest.raises(RuntimeError, match="a second time"):
        loss.backward()


def test_gradients_accumulate_without_sharing_memory():
    """The gradient that backward gives away belongs to its leaf alone."""
    logits, target = torch.randn(4, 6, requires_grad=True), torch.randint(0, 6, (4,))
    cross_entropy(logits, target).backward()
    once = logits.grad.clone()
    kept = logits.grad
    cross_entropy(logits, target).backward()
    assert kept is logits.grad
    torch.testing.assert_close(logits.grad, 2 * once)


def test_logits_may_change_between_forward_and_backward():
    """The first derivative needs the logits no more, as in torch."""
    base, target = torch.randn(4, 6, requires_grad=True), torch.randint(0, 6, (4,))
    logits = base * 1
    loss = cross_entropy(logits, target)
    expected = torch.autograd.grad(F.cross_entropy(base, target), base)[0]
    logits.detach().zero_()
    torch.testing.assert_close(torch.autograd.grad(loss, base)[0], expected)


@pytest.mark.parametrize("classes", [10, 70])
@pytest.mark.parametrize("reduction", [0, 1])
def test_opcheck(classes, reduction):
    """Schema, fake tensors, autograd registration and AOT tracing are in order."""
    for requires_grad in (False, True):
        logits = torch.randn(6, classes, requires_grad=requires_grad)
        target = torch.randint(0, classes, (6,))
        arguments = (logits, target, torch.rand(classes), reduction, -100, 0.1, 0.1, 5.0, None, True)
        torch.library.opcheck(torch.ops.lightkit.cross_entropy.default, arguments)
    for with_gradient in (False, True):
        arguments = (logits.detach(), target, None, reduction, -100, 0.0, 0.0, 0.0, None, with_gradient, False)
        torch.library.opcheck(torch.ops.lightkit._cross_entropy_forward.default, arguments)


@pytest.mark.slow
def test_compile_fullgraph():
    """torch.compile's own back end takes the loss in without a graph break, forward and backward."""
    shape = (2, 5, 3, 3)
    target = torch.randint(0, 5, (2, 3, 3))

    def function(z, t, weight):
        return cross_entropy(z * 2, t, weight, label_smoothing=0.1) * 3

    logits = torch.randn(shape)
    compiled = torch.compile(function, fullgraph=True)
    torch.testing.assert_close(loss_and_gradient(compiled, logits, target), loss_and_gradient(function, logits, target))


def test_compiled_graphs_have_the_op():
    """What torch.compile makes of the loss calls the kernel, not the reference's operations."""
    torch._dynamo.reset()
    recorder = AotEagerAndRecordGraphs()
    compiled = torch.compile(lambda z, t: cross_entropy(z, t), fullgraph=True, backend=recorder)
    compiled(torch.randn(4, 10, requires_grad=True), torch.randint(0, 10, (4,))).backward()
    assert "lightkit._cross_entropy_forward" in recorder.fw_graphs[0].code
    assert "log_softmax" not in recorder.fw_graphs[0].code


def test_functional_transforms():
    """vmap and grad of torch.func work, through the reference."""
    logits, target = torch.randn(3, 4, 5, dtype=torch.float64), torch.randint(0, 5, (3, 4))
    batched = torch.func.vmap(cross_entropy)(logits, target)
    torch.testing.assert_close(batched, torch.stack([cross_entropy(z, t) for z, t in zip(logits, target, strict=True)]))
    gradient = torch.func.grad(lambda z: cross_entropy(z, target[0]))(logits[0])
    torch.testing.assert_close(gradient, loss_and_gradient(cross_entropy, logits[0], target[0])[1])


def test_gradient_of_weights():
    """Weights that need a gradient get torch's, or torch's refusal."""
    logits, target = torch.randn(5, 4), torch.rand(5, 4).softmax(1)
    weight = torch.rand(4, requires_grad=True)
    (ours,) = torch.autograd.grad(cross_entropy(logits, target, weight), weight)
    (torchs,) = torch.autograd.grad(F.cross_entropy(logits, target, weight), weight)
    torch.testing.assert_close(ours, torchs)


def test_forward_mode():
    """The directional derivative comes through, by way of the reference."""
    logits, tangent, target = torch.randn(3, 4), torch.randn(3, 4), torch.tensor([0, 1, 2])
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(logits, tangent)
        ours = torch.autograd.forward_ad.unpack_dual(cross_entropy(dual, target)).tangent
        torchs = torch.autograd.forward_ad.unpack_dual(F.cross_entropy(dual, target)).tangent
    torch.testing.assert_close(ours, torchs)


def test_small_target_types_in_second_derivatives():
    """ignore_index is compared as the number it is, not as what a uint8 makes of it."""
    logits = torch.randn(2, 200, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([156, 3], dtype=torch.uint8)
    (once,) = torch.autograd.grad(cross_entropy(logits, target), logits)
    (twice,) = torch.autograd.grad(cross_entropy(logits, target), logits, create_graph=True)
    torch.testing.assert_close(once, twice)


def test_meta_tensors():
    """Shapes can be had without memory."""
    logits = torch.randn(3, 4, device="meta")
    target = torch.zeros(3, dtype=torch.long, device="meta")
    assert cross_entropy(logits, target, reduction="none").shape == (3,)


def test_gradient_of_probabilities():
    """Targets that need a gradient themselves get it, as from torch."""
    logits, target = torch.randn(5, 4), torch.rand(5, 4).softmax(1).requires_grad_()
    (ours,) = torch.autograd.grad(cross_entropy(logits, target), target)
    (torchs,) = torch.autograd.grad(F.cross_entropy(logits, target), target)
    torch.testing.assert_close(ours, torchs)


@pytest.fixture
def device_mesh(tmp_path):
    """A mesh of this process alone."""
    distributed = pytest.importorskip("torch.distributed")
    if not distributed.is_available() or not distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield distributed.device_mesh.init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_distributed_tensors(device_mesh, reduction):
    """Logits and labels that are DTensors, split by rows, get torch's loss and a gradient split like them."""
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    logits, target = torch.randn(6, 5), torch.tensor([0, 4, -100, 2, 1, 3])
    expected = loss_and_gradient(F.cross_entropy, logits, target, reduction=reduction)
    shards = distribute_tensor(logits, device_mesh, [Shard(0)]).requires_grad_()
    loss = cross_entropy(shards, distribute_tensor(target, device_mesh, [Shard(0)]), reduction=reduction)
    assert isinstance(loss, DTensor)
    loss.backward()
    assert shards.grad.placements == (Shard(0),)
    actual = loss.full_tensor().detach().double(), shards.grad.full_tensor().double()
    torch.testing.assert_close(actual, expected)
