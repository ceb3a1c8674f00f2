"""Options of lightkit.optim.SGD that torch's lacks: clipping, skipping, averages, master weights, random rounding."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.threads import assert_same_with_any_threads
from torch import nn

from lightkit.optim import SGD, Adam
from lightkit.optim.reference import sgd_rule, step_reference

# Around the SIMD widths, the blocks of the kernel (256, 512) and the runs that its sums are made of (16384).
SIZES = [0, 1, 7, 8, 9, 15, 16, 17, 63, 64, 65, 255, 256, 257, 511, 513, 16383, 16384, 16385, 40000]
HALF = [torch.bfloat16, torch.float16]
DTYPES = [torch.float32, torch.float64, *HALF]


def make_parameters(sizes=SIZES, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(n, generator=generator, dtype=torch.float64).to(dtype)) for n in sizes]


def set_gradients(parameters, step, scale=1.0):
    generator = torch.Generator().manual_seed(1000 + step)
    for p in parameters:
        p.grad = (torch.randn(p.shape, generator=generator, dtype=torch.float64) * scale).to(p.dtype)


def train(parameters, steps=4, **options):
    optimizer = SGD(parameters, **options)
    for step in range(steps):
        set_gradients(parameters, step)
        optimizer.step()
    return optimizer


def train_in_float64(parameters, steps=4, max_grad_norm=None, ema_decay=None, **options):
    """Returns the same training in float64 by torch's SGD and separate passes, with the averages."""
    exact = [nn.Parameter(p.detach().double().clone()) for p in parameters]
    optimizer = torch.optim.SGD(exact, foreach=False, **options)
    averages = None
    for step in range(steps):
        set_gradients(parameters, step)
        for p, q in zip(parameters, exact, strict=True):
            q.grad = p.grad.double()
        if max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(exact, max_grad_norm)
        optimizer.step()
        if averages is None:
            averages = [q.detach().clone() for q in exact]
        elif ema_decay is not None:
            averages = [a * ema_decay + (1 - ema_decay) * q.detach() for a, q in zip(averages, exact, strict=True)]
    return exact, averages


def assert_close(own, exact, dtype, factor=8.0):
    for a, b in zip(own, exact, strict=True):
        tolerance = factor * torch.finfo(dtype).eps
        torch.testing.assert_close(a.detach().double(), b.detach().double(), rtol=tolerance, atol=tolerance)


@pytest.mark.sanitized
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("max_grad_norm", [0.5, 1e6])
def test_clipping_is_that_of_torch(dtype, max_grad_norm):
    """The norm and the clipped step are torch's, and gradients keep their values."""
    parameters = make_parameters(dtype=dtype)
    options = {"lr": 0.1, "momentum": 0.9, "max_grad_norm": max_grad_norm}
    exact, _ = train_in_float64(parameters, **options)
    optimizer = train(parameters, **options)
    assert_close(parameters, exact, dtype)
    gradients = [p.grad for p in parameters]
    before = copy.deepcopy(gradients)
    optimizer.step()
    expected = math.sqrt(sum(float(g.double().square().sum()) for g in before))
    assert optimizer.grad_norm == pytest.approx(expected, rel=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(gradients, before, strict=True))


def test_clipping_of_huge_gradients():
    """Squares beyond float32 do not make the norm infinite, with which every update would be 0."""
    parameter = nn.Parameter(torch.zeros(4))
    optimizer = SGD([parameter], lr=1.0, max_grad_norm=1.0)
    parameter.grad = torch.full((4,), 1e30)
    optimizer.step()
    torch.testing.assert_close(parameter.detach(), torch.full((4,), -0.5))


def test_norm_does_not_depend_on_threads():
    """Clipped steps are bit-identical whatever the number of threads."""

    def compute():
        parameters = make_parameters([100_003, 5, 70_000])
        norm = train(parameters, lr=0.1, max_grad_norm=1.0, ema_decay=0.9).grad_norm
        return [torch.tensor(norm, dtype=torch.float64), *(p.detach() for p in parameters)]

    assert_same_with_any_threads(compute)


