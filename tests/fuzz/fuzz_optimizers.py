"""Steps of the optimizers and of their native plans, with groups, state and gradients that were changed in some way."""

from __future__ import annotations

import random
from typing import Any

import torch
from fuzz_values import change_tensor, change_value, random_tensor
from torch import Tensor

from lightkit import native, optim

_DTYPES = (torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16)

_EXTRAS = {
    "max_grad_norm": [None, 0.5],
    "skip_nonfinite": [False, True],
    "ema_decay": [None, 0.9],
    "master_weights": [False, True],
    "stochastic_rounding": [False, False, True],
}


def _parameters(rng: random.Random) -> list[Tensor]:
    sizes = [(), (0,), (3,), (65,), (4, 5), (2, 3, 4, 4)]
    parameters = [
        torch.randn(rng.choice(sizes), dtype=rng.choice(_DTYPES), requires_grad=True)
        for _ in range(rng.randrange(1, 5))
    ]
    for parameter in parameters:
        if rng.random() < 0.8:
            parameter.grad = torch.randn_like(parameter)
    return parameters


def _optimizer(cls: type[torch.optim.Optimizer], rng: random.Random) -> torch.optim.Optimizer:
    options = {name: rng.choice(values) for name, values in _EXTRAS.items()}
    if options["master_weights"]:
        options["stochastic_rounding"] = False
    if cls is optim.SGD:
        options["momentum"] = rng.choice([0, 0.9])
    else:
        options["amsgrad"] = rng.random() < 0.5
    optimizer = cls(_parameters(rng), lr=rng.choice([0.1, torch.tensor(0.1)]), **options)
    for _ in range(rng.randrange(3)):
        optimizer.step()
    return optimizer


def _change(optimizer: torch.optim.Optimizer, rng: random.Random, short: bool) -> None:
    """Changes one thing that a step reads."""
    group = rng.choice(optimizer.param_groups)
    parameters = [p for p in group["params"] if isinstance(p, Tensor)]
    way = rng.randrange(7)
    if way == 0 and parameters:
        parameter = rng.choice(parameters)
        gradient = change_tensor(rng, torch.randn(parameter.shape, dtype=parameter.dtype), short=short)
        parameter.grad = gradient
    elif way == 1 and parameters:
        parameter = rng.choice(parameters)
        parameter.data = change_tensor(rng, parameter.detach(), parameters, short=short)
    elif way == 2 and optimizer.state:
        entry = rng.choice(list(optimizer.state.values()))
        if isinstance(entry, dict) and entry:
            name = rng.choice(list(entry))
            value = entry[name]
            changed = change_tensor(rng, value, short=short) if isinstance(value, Tensor) else change_value(rng, value)
            entry[name] = changed
    elif way == 3 and optimizer.state:
        optimizer.state[rng.choice(list(optimizer.state))] = rng.choice([{}, None, 1, [], {"step": 1}, {1: 2}])
    elif way == 4:
        name = rng.choice(list(group))
        if name != "params":
            group[name] = rng.choice([change_value(rng, group[name]), random_tensor(rng), "1", float("nan"), 10**30])
    elif way == 5:
        odd: list[Any] = [None, 1, "p", [], (), torch.nn.UninitializedParameter(), *parameters]
        group["params"] = rng.choice(
            [tuple(group["params"]), [*group["params"], rng.choice(odd)], [], iter(group["params"]), None]
        )
    elif rng.random() < 0.5:
        del group[rng.choice(list(group))]
    else:
        optimizer.add_param_group({"params": _parameters(rng)})


def optimizer_call(name: str, rng: random.Random) -> None:
    """Takes steps of an optimizer, some of whose tensors or options were changed in between."""
    optimizer = _optimizer(getattr(optim, name), rng)
    for _ in range(rng.randrange(3)):
        # torch's own step, which takes what the kernels do not, reads beyond a storage that is too short.
        _change(optimizer, rng, short=False)
        if rng.random() < 0.5:
            optimizer.step()
    optimizer.step()
    if rng.random() < 0.3:
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.step()


def plan_call(name: str, rng: random.Random) -> None:
    """Calls a native plan itself, with right arguments of which up to three were changed."""
    cls = optim.SGD if name.startswith("Sgd") else rng.choice([optim.Adam, optim.AdamW])
    optimizer = _optimizer(cls, rng)
    for _ in range(rng.randrange(3)):
        _change(optimizer, rng, short=True)
    arguments: list[Any] = [
        rng.choice([optimizer.param_groups, optimizer.param_groups, optimizer.param_groups * 2]),
        rng.choice([optimizer.state, dict(optimizer.state), {}]),
        rng.choice([None, 1.0]),
        rng.random() < 0.3,
        1.0,
        None,
        None,
    ]
    if rng.random() < 0.4:
        place = rng.randrange(len(arguments))
        arguments[place] = rng.choice([None, [], {}, [1], [{}], 1, float("nan"), torch.ones(()), "1", True])
    plan = getattr(native.load(), name)()
    for _ in range(2):
        plan.step(*arguments)
