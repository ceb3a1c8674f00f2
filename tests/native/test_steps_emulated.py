"""The CUDA kernels of the optimizers, run on a CPU by the emulation in ``cuda_emulation``, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightkit.optim import SGD

# One worker builds the emulator, for a minute.
pytestmark = [pytest.mark.slow, pytest.mark.group("emulator")]

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
STATES = {"sgd": ["momentum"], "adam": ["mean", "square", "largest"]}

# Sizes at the edge of a pack, a block and a chunk; and more tensors than go into one launch.
SIZES = [0, 1, 3, 4, 5, 7, 8, 9, 255, 257, 2047, 2048, 2049, 4099, 70001]

OPTIONS = {
    "sgd": {"lr": 0.1, "momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0, "nesterov": 0, "maximize": 0},
    "adam": {
        **{"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "eps": 1e-3, "weight_decay": 0.0},
        **{"decoupled": 0, "amsgrad": 0, "maximize": 0},
    },
}


class Problem:
    """Some tensors, and what a step makes of them."""

    def __init__(self, algorithm: str, **options) -> None:
        self.algorithm = algorithm
        self.options = {**OPTIONS[algorithm], **options}
        self.buffers: dict[str, Tensor] = {}
        self.settings = {"tensors": 0, **self.options}
        self.offsets: dict[str, int] = {}
        self._generator = torch.Generator().manual_seed(0)

    def randn(self, size: int) -> Tensor:
        return torch.randn(size, generator=self._generator)

    def states(self) -> list[str]:
        if self.algorithm == "sgd":
            return ["momentum"] if self.options["momentum"] else []
        return STATES["adam"][: 3 if self.options["amsgrad"] else 2]

    def add(self, dtype, size, *, moved=False, first=False, master=False, average=False, **settings) -> int:
        i = self.settings["tensors"]
        self.settings["tensors"] += 1
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        made = {"parameter": self.randn(size).to(dtype), "gradient": self.randn(size).to(dtype)}
        for name in self.states():
            made[name] = self.randn(size).abs().to(wide if self.algorithm == "adam" or master else dtype)
            if first:
                # Never written, and never to be read.
                made[name].fill_(torch.nan)
        if master:
            # Some of what the parameter is the rounding of, some that others have written over.
            made["master"] = made["parameter"].float() * (1 + torch.finfo(dtype).eps / 8)
            made["master"][::3] += 1
        if average:
            made["average"] = self.randn(size).to(wide)
        self.buffers |= {f"{name}{i}": value for name, value in made.items()}
        self.offsets |= {f"{name}{i}": 8 if moved and name != "gradient" else 0 for name in made}
        numbers = {"numel": size, "type": DTYPES.index(dtype), "first": int(first), "count": 3, **settings}
        self.settings |= {f"{name}{i}": value for name, value in numbers.items()}
        return i

    def run(self, emulator) -> dict[str, Tensor]:
        """Takes the step; returns what there was before it."""
        before = {name: tensor.clone() for name, tensor in self.buffers.items()}
        assert emulator.call(self.algorithm, self.buffers, self.settings, offsets=self.offsets)[0] == 0
        return before

    def exact(self, before: dict[str, Tensor], i: int, factor: float = 1.0, **options) -> dict[str, Tensor]:
        """The step of tensor ``i`` in float64, without rounding of the parameter."""
        o = {**self.options, **options}
        p, g = before[f"parameter{i}"], before[f"gradient{i}"].double() * (-factor if o["maximize"] else factor)
        if f"master{i}" in before:
            master = before[f"master{i}"]
            value = torch.where(master.to(p.dtype) == p, master.double(), p.double())
        else:
            value = p.double()
        states = {name: before[f"{name}{i}"].double() for name in self.states()}
        first = bool(self.settings[f"first{i}"])
        rule = _sgd if self.algorithm == "sgd" else _adam
        return rule(value, g, states, first, self.settings[f"count{i}"], o)

    def check(self, before: dict[str, Tensor], i: int, exact: dict[str, Tensor]) -> None:
        dtype = before[f"parameter{i}"].dtype
        for name, true in exact.items():
            own = self.buffers[f"{name}{i}"]
            # Of values of about one, and what the accumulator's roundings add to them.
            eps = 4 * torch.finfo(own.dtype).eps if own.dtype == dtype else 16 * torch.finfo(torch.float32).eps
            eps = max(eps, 64 * torch.finfo(torch.float64).eps)
            torch.testing.assert_close(own.double(), true, rtol=eps, atol=eps, msg=lambda m, n=name: f"{n}: {m}")
        assert torch.equal(self.buffers[f"gradient{i}"], before[f"gradient{i}"])


def _sgd(p, g, states, first, count, o):
    g = g + o["weight_decay"] * p
    if "momentum" not in states:
        return {"parameter": p - o["lr"] * g}
    m = g if first else o["momentum"] * states["momentum"] + (1 - o["dampening"]) * g
    return {"parameter": p - o["lr"] * (g + o["momentum"] * m if o["nesterov"] else m), "momentum": m}


def _adam(p, g, states, first, count, o):
    if o["decoupled"]:
        p = p * (1 - o["lr"] * o["weight_decay"])
    else:
        g = g + o["weight_decay"] * p
    states = {name: torch.zeros_like(p) if first else value for name, value in states.items()}
    m = o["beta1"] * states["mean"] + (1 - o["beta1"]) * g
    v = o["beta2"] * states["square"] + (1 - o["beta2"]) * g * g
    found = {"mean": m, "square": v}
    if o["amsgrad"]:
        found["largest"] = v = torch.maximum(states["largest"], v)
    step = o["lr"] / (1 - o["beta1"] ** count) * m / (v.sqrt() / (1 - o["beta2"] ** count) ** 0.5 + o["eps"])
    return {"parameter": p - step, **found}


@pytest.mark.parametrize(
    ("algorithm", "options"),
    [
        ("sgd", {}),
        ("sgd", {"momentum": 0.9}),
        ("sgd", {"momentum": 0.9, "weight_decay": 0.01, "nesterov": 1}),
        ("sgd", {"momentum": 0.9, "dampening": 0.5, "maximize": 1, "weight_decay": 0.01}),
        ("adam", {}),
        ("adam", {"weight_decay": 0.1, "amsgrad": 1}),
        ("adam", {"weight_decay": 0.1, "decoupled": 1, "maximize": 1}),
    ],
    ids=str,
)
@pytest.mark.parametrize("first", [True, False])
def test_steps(emulator, algorithm, options, first):
    """Many tensors of all types in one call, misaligned ones too, with options on and off."""
    problem = Problem(algorithm, **options)
    for dtype in DTYPES:
        for size in SIZES:
            problem.add(dtype, size, moved=size % 3 == 1, first=first)
    for _ in range(100):
        problem.add(torch.float32, 5, first=first)
    before = problem.run(emulator)
    for i in range(problem.settings["tensors"]):
        problem.check(before, i, problem.exact(before, i))


@pytest.mark.parametrize("algorithm", ["sgd", "adam"])
@pytest.mark.parametrize("first", [True, False])
def test_master_weights_and_averages(emulator, algorithm, first):
    """The value is the master weight's, unless others have written the parameter; it is what is averaged."""
    options = {"momentum": 0.9} if algorithm == "sgd" else {"amsgrad": 1}
    problem = Problem(algorithm, **options, ema_decay=0.75)
    for dtype in DTYPES:
        for size in (0, 1, 9, 2049):
            for moved in (False, True):
                half = dtype in (torch.bfloat16, torch.float16)
                extras = {"master": half, "average": size != 9, "first_average": int(first)}
                problem.add(dtype, size, moved=moved, first=first, **extras)
    before = problem.run(emulator)
    for i in range(problem.settings["tensors"]):
        exact = problem.exact(before, i)
        average = before.get(f"average{i}")
        if f"master{i}" in before:
            exact["master"] = exact["parameter"]
            own = problem.buffers[f"parameter{i}"]
            assert torch.equal(own, problem.buffers[f"master{i}"].to(own.dtype))
        if average is not None:
            value = exact["parameter"]
            exact["average"] = value if first else average.double() + 0.25 * (value - average.double())
        problem.check(before, i, exact)