@pytest.mark.sanitized
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("place", [(0, 0), (3, 16384), (3, 16400)])
def test_steps_with_nonfinite_gradients_are_skipped_and_counted(bad, dtype, place):
    """One NaN or infinite element leaves parameters and state unchanged, at the first step and later."""
    parameters = make_parameters([3, 0, 20, 16401], dtype)
    optimizer = SGD(parameters, lr=0.1, momentum=0.9, ema_decay=0.5, skip_nonfinite=True)
    for step in range(4):
        set_gradients(parameters, step)
        before = copy.deepcopy((parameters, optimizer.state_dict()["state"]))
        if step in (0, 2):
            parameters[place[0]].grad[place[1]] = bad
        optimizer.step()
        if step in (0, 2):
            assert all(torch.equal(a, b) for a, b in zip(parameters, before[0], strict=True))
            torch.testing.assert_close(optimizer.state_dict()["state"], before[1], rtol=0, atol=0)
    assert optimizer.skipped_steps == 2
    assert all(p.isfinite().all() for p in parameters)


@pytest.mark.sanitized
@pytest.mark.parametrize("dtype", DTYPES)
def test_averages_follow_the_formula(dtype):
    """average = decay * average + (1 - decay) * parameter, from the first step on, in float32 or better."""
    parameters = make_parameters(dtype=dtype)
    _, averages = train_in_float64(parameters, lr=0.1, momentum=0.9, nesterov=True, ema_decay=0.75)
    optimizer = train(parameters, lr=0.1, momentum=0.9, nesterov=True, ema_decay=0.75)
    own = [optimizer.state[p]["average"] for p in parameters]
    assert {a.dtype for a in own} == {torch.float64 if dtype == torch.float64 else torch.float32}
    assert_close(own, averages, dtype)


def test_averaged_parameters_come_and_go():
    """The context has the averages, and restores the parameters also after an error and a write."""
    parameters = make_parameters([5, 6])
    optimizer = train(parameters, lr=0.1, ema_decay=0.5)
    own = copy.deepcopy(parameters)
    with pytest.raises(KeyboardInterrupt), optimizer.averaged_parameters():
        assert all(torch.equal(p, optimizer.state[p]["average"]) for p in parameters)
        parameters[0].data.fill_(7)
        raise KeyboardInterrupt
    assert all(torch.equal(a, b) for a, b in zip(parameters, own, strict=True))


@pytest.mark.sanitized
@pytest.mark.parametrize("dtype", HALF)
def test_master_weights_train_as_in_float32(dtype):
    """Updates far below the rounding of a half-precision parameter add up; the parameter is the rounded copy."""
    parameters = make_parameters(dtype=dtype)
    options = {"lr": 1e-4, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True}
    exact, _ = train_in_float64(parameters, steps=50, **options)
    optimizer = train(parameters, steps=50, master_weights=True, **options)
    masters = [optimizer.state[p]["master_weight"] for p in parameters]
    assert_close(masters, exact, torch.float32, factor=32)
    assert all(torch.equal(p, m.to(dtype)) for p, m in zip(parameters, masters, strict=True))
    assert all(optimizer.state[p]["momentum_buffer"].dtype == torch.float32 for p in parameters)


def test_master_weights_follow_what_others_write():
    """The next step starts from a weight that was loaded between two steps."""
    parameter = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = SGD([parameter], lr=0.5, master_weights=True)
    parameter.grad = torch.ones(3, dtype=torch.bfloat16)
    optimizer.step()
    with torch.no_grad():
        parameter.copy_(torch.full((3,), 8.0))
    optimizer.step()
    assert torch.equal(parameter, torch.full((3,), 7.5, dtype=torch.bfloat16))
    assert torch.equal(optimizer.state[parameter]["master_weight"], torch.full((3,), 7.5))


