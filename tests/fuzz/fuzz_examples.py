"""Right calls of the public functions, small and random, from which the fuzz takes right arguments of every op.

An example returns what it called the function with, by the names that the ops' schemas give to these things. What it
returns under further names is for ops that are not reached while a mode watches. A new op needs an example that leads
to it: the tests say so.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch

from lightkit import ops

_DTYPES = (torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16)
_POOLS = (None, "max", "mean")
_REDUCTIONS = ("none", "mean", "sum")


def _options(rng: random.Random) -> dict[str, Any]:
    return {
        "label_smoothing": rng.choice([0.0, 0.1, 1.0]),
        "z_loss": rng.choice([0.0, 0.01]),
        "softcap": rng.choice([0.0, 5.0]),
        "dtype": rng.choice([None, torch.float32]),
    }


def _indices(rng: random.Random, classes: int, *sizes: int) -> torch.Tensor:
    target = torch.randint(0, classes, sizes)
    if rng.random() < 0.3:
        target[torch.rand(sizes) < 0.3] = -100
    return target.to(rng.choice([torch.int64, torch.int64, torch.int32]))


def cross_entropy(rng: random.Random) -> dict[str, Any]:
    """Cross-entropy of narrow, wide and strided logits, with indices or probabilities."""
    dtype, classes = rng.choice(_DTYPES), rng.choice([1, 3, 10, 65, 130, 1030])
    sizes = rng.choice([(5,), (0,), (33,), (2, 3), (2, 4, 5)])
    logits = torch.randn(sizes[0], classes, *sizes[1:], dtype=dtype, requires_grad=True)
    if rng.random() < 0.25:
        target = torch.softmax(torch.randn_like(logits, dtype=torch.float32), 1).to(dtype)
    else:
        target = _indices(rng, classes, *sizes)
    given = {"target": target, "weight": torch.rand(classes) if rng.random() < 0.3 else None, **_options(rng)}
    loss = ops.cross_entropy(logits, reduction=rng.choice(_REDUCTIONS), **given)
    loss.sum().backward()
    upstream = torch.rand(rng.choice([(), (logits.shape[0], *[1] * (logits.dim() - 1))]), dtype=dtype)
    return {"logits": logits, "upstream": upstream, "return_lse": True, "inplace": rng.random() < 0.3, **given}


def linear_cross_entropy(rng: random.Random) -> dict[str, Any]:
    """Cross-entropy of a linear layer, with little memory or enough of it."""
    dtype = rng.choice(_DTYPES)
    rows, features, classes = rng.choice([0, 1, 5, 40, 150]), rng.choice([1, 4, 33]), rng.choice([1, 3, 70, 1100])
    given = {
        "linear_weight": torch.randn(classes, features, dtype=dtype, requires_grad=True),
        "target": _indices(rng, classes, rows),
        "linear_bias": torch.randn(classes, dtype=dtype, requires_grad=True) if rng.random() < 0.5 else None,
        "weight": torch.rand(classes) if rng.random() < 0.3 else None,
        "memory_limit": rng.choice([1, 100_000, 1 << 26]),
        **_options(rng),
    }
    hidden = torch.randn(rows, features, dtype=dtype, requires_grad=True)
    loss = ops.linear_cross_entropy(hidden, reduction=rng.choice(_REDUCTIONS), **given)
    loss.sum().backward()
    return {"hidden": hidden, **given}


def conv_relu_pool(rng: random.Random) -> dict[str, Any]:
    """One convolution."""
    dtype = rng.choice(_DTYPES)
    channels, out_channels, kernel = rng.choice([1, 2, 16, 17]), rng.choice([1, 5, 16, 32]), rng.choice([1, 3])
    input = torch.randn(rng.choice([0, 1, 3]), channels, rng.choice([6, 9]), 7, dtype=dtype, requires_grad=True)
    weight = torch.randn(out_channels, channels, kernel, kernel, dtype=dtype, requires_grad=True)
    given = {
        "bias": torch.randn(out_channels, dtype=dtype, requires_grad=True) if rng.random() < 0.5 else None,
        "padding": [rng.randrange(3), rng.randrange(3)],
        "pool": rng.random() < 0.5,
    }
    ops.conv_relu_pool(input, weight, given["bias"], tuple(given["padding"]), given["pool"]).sum().backward()
    return {"input": input, "weight": weight, **given}


def layer_chain(rng: random.Random) -> dict[str, Any]:
    """Up to two convolutions and up to two linear layers."""
    dtype = rng.choice(_DTYPES)
    convolutions, linear = rng.choice([(0, 1), (0, 2), (1, 0), (1, 1), (2, 1), (2, 2)])
    channels, size = rng.choice([1, 3, 16]), 8
    sizes = (channels, size, size) if convolutions else (channels * size,)
    input = torch.randn(rng.choice([0, 1, 4]), *sizes, dtype=dtype, requires_grad=True)
    layers, values = [], channels * size * (size if convolutions else 1)

    def parameters(out: int, *taps: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        bias = torch.randn(out, dtype=dtype, requires_grad=True) if rng.random() < 0.5 else None
        return torch.randn(out, *taps, dtype=dtype, requires_grad=True), bias

    for _ in range(convolutions):
        out, kernel, pool = rng.choice([2, 16, 20]), rng.choice([1, 3]), rng.random() < 0.5
        padding = (kernel // 2, kernel // 2)
        relu = rng.random() < 0.5
        scale = rng.choice([0.0, 0.05]) if relu else 0.0
        layers.append(ops.ChainLayer(*parameters(out, channels, kernel, kernel), padding, relu, pool, scale))
        channels, size = out, size // (2 if pool else 1)
        values = channels * size * size
    for _ in range(linear):
        out = rng.choice([1, 4, 16])
        relu = rng.random() < 0.5
        scale = rng.choice([0.0, 0.05]) if relu else 0.0
        layers.append(ops.ChainLayer(*parameters(out, values), relu=relu, output_scale=scale))
        values = out
    ops.layer_chain(input, layers).sum().backward()
    return {"input": input}


def dropout(rng: random.Random) -> dict[str, Any]:
    """Dropout of dense and strided tensors."""
    input = torch.randn(rng.choice([(), (0,), (5, 70), (2, 3, 4, 5)]), dtype=rng.choice(_DTYPES), requires_grad=True)
    x = input.transpose(0, -1) if input.dim() > 1 and rng.random() < 0.5 else input
    given = {"p": rng.choice([0.1, 0.5, 1.0]), "seed": torch.tensor(rng.randrange(1 << 40))}
    ops.dropout(x, **given).sum().backward()
    return {"input": x, "order": rng.choice([None, list(range(input.dim()))]), **given}


def norm_act(rng: random.Random) -> dict[str, Any]:
    """Normalizations of images and vectors, with and without all that follows."""
    dtype, channels, training = (
        rng.choice([torch.float32, torch.float64]),
        rng.choice([1, 3, 16, 21]),
        rng.random() < 0.6,
    )
    shape = rng.choice([(4, channels), (2, channels, 5, 4), (3, channels, 2, 2)])

    def perhaps(*sizes: int) -> torch.Tensor | None:
        return torch.rand(*sizes, dtype=dtype) if rng.random() < 0.5 else None

    running = torch.rand(2, channels, dtype=dtype)
    given = {
        "weight": perhaps(channels),
        "bias": perhaps(channels),
        "running_mean": running[0],
        "running_var": running[1],
        "residual": perhaps(*shape),
        "training": training,
        "momentum": rng.choice([0.0, 0.1]),
        "eps": 1e-5,
        "statistics": perhaps(2, channels) if training else None,
    }
    input = torch.randn(shape, dtype=dtype, requires_grad=True)
    name = rng.choice([None, *ops.ACTIVATIONS])
    activation = None if name is None else ops.Activation(name, rng.choice([0.1, 1.0]), 2.0)
    pool = rng.choice(_POOLS if len(shape) == 4 else _POOLS[:1])
    ops.norm_act(input, activation=activation, pool=pool, **given).sum().backward()
    codes = {"activation": activation.code, "alpha": activation.alpha, "beta": 2.0} if activation else {"activation": 0}
    wanted = {name: rng.random() < 0.8 for name in ("input_wanted", "affine_wanted", "residual_wanted")}
    codes["pool"] = _POOLS.index(pool)
    return {"input": input, "keep": True, "alpha": 0.0, "beta": 0.0, **given, **codes, **wanted}


def conv2d(rng: random.Random) -> dict[str, Any]:
    """One convolution with any stride, padding, dilation and groups."""
    dtype, groups = rng.choice([torch.float32, torch.float64]), rng.choice([1, 1, 2, 4])
    channels, out_channels = groups * rng.choice([1, 3, 16]), groups * rng.choice([1, 5, 16, 32])
    kernel = rng.choice([1, 2, 3, 3])
    input = torch.randn(rng.choice([0, 1, 3]), channels, rng.choice([6, 9]), 7, dtype=dtype, requires_grad=True)
    weight = torch.randn(out_channels, channels // groups, kernel, kernel, dtype=dtype, requires_grad=True)
    given = {
        "bias": torch.randn(out_channels, dtype=dtype, requires_grad=True) if rng.random() < 0.5 else None,
        "stride": (rng.randint(1, 3), rng.randint(1, 3)),
        "padding": (rng.randrange(3), rng.randrange(3)),
        "dilation": (rng.randint(1, 2), rng.randint(1, 2)),
        "groups": groups,
        "statistics": True,
    }
    output, _ = ops.conv2d(input, weight, **given)
    output.sum().backward()
    return {"input": input, "weight": weight, **given}


def int8_chain(rng: random.Random) -> dict[str, Any]:
    """One or two 8-bit convolutions and perhaps a linear layer."""
    channels, size = rng.choice([1, 3, 8]), rng.choice([6, 9])
    input = torch.randn(rng.choice([0, 1, 3, 6]), channels, size, size)
    layers = []

    def parameters(out: int, *taps: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        weight = torch.randint(-127, 128, (out, *taps), dtype=torch.int8)
        return weight, torch.randint(-500, 500, (out,), dtype=torch.int32), torch.rand(out) / 1000 + 1e-6

    def settings() -> dict[str, Any]:
        return {"relu": rng.random() < 0.5, "output_zero_point": rng.randrange(256)}

    for _ in range(rng.choice([1, 2])):
        groups = channels if rng.random() < 0.2 else 1
        out, kernel, pool = groups * rng.choice([1, 5, 17]), rng.choice([1, 3]), rng.random() < 0.4
        window = {"padding": (kernel // 2, kernel // 2), "groups": groups, "pool": pool}
        layers.append(ops.Int8Layer(*parameters(out, channels // groups, kernel, kernel), **window, **settings()))
        channels, size = out, size // (2 if pool else 1)
    if rng.random() < 0.5:
        layers.append(ops.Int8Layer(*parameters(rng.choice([1, 20]), channels * size * size), **settings()))
    chain = ops.Int8Chain(layers, rng.choice([0.01, 1.0]), rng.randrange(256))
    chain(input)
    values = {name: [getattr(item, name[:-1]) for item in layers] for name in ("weights", "multipliers")}
    return {"biases": [item.bias for item in layers], "input": input, **values}


def fake_quantize_weights(rng: random.Random) -> dict[str, Any]:
    """Weights of any shape, rounded to a few bits."""
    shapes = [rng.choice([(4,), (3, 5), (2, 17, 3, 3), (0, 4), (70, 1)]) for _ in range(rng.randint(1, 3))]
    given = {"weights": [torch.randn(shape) for shape in shapes], "bits": rng.choice([8, 4, 3, 2])}
    outputs = [torch.empty_like(weight) for weight in given["weights"]]
    ops.fake_quantize_weights(given["weights"], outputs, given["bits"])
    return {"outputs": outputs, **given}


EXAMPLES: tuple[Callable[[random.Random], dict[str, Any]], ...] = (
    cross_entropy,
    linear_cross_entropy,
    conv_relu_pool,
    layer_chain,
    dropout,
    norm_act,
    conv2d,
    int8_chain,
    fake_quantize_weights,
)
