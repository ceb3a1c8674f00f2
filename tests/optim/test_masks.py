"""Masks of optimizers: masked entries are zero to the bit after a step in a plain loop, whatever steps them."""

from __future__ import annotations

import copy

import pytest
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import nn

from lightkit.optim import SGD, Adam, AdamW, convert, masks_of, set_masks


def model(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)


def step(net, optimizer, steps=3):
    for _ in range(steps):
        optimizer.zero_grad()
        net(torch.ones(2, 7, dtype=net[0].weight.dtype)).float().square().sum().backward()
        optimizer.step()


def masks_for(net):
    generator = torch.Generator().manual_seed(1)
    return {p: torch.rand(p.shape, generator=generator) < 0.5 for p in (net[0].weight, net[2].weight)}


def is_zero(values):
    """True for positive zeros alone: a sign would take a bit in a zipped file."""
    return bool((values.float().view(torch.int32) == 0).all())


OPTIMIZERS = {
    "SGD": lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "Adam with averages": lambda p: Adam(p, lr=0.01, ema_decay=0.9),
    "AdamW with clipping": lambda p: AdamW(p, lr=0.01, max_grad_norm=0.1, skip_nonfinite=True),
    "torch's Adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "torch's RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9),
    "torch's Rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_zero_after_each_step(make):
    """Momentum from before does not move a masked weight, and the others are stepped as without masks of theirs."""
    net = model()
    optimizer = make(net.parameters())
    step(net, optimizer)
    masks = masks_for(net)
    set_masks(optimizer, masks)
    for steps in (0, 1, 1):
        before = net[0].weight.detach().clone()
        step(net, optimizer, steps)
        for p, mask in masks.items():
            assert is_zero(p[~mask])
            average = optimizer.state[p].get("average")
            assert average is None or (is_zero(average[~mask]) and bool((average[mask] != 0).all()))
        assert torch.equal(before, net[0].weight) == (steps == 0)
    assert bool((net[0].weight[masks[net[0].weight]] != 0).all())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"master_weights": True, "ema_decay": 0.9}])
def test_dtypes(dtype, options):
    """Masters and averages of every dtype are masked."""
    net = model(dtype)
    optimizer = SGD(net.parameters(), lr=0.1, momentum=0.9, **options)
    masks = masks_for(net)
    set_masks(optimizer, masks)
    step(net, optimizer)
    for p, mask in masks.items():
        tensors = [
            p,
            *(optimizer.state[p][name] for name in ("master_weight", "average") if name in optimizer.state[p]),
        ]
        assert all(is_zero(x[~mask]) and bool((x[mask] != 0).any()) for x in tensors)


def test_unmasked_weights_are_those_of_a_product():
    """The weights are those of torch's step with a multiplication after it, to the bit of the kernel's own step."""
    net, other = model(), model()
    first, second = (Adam(m.parameters(), lr=0.01) for m in (net, other))
    masks = masks_for(net)
    set_masks(first, masks)
    factors = [mask.float() for mask in masks.values()]
    with torch.no_grad():
        for p, factor in zip((other[0].weight, other[2].weight), factors, strict=True):
            p.mul_(factor)
    for _ in range(4):
        step(net, first, 1)
        step(other, second, 1)
        with torch.no_grad():
            for p, factor in zip((other[0].weight, other[2].weight), factors, strict=True):
                p.mul_(factor)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), other.parameters(), strict=True))


def test_a_diverged_weight_is_zero_again():
    """A mask is no factor of 0: an infinite masked weight becomes 0, and not NaN."""
    net = model()
    optimizer = SGD(net.parameters(), lr=0.1)
    masks = masks_for(net)
    set_masks(optimizer, masks)
    with torch.no_grad():
        net[0].weight[~masks[net[0].weight]] = torch.inf
    net[0].weight.grad = torch.ones_like(net[0].weight)
    optimizer.step()
    assert is_zero(net[0].weight[~masks[net[0].weight]])


def test_converted_optimizer():
    """An optimizer on lightkit's kernels keeps its masks, also after the end of the conversion, and its own hooks."""
    net = model()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    revert = convert(optimizer)
    masks = masks_for(net)
    set_masks(optimizer, masks)
    step(net, optimizer)
    assert all(is_zero(p[~mask]) for p, mask in masks.items())
    revert()
    step(net, optimizer)
    assert all(is_zero(p[~mask]) for p, mask in masks.items())