def test_stochastic_rounding_is_unbiased():
    """The mean over many elements is the exact result within five standard errors."""
    n, update = 1 << 20, 2**-11
    parameter = nn.Parameter(torch.ones(n, dtype=torch.bfloat16))
    optimizer = SGD([parameter], lr=1.0, stochastic_rounding=True, rounding_seed=3)
    parameter.grad = torch.full((n,), -update, dtype=torch.bfloat16)
    optimizer.step()
    moved = parameter.detach() != 1
    assert set(parameter.detach().double().unique().tolist()) == {1.0, 1.0 + 2**-7}
    share = update / 2**-7
    assert abs(moved.double().mean().item() - share) < 5 * math.sqrt(share * (1 - share) / n)
    # Neighbours, and elements one cache line or one block apart, are rounded independently.
    for distance in (1, 2, 16, 32, 256, 65536):
        both = (moved[distance:] & moved[:-distance]).double().mean().item()
        assert abs(both - share**2) < 6 * math.sqrt(share**2 / n), distance


@pytest.mark.sanitized
def test_stochastic_rounding_is_seeded():
    """The same seed gives the same bits for any number of threads and after a resume; steps and parameters differ."""

    def moved(seed, threads=2, resume=False):
        torch.set_num_threads(threads)
        parameters = [nn.Parameter(torch.ones(70_000, dtype=torch.bfloat16)) for _ in range(2)]
        optimizer = SGD(parameters, lr=1.0, stochastic_rounding=True, rounding_seed=seed)
        results = []
        for step in range(2):
            for p in parameters:
                p.data.fill_(1)
                p.grad = torch.full_like(p, -(2**-9))
            if step == 1 and resume:
                state = optimizer.state_dict()
                optimizer = SGD(parameters, lr=1.0, stochastic_rounding=True, rounding_seed=99)
                optimizer.load_state_dict(state)
            optimizer.step()
            results += [(p.detach() != 1) for p in parameters]
        return results

    threads = torch.get_num_threads()
    try:
        first = moved(5)
        for other in (moved(5, threads=1), moved(5, threads=3), moved(5, resume=True)):
            assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
        assert not any(torch.equal(a, b) for i, a in enumerate(first) for b in first[:i])
        assert not torch.equal(first[0], moved(6)[0])
    finally:
        torch.set_num_threads(threads)


def test_stochastic_rounding_keeps_infinity_and_nan():
    """Infinite parameters and NaN stay what they are."""
    parameter = nn.Parameter(torch.tensor([math.inf, -math.inf, math.nan] * 100, dtype=torch.bfloat16))
    parameter.grad = torch.zeros_like(parameter)
    SGD([parameter], lr=1.0, stochastic_rounding=True).step()
    expected = torch.tensor([math.inf, -math.inf, math.nan] * 100, dtype=torch.bfloat16)
    assert torch.equal(parameter.nan_to_num(7.0), expected.nan_to_num(7.0))


@pytest.mark.sanitized
@given(
    dtype=st.sampled_from(DTYPES),
    sizes=st.lists(st.integers(0, 700), min_size=1, max_size=4),
    momentum=st.sampled_from([0.0, 0.9]),
    nesterov=st.booleans(),
    maximize=st.booleans(),
    weight_decay=st.sampled_from([0.0, 0.1]),
    max_grad_norm=st.sampled_from([None, 0.3]),
    ema_decay=st.sampled_from([None, 0.0, 0.9]),
    master_weights=st.booleans(),
)
def test_kernel_and_reference_agree(dtype, sizes, momentum, nesterov, max_grad_norm, **options):
    """Parameters and every buffer of the state agree for any combination of options."""
    options |= {"lr": 0.1, "momentum": momentum, "nesterov": nesterov and momentum > 0}
    results = []
    for native in (True, False):
        parameters = make_parameters(sizes, dtype)
        optimizer = SGD(parameters, max_grad_norm=max_grad_norm, **options)
        for step in range(3):
            set_gradients(parameters, step)
            if native:
                optimizer.step()
            else:
                with torch.no_grad():
                    step_reference(sgd_rule, optimizer.param_groups, optimizer.state, max_grad_norm, False, 1.0)
        results.append((parameters, [optimizer.state.get(p, {}) for p in parameters]))
    assert_close(results[0][0], results[1][0], dtype)
    for own, other in zip(results[0][1], results[1][1], strict=True):
        assert own.keys() == other.keys()
        assert [own[k].dtype for k in own] == [other[k].dtype for k in own]
        assert_close([own[k] for k in own], [other[k] for k in own], dtype)