def test_the_average_of_half_precision_is_of_what_is_stored(emulator):
    """Without a master weight the parameter as it was rounded is averaged."""
    problem = Problem("sgd", ema_decay=0.5)
    problem.add(torch.bfloat16, 1000, average=True)
    before = problem.run(emulator)
    expected = (before["average0"].double() + problem.buffers["parameter0"].double()) / 2
    torch.testing.assert_close(problem.buffers["average0"].double(), expected, rtol=1e-6, atol=1e-6)


def test_random_rounding_is_that_of_the_cpu(emulator):
    """The same key rounds the same elements up, but for a value that is another one in its last bit."""
    problem = Problem("sgd")
    problem.add(torch.bfloat16, 5001, stochastic=1, key=0)
    parameter = nn.Parameter(problem.buffers["parameter0"].clone())
    parameter.grad = problem.buffers["gradient0"].clone()
    problem.run(emulator)
    SGD([parameter], lr=0.1, stochastic_rounding=True, rounding_seed=0).step()
    assert (problem.buffers["parameter0"] != parameter).float().mean() < 0.002
    plain = Problem("sgd")
    plain.add(torch.bfloat16, 5001)
    plain.run(emulator)
    assert (plain.buffers["parameter0"] != parameter).float().mean() > 0.2


@pytest.mark.parametrize("algorithm", ["sgd", "adam"])
@pytest.mark.parametrize("skip", [0.0, 1.0, None])
def test_numbers_on_the_device(emulator, algorithm, skip):
    """Learning rate, loss scale, norm and counts are read where they lie; a step that overflowed changes nothing."""
    problem = Problem(algorithm, lr=77.0, weight_decay=0.1, **({"momentum": 0.9} if algorithm == "sgd" else {}))
    for _ in range(2):
        problem.add(torch.float32, 70, count=77 if algorithm == "sgd" else 5)
    problem.buffers |= {"lr_on_device": torch.tensor([0.25]), "scale_on_device": torch.tensor([8.0])}
    problem.buffers["norm_on_device"] = torch.tensor([4.0], dtype=torch.float64)
    problem.settings["max_norm"] = 1.0
    if algorithm == "adam":
        problem.buffers |= {f"count_on_device{i}": torch.tensor([4.0]) for i in (0, 1)}
    if skip is not None:
        problem.buffers["skip_on_device"] = torch.tensor([skip])
    before = problem.run(emulator)
    for i in (0, 1):
        if skip:
            assert all(torch.equal(problem.buffers[name], value) for name, value in before.items())
            continue
        problem.check(before, i, problem.exact(before, i, factor=1 / 8 / (4 + 1e-6), lr=0.25))
        if algorithm == "adam":
            assert problem.buffers[f"count_on_device{i}"].item() == 5