@pytest.mark.parametrize("make", [OPTIMIZERS["SGD"], OPTIMIZERS["torch's Adam"]])
def test_lightnings_wrapper(make):
    """Masks that a LightningModule sets by ``self.optimizers()`` are those of the optimizer that the trainer steps."""
    net = model()
    optimizer, masks = make(net.parameters()), masks_for(net)
    wrapper = LightningOptimizer(optimizer)
    set_masks(wrapper, masks)
    step(net, optimizer)
    assert all(is_zero(p[~mask]) for p, mask in masks.items())
    assert masks_of(wrapper) is masks_of(optimizer) and masks_of(optimizer).keys() == masks.keys()


def test_hooks_see_zeros():
    """A hook of the user after the step sees the masked weights."""
    net, seen = model(), []
    optimizer = Adam(net.parameters(), lr=0.01)
    masks = masks_for(net)
    set_masks(optimizer, masks)
    optimizer.register_step_post_hook(lambda *_: seen.append(is_zero(net[0].weight[~masks[net[0].weight]])))
    step(net, optimizer, 2)
    assert seen == [True, True]


@pytest.mark.parametrize("make", [OPTIMIZERS["SGD"], OPTIMIZERS["torch's Adam"]])
def test_removed_and_replaced(make):
    """New masks replace the old ones, and an empty mapping frees all weights."""
    net = model()
    optimizer = make(net.parameters())
    set_masks(optimizer, masks_for(net))
    first = net[0].weight
    set_masks(optimizer, {first: torch.ones_like(first, dtype=torch.bool)})
    assert list(masks_of(optimizer)) == [first]
    step(net, optimizer)
    assert bool((first != 0).all()) and bool((net[2].weight != 0).all())
    set_masks(optimizer, {})
    assert masks_of(optimizer) == {} and not optimizer._optimizer_step_post_hooks


def test_moved_and_reshaped():
    """A mask follows a parameter that gets another dtype or another shape."""
    net = model()
    optimizer = SGD(net.parameters(), lr=0.1)
    set_masks(optimizer, masks_for(net))
    step(net, optimizer)
    net.to(torch.float64)
    step(net, optimizer)
    p = net[0].weight
    assert is_zero(p[~masks_of(optimizer)[p]])
    masks_of(optimizer)[p] = masks_of(optimizer)[p][:4]
    p.data, net[0].bias.data, net[2].weight.data = p.data[:4], net[0].bias.data[:4], net[2].weight.data[:, :4]
    masks_of(optimizer)[net[2].weight] = masks_of(optimizer)[net[2].weight][:, :4]
    step(net, optimizer)
    assert is_zero(p[~masks_of(optimizer)[p]]) and bool((p[masks_of(optimizer)[p]] != 0).all())


def test_not_part_of_a_copy():
    """A copied or dropped optimizer keeps nothing alive."""
    net = model()
    optimizer = SGD(net.parameters(), lr=0.1)
    set_masks(optimizer, masks_for(net))
    assert masks_of(copy.deepcopy(optimizer)) == {}
    assert "masks" not in str(optimizer.state_dict())


def test_wrong_masks():
    """A wrong mask is named before anything changes."""
    net = model()
    optimizer = SGD(net.parameters(), lr=0.1)
    weight, before = net[0].weight, net[0].weight.detach().clone()
    with pytest.raises(ValueError, match=r"tensor of shape \(2,\) that the optimizer does not step"):
        set_masks(optimizer, {torch.ones(2): torch.ones(2, dtype=torch.bool)})
    with pytest.raises(ValueError, match=r"must be bool of shape \(5, 7\), got torch.float32 of shape \(5, 7\)"):
        set_masks(optimizer, {weight: torch.zeros(5, 7)})
    with pytest.raises(ValueError, match=r"must be bool of shape \(5, 7\), got torch.bool of shape \(7,\)"):
        set_masks(optimizer, {weight: torch.zeros(7, dtype=torch.bool)})
    number = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    with pytest.raises(ValueError, match="must have real numbers"):
        set_masks(torch.optim.SGD([number], lr=0.1), {number: torch.ones(2, dtype=torch.bool)})
    assert torch.equal(weight, before)