@pytest.mark.parametrize("dtype", HALF)
def test_state_dict_brings_back_every_bit(dtype):
    """A resumed run equals an uninterrupted one bit for bit, with float32 buffers of half-precision parameters."""
    options = {"lr": 0.01, "momentum": 0.9, "master_weights": True, "ema_decay": 0.9, "max_grad_norm": 1.0}
    parameters = make_parameters(dtype=dtype)
    optimizer = train(parameters, **options)
    resumed = copy.deepcopy(parameters)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    second = SGD(resumed, **options)
    second.load_state_dict(torch.load(file, weights_only=True))
    for own, chosen in ((parameters, optimizer), (resumed, second)):
        set_gradients(own, 50)
        chosen.step()
    assert all(torch.equal(a, b) for a, b in zip(parameters, resumed, strict=True))
    for a, b in zip(parameters, resumed, strict=True):
        torch.testing.assert_close(optimizer.state[a], second.state[b], rtol=0, atol=0)


def test_state_dicts_exchange_with_torch():
    """torch's SGD loads lightkit's state dict with its extras, and the other way round."""
    parameters = make_parameters()
    optimizer = train(parameters, lr=0.01, momentum=0.9, ema_decay=0.9)
    theirs = torch.optim.SGD(copy.deepcopy(parameters), lr=0.01, momentum=0.9)
    theirs.load_state_dict(optimizer.state_dict())
    ours = SGD(copy.deepcopy(parameters), lr=0.5, ema_decay=0.9)
    plain = torch.optim.SGD(copy.deepcopy(parameters), lr=0.01, momentum=0.9)
    ours.load_state_dict(plain.state_dict())
    assert ours.param_groups[0]["ema_decay"] == 0.9 and ours.param_groups[0]["lr"] == 0.01
    for chosen in (theirs, ours):
        set_gradients(chosen.param_groups[0]["params"], 0)
        chosen.step()


def test_copies_keep_the_options():
    """deepcopy and pickling keep clipping, skipping and their counts."""
    optimizer = SGD(make_parameters([3]), lr=0.1, max_grad_norm=2.0, skip_nonfinite=True, fused=True)
    optimizer.skipped_steps = 4
    for copied in (copy.deepcopy(optimizer), torch.load(_saved(optimizer), weights_only=False)):
        assert (copied.max_grad_norm, copied.skip_nonfinite, copied.skipped_steps) == (2.0, True, 4)
        assert copied._step_supports_amp_scaling


def _saved(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return file


@pytest.mark.sanitized
def test_groups_have_their_own_extras():
    """One group may have averages and another none, also a group that is added later."""
    first, second, third = make_parameters([4, 5, 6])
    optimizer = SGD([{"params": [first], "ema_decay": 0.5}, {"params": [second]}], lr=0.1)
    optimizer.add_param_group({"params": [third], "ema_decay": 0.25})
    set_gradients([first, second, third], 0)
    optimizer.step()
    assert ["average" in optimizer.state.get(p, {}) for p in (first, second, third)] == [True, False, True]


@pytest.mark.parametrize("fused", [True, None])
def test_loss_scaling(fused):
    """Steps with a GradScaler equal those without; an overflow at the first step only adds to a count."""
    parameters, plain = make_parameters([5, 300]), make_parameters([5, 300])
    optimizer = SGD(parameters, lr=0.1, momentum=0.9, fused=fused, max_grad_norm=1.0)
    expected = SGD(plain, lr=0.1, momentum=0.9, max_grad_norm=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=100)
    for step in range(4):
        scaler.scale(torch.zeros(()))
        set_gradients(plain, step)
        set_gradients(parameters, step)
        for p in parameters:
            p.grad.mul_(scaler.get_scale())
        if step == 0:
            parameters[1].grad[7] = math.inf
        else:
            expected.step()
        scaled = copy.deepcopy(parameters[0].grad)
        scaler.step(optimizer)
        scaler.update()
        if fused:
            assert torch.equal(parameters[0].grad, scaled)
            assert optimizer.skipped_steps == 1
    assert_close(parameters, plain, torch.float32)


def test_extras_refuse_sparse_gradients():
    """Sparse gradients with such an option are an error, so that no option is ignored."""
    embedding = nn.Embedding(10, 3, sparse=True)
    optimizer = SGD(embedding.parameters(), lr=0.1, max_grad_norm=1.0)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="sparse gradients"):
        optimizer.step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_grad_norm": 0.0}, "max_grad_norm must be positive, got 0.0"),
        ({"max_grad_norm": math.nan}, "max_grad_norm must be positive, got nan"),
        ({"ema_decay": 1.0}, "ema_decay must be at least 0 and less than 1, got 1.0"),
        ({"ema_decay": -0.1}, "ema_decay must be"),
        ({"master_weights": True, "stochastic_rounding": True}, "exclude each other"),
    ],
)
def test_wrong_arguments(options, message):
    """The constructor's errors name the argument and its value."""
    with pytest.raises(ValueError, match=message):
        SGD(make_parameters([1]), lr=0.1, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"momentum": 0.9, "nesterov": True, "weight_decay": 1e-3}, {"momentum": 0.9}])
