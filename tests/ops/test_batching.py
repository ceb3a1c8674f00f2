"""Every op under torch.func and batched gradients, against torch's own operations."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import functional

import lightkit.ops as ops
from lightkit import native
from lightkit.native.batching import _OPS
from lightkit.nn import FusedSequential
from lightkit.ops import ChainLayer


def numbers(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


TARGET = torch.tensor([0, 1, 2, 4])
IMAGES, KERNEL, HEAD = numbers(2, 2, 6, 6), numbers(4, 2, 3, 3, seed=1), numbers(3, 16, seed=2)


def chain(images, kernel, head):
    return ops.layer_chain(images, [ChainLayer(kernel, None, (0, 0), True, True), ChainLayer(head, None, relu=False)])


def plain_chain(images, kernel, head):
    return F.linear(F.max_pool2d(F.relu(F.conv2d(images, kernel)), 2).flatten(1), head)


NET = FusedSequential(
    nn.Conv2d(2, 4, 3, bias=False), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 3, bias=False)
).double()


def module(images, kernel, head):
    return torch.func.functional_call(NET, {"0.weight": kernel, "4.weight": head}, (images,))


# Of each: the function of lightkit, that of torch, and what both are differentiated with respect to.
CASES = {
    **{
        f"cross_entropy {reduction}": (
            lambda x, r=reduction: ops.cross_entropy(x, TARGET, reduction=r),
            lambda x, r=reduction: F.cross_entropy(x, TARGET, reduction=r),
            (numbers(4, 5),),
        )
        for reduction in ("none", "mean")
    },
    **{
        f"linear_cross_entropy {reduction}": (
            lambda h, w, r=reduction: ops.linear_cross_entropy(h, w, TARGET, reduction=r),
            lambda h, w, r=reduction: F.cross_entropy(F.linear(h, w), TARGET, reduction=r),
            (numbers(4, 3), numbers(5, 3, seed=1)),
        )
        for reduction in ("none", "mean")
    },
    "conv_relu_pool": (
        lambda x, w: ops.conv_relu_pool(x, w),
        lambda x, w: F.max_pool2d(F.relu(F.conv2d(x, w)), 2),
        (IMAGES, KERNEL),
    ),
    "layer_chain": (chain, plain_chain, (IMAGES, KERNEL, HEAD)),
    "dropout": (
        lambda x, y: ops.dropout(x * y, 0.4, seed=1),
        lambda x, y: x * y * ops.dropout_mask(x.shape[-2:], 0.4, 1, torch.float64),
        (numbers(4, 5), numbers(4, 5, seed=1)),
    ),
    "norm_act": (
        lambda x, w: ops.norm_act(x, w, training=True, activation="relu", pool=True),
        lambda x, w: F.max_pool2d(F.relu(F.batch_norm(x, None, None, w, training=True)), 2),
        (IMAGES, numbers(2, seed=1)),
    ),
    "conv2d": (
        lambda x, w, b: ops.conv2d(x, w, b, 2, 1),
        lambda x, w, b: F.conv2d(x, w, b, 2, 1),
        (IMAGES, KERNEL, numbers(4, seed=3)),
    ),
    "FusedSequential": (module, plain_chain, (IMAGES, KERNEL, HEAD)),
}


def first(function, inputs):
    """A function of the first input alone."""
    return lambda x: function(x, *inputs[1:])


def batched_gradients(function, inputs, **options):
    inputs = [x.clone().requires_grad_() for x in inputs]
    output = function(*inputs)
    upstream = numbers(3, *output.shape, seed=5)
    return torch.autograd.grad(output, inputs, upstream, is_grads_batched=True, **options)


def per_sample(function, inputs):
    def loss(x):
        return function(x, *inputs[1:]).square().sum()

    return torch.func.vmap(torch.func.grad(loss))(torch.stack([inputs[0], inputs[0] + 1]))


WAYS = {
    "is_grads_batched": batched_gradients,
    "is_grads_batched, kept": lambda f, i: batched_gradients(f, i, retain_graph=True),
    "is_grads_batched, create_graph": lambda f, i: batched_gradients(f, i, create_graph=True),
    "jacobian": lambda f, i: functional.jacobian(f, i, vectorize=True),
    "jacobian, create_graph": lambda f, i: functional.jacobian(f, i, vectorize=True, create_graph=True),
    "hessian": lambda f, i: functional.hessian(lambda *a: f(*a).square().sum(), i, vectorize=True),
    "jacrev": lambda f, i: torch.func.jacrev(f, tuple(range(len(i))))(*i),
    "jacfwd": lambda f, i: torch.func.jacfwd(f)(*i),
    "func.hessian": lambda f, i: torch.func.hessian(lambda x: first(f, i)(x).sum())(i[0]),
    "vmap": lambda f, i: torch.func.vmap(first(f, i))(torch.stack([i[0], i[0] + 1])),
    "vmap of the last": lambda f, i: torch.func.vmap(lambda x: f(*i[:-1], x), 1)(torch.stack([i[-1], i[-1] + 1], 1)),
    "per-sample gradients": per_sample,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CASES)
def test_transforms(case, way):
    """What torch's transforms make of an op is what they make of torch's operations."""
    own, plain, inputs = CASES[case]
    torch.testing.assert_close(WAYS[way](own, inputs), WAYS[way](plain, inputs))


INT8_CHAIN = ops.Int8Chain(
    [ops.Int8Layer(torch.ones(4, 2, 3, 3).to(torch.int8), torch.arange(4).int(), torch.full((4,), 0.5), pool=True)],
    0.1,
    9,
)

CALLS = {
    "cross_entropy": (numbers(4, 5), TARGET, None, 1, -100, 0.1, 0.0, 0.0, None, True, False),
    "_cross_entropy_forward": (numbers(4, 5), TARGET, None, 0, -100, 0.0, 0.0, 0.0, None, True, True),
    "linear_cross_entropy": (numbers(4, 3), numbers(5, 3), TARGET, None, None, 1, -100, 0.0, 0.0, 0.0, None, 1 << 20),
    "_linear_cross_entropy_forward": (
        *(numbers(4, 3), numbers(5, 3), TARGET, None, None, 1, -100, 0.0, 0.0, 0.0, None, 1 << 20),
        *(True, True, False),
    ),
    "layer_chain": (IMAGES, [KERNEL, HEAD], [None, None], [0, 0, 1, 1, 0, 0, 0, 0]),
    "dropout": (numbers(4, 5), torch.tensor(3), 0.4),
    "_norm_act_backward": (
        *(numbers(2, 2, 3, 3), IMAGES, numbers(2, seed=1), numbers(2, 2, seed=2)),
        *(torch.randint(0, 5, (18, 2)).byte(), None, None, True, 1, 0.0, 0.0, 1, True, True, True),
    ),
    "conv2d": (IMAGES, KERNEL, None, [2, 2], [1, 1], [1, 1], 1, True),
    "_conv2d_backward": (numbers(2, 4, 3, 3), IMAGES, KERNEL, [2, 2], [1, 1], [1, 1], 1, [True, True, False]),
    "int8_chain": (IMAGES.float(), INT8_CHAIN._packed, INT8_CHAIN._plan, 0.1),
    "_layer_chain_forward": (IMAGES, [KERNEL, HEAD], [None, None], [0, 0, 1, 1, 0, 0, 0, 0], True),
}


def test_every_op_has_a_rule():
    """A new op gets one, too, unless it writes to an argument."""
    assert native.available()
    found = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("lightkit::")}
    in_place = {name for name in found if getattr(torch.ops.lightkit, name).default._schema.is_mutable}
    # It calls layer_chain, whose rule it takes.
    assert found - in_place - {"conv_relu_pool"} == set(_OPS)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("size", [2, 1, 0])
def test_ops_themselves(name, size):
    """An op that is called within vmap gives what it gives for each element."""
    op, (x, *others) = getattr(torch.ops.lightkit, name).default, CALLS[name]
    batch = torch.stack([x + index for index in range(size)]) if size else x.new_zeros(0, *x.shape)
    found = torch.func.vmap(lambda x: op(x, *others))(batch)
    found = [found] if isinstance(found, torch.Tensor) else found
    for index in range(size):
        expected = op(batch[index], *others)
        for mine, their in zip(found, [expected] if len(found) == 1 else expected, strict=True):
            torch.testing.assert_close(mine[index], their)
    assert all(len(each) == size for each in found)