@pytest.mark.parametrize("norm", [torch.nan, torch.inf, 0.5])
def test_clipping_at_the_edges(emulator, norm):
    """A small norm changes nothing, an infinite one leaves nothing of the gradient, NaN comes through."""
    problem = Problem("sgd")
    problem.add(torch.float32, 70)
    problem.buffers["norm_on_device"] = torch.tensor([norm], dtype=torch.float64)
    problem.settings["max_norm"] = 1.0
    before = problem.run(emulator)
    if norm != norm:
        assert problem.buffers["parameter0"].isnan().all()
    else:
        problem.check(before, 0, problem.exact(before, 0, factor=0.0 if norm == torch.inf else 1.0))


@pytest.mark.parametrize("scale", [None, 8.0])
def test_norm(emulator, scale):
    """The norm of all gradients of all types, at the edges of runs, misaligned, and more than one launch takes."""
    generator = torch.Generator().manual_seed(0)
    sizes = [0, 1, 3, 8, 9, 16383, 16384, 16385, 40001]
    cases = [(dtype, size) for dtype in DTYPES for size in sizes] + [(torch.float32, 5)] * 150
    buffers, offsets, settings = {}, {}, {"tensors": len(cases), "factor": 0.5}
    for i, (dtype, size) in enumerate(cases):
        buffers[f"gradient{i}"] = torch.randn(size, generator=generator).to(dtype)
        offsets[f"gradient{i}"] = 8 if i % 2 else 0
        settings |= {f"numel{i}": size, f"type{i}": DTYPES.index(dtype)}
    buffers["norm"] = torch.full((1,), torch.nan, dtype=torch.float64)
    if scale is not None:
        buffers["scale_on_device"] = torch.tensor([scale])
    assert emulator.call("norm", buffers, settings, offsets=offsets)[0] == 0
    exact = torch.cat([buffers[f"gradient{i}"].double() for i in range(len(cases))]).norm() * 0.5 / (scale or 1)
    torch.testing.assert_close(buffers["norm"][0], exact, rtol=1e-12, atol=0)