def test_trajectory_of_a_thousand_steps(dtype, options):
    """After 1,000 steps towards a minimum the error against float64 is not above that of torch's foreach."""
    target = torch.linspace(-2, 2, 257, dtype=torch.float64)
    results = {}
    for name, make, kind in (
        ("exact", torch.optim.SGD, torch.float64),
        ("torch", torch.optim.SGD, dtype),
        ("ours", SGD, dtype),
    ):
        parameter = nn.Parameter(torch.zeros(257, dtype=kind))
        optimizer = make([parameter], lr=0.01, foreach=True, **options)
        for _ in range(1000):
            parameter.grad = (parameter.detach().double() - target).to(kind)
            optimizer.step()
        results[name] = parameter.detach().double()
    ours = (results["ours"] - results["exact"]).abs().max()
    theirs = (results["torch"] - results["exact"]).abs().max()
    assert ours <= theirs + 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("optimizer_class", [SGD, Adam])
@pytest.mark.parametrize("dtype", HALF)
def test_what_is_written_past_autograd_counts_too(optimizer_class, dtype):
    """A master weight adopts a clamp of its parameter through .data, element by element."""
    (parameter,) = make_parameters([700], dtype=dtype)
    optimizer = optimizer_class([parameter], lr=1e-3, master_weights=True)
    set_gradients([parameter], 0)
    optimizer.step()
    before = optimizer.state[parameter]["master_weight"].clone()
    parameter.data.clamp_(-0.5, 0.5)
    parameter.data = parameter.data.clone()
    inside = before.abs() < 0.49
    parameter.grad = torch.zeros_like(parameter)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    after = optimizer.state[parameter]["master_weight"]
    assert parameter.abs().max() == 0.5 and torch.equal(parameter, after.to(dtype))
    # Elements that were not written keep the bits that their rounding lacks.
    assert torch.equal(after[inside], before[inside])


@pytest.mark.parametrize("own_class", [SGD, Adam])
def test_skipped_steps_in_the_state_dict(own_class):
    """The count is saved and loaded; torch's class loads the state dict, and lightkit's loads torch's."""
    torch_class = own_class._torch_class

    def made(cls, **options):
        return cls([nn.Parameter(torch.ones(2))], lr=0.1, **options)

    optimizer = made(own_class, skip_nonfinite=True)
    for value in (1.0, float("nan"), float("inf")):
        optimizer.param_groups[0]["params"][0].grad = torch.full((2,), value)
        optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = made(own_class, skip_nonfinite=True)
    other.load_state_dict(saved)
    assert other.skipped_steps == optimizer.skipped_steps == 2
    plain = made(torch_class)
    plain.load_state_dict(saved)
    plain.param_groups[0]["params"][0].grad = torch.ones(2)
    plain.step()
    other.load_state_dict(plain.state_dict())
    assert other.skipped_steps == 0
