"""Adam and AdamW against torch's own loop and float64; the tests of SGD cover what all optimizers share."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from steps import make_parameters, set_gradients
from support.threads import assert_same_with_any_threads
from torch import nn

from lightkit.optim import Adam, AdamW, convert
from lightkit.optim.reference import adam_rule, step_reference

PAIRS = [(Adam, torch.optim.Adam), (AdamW, torch.optim.AdamW)]
OPTIONS = [
    {},
    {"weight_decay": 0.1},
    {"amsgrad": True},
    {"betas": (0.5, 0.9), "eps": 1e-3, "maximize": True},
    {"weight_decay": 0.1, "amsgrad": True, "maximize": True},
]
# One less and one more than vectors of 4 to 16 elements, the unit of 64 that threads meet at, the block of 512 that is
# converted at once, and the grain of 32768 below which one thread does it all.
SIZES = [0, 1, 3, 7, 8, 9, 15, 16, 17, 63, 64, 65, 511, 512, 513, 32767, 32768, 32769, 70001]
HALF = [torch.bfloat16, torch.float16]


def run(optimizer, steps=5, first=0):
    for step in range(first, first + steps):
        for group in optimizer.param_groups:
            set_gradients(group["params"], step)
        optimizer.step()
    return optimizer


def assert_same(ours, theirs, dtype=torch.float32):
    """Asserts equality up to a few roundings of values of about 1."""
    tolerance = {"rtol": 16 * torch.finfo(dtype).eps, "atol": 16 * torch.finfo(dtype).eps}
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, other, **tolerance)


@pytest.mark.sanitized
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("own_class", "torch_class"), PAIRS)
def test_same_steps_as_torch(own_class, torch_class, options, dtype):
    """Every option, at every size where a loop ends, moves parameters and moments as torch does."""
    ours, theirs = make_parameters(SIZES, dtype), make_parameters(SIZES, dtype)
    optimizer = run(own_class(ours, lr=0.01, **options))
    reference = run(torch_class(theirs, lr=0.01, foreach=False, **options))
    assert optimizer._plan is not None
    assert_same(ours, theirs, dtype)
    for own, other in zip(ours, theirs, strict=True):
        mine, torchs = optimizer.state[own], reference.state[other]
        assert list(mine) == list(torchs)
        assert_same(mine.values(), torchs.values(), dtype)


@pytest.mark.sanitized
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_half_precision_is_more_exact_than_torch(options, dtype):
    """Moments in float32, rounded once a step: the mean error against float64 is not above that of torch's loop."""
    ours, theirs, exact = (make_parameters([5, 64, 4097], dtype) for _ in range(3))
    exact = [nn.Parameter(p.detach().double()) for p in exact]
    optimizers = [
        Adam(ours, lr=0.01, **options),
        torch.optim.Adam(theirs, lr=0.01, foreach=False, **options),
        torch.optim.Adam(exact, lr=0.01, foreach=False, **options),
    ]
    for step in range(30):
        set_gradients(ours, step)
        for a, b, c in zip(ours, theirs, exact, strict=True):
            b.grad, c.grad = a.grad.clone(), a.grad.double()
        for optimizer in optimizers:
            optimizer.step()

    def error(parameters):
        return torch.cat([(p.double() - e) for p, e in zip(parameters, exact, strict=True)]).abs().mean()

    # torch's result is NaN for some options in float16.
    assert error(ours) < 0.02 and not error(theirs) * 1.02 < error(ours)
    assert all(optimizers[0].state[p]["exp_avg_sq"].dtype == torch.float32 for p in ours)


def test_the_second_moment_of_half_precision_does_not_stand_still():
    """After 500 equal gradients it is (1 - 0.999^500) g^2; one in bfloat16 stops on the way."""
    (parameter,) = make_parameters([64], torch.bfloat16)
    optimizer = Adam([parameter], lr=1e-3)
    for _ in range(500):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    expected = torch.full((64,), 1 - 0.999**500)
    torch.testing.assert_close(optimizer.state[parameter]["exp_avg_sq"], expected, rtol=1e-4, atol=0)


@given(
    sizes=st.lists(st.integers(0, 600), min_size=1, max_size=6),
    lr=st.floats(0, 1),
    betas=st.tuples(st.floats(0, 0.999), st.floats(0, 0.9999)),
    eps=st.sampled_from([1e-8, 1e-3]),
    weight_decay=st.sampled_from([0.0, 0.01]),
    amsgrad=st.booleans(),
    pair=st.sampled_from(PAIRS),
    seed=st.integers(0, 1000),
)
def test_any_options_as_torch(sizes, lr, betas, eps, weight_decay, amsgrad, pair, seed):
    """Any combination of hyperparameters and sizes gives torch's result."""
    options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad}
    ours, theirs = (make_parameters(sizes, torch.float64, seed) for _ in range(2))
    run(pair[0](ours, **options), 3)
    run(pair[1](theirs, foreach=False, **options), 3)
    # Parameters as far from 1 as lr may take them.
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-12, atol=1e-12)


@pytest.mark.sanitized
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF], ids=str)
@pytest.mark.parametrize(
    "extras",
    [
        {"max_grad_norm": 0.5},
        {"ema_decay": 0.9},
        {"master_weights": True},
        {"max_grad_norm": 0.5, "ema_decay": 0.9, "master_weights": True, "amsgrad": True, "weight_decay": 0.1},
    ],
    ids=str,
)
@pytest.mark.parametrize("own_class", [Adam, AdamW])
def test_kernel_and_reference_agree(own_class, extras, dtype):
    """Parameters and every entry of the state agree with the options that torch lacks, dtypes included."""
    results = []
    for native in (True, False):
        parameters = make_parameters([3, 513], dtype)
        optimizer = own_class(parameters, lr=0.01, **extras)
        for step in range(4):
            set_gradients(parameters, step)
            if native:
                optimizer.step()
            else:
                with torch.no_grad():
                    options = (optimizer.max_grad_norm, False, 1.0)
                    step_reference(adam_rule, optimizer.param_groups, optimizer.state, *options)
        results.append((parameters, [optimizer.state[p] for p in parameters]))
    # One rounding of a parameter may go either way.
    tolerance = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 1e-6 if dtype != torch.float64 else 1e-14}
    for own, other in zip(*(r[0] for r in results), strict=True):
        torch.testing.assert_close(own, other, **tolerance)
    for own, other in zip(*(r[1] for r in results), strict=True):
        assert own.keys() == other.keys()
        for name in own:
            torch.testing.assert_close(own[name], other[name], **tolerance)


def test_skipped_steps_do_not_count():
    """A step with an infinite gradient changes nothing, not even the count for the bias correction."""
    ours, theirs = make_parameters([10]), make_parameters([10])
    optimizer, reference = Adam(ours, lr=0.1, skip_nonfinite=True), torch.optim.Adam(theirs, lr=0.1)
    for step in range(4):
        set_gradients(ours, step)
        if step == 1:
            ours[0].grad[3] = float("inf")
        else:
            theirs[0].grad = ours[0].grad.clone()
            reference.step()
        optimizer.step()
    assert optimizer.skipped_steps == 1 and float(optimizer.state[ours[0]]["step"]) == 3
    assert_same(ours, theirs)


@pytest.mark.sanitized
def test_each_parameter_counts_its_own_steps():
    """A parameter that is unfrozen late is corrected as in its first step."""
    results = []
    for optimizer_class in (Adam, torch.optim.Adam):
        parameters = make_parameters([8, 9])
        optimizer = optimizer_class(parameters, lr=0.1)
        for step in range(6):
            set_gradients(parameters, step)
            if step < 3:
                parameters[1].grad = None
            optimizer.step()
        assert [float(optimizer.state[p]["step"]) for p in parameters] == [6, 3]
        results.append(parameters)
    assert_same(*results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("first_class", [AdamW, torch.optim.AdamW])
@pytest.mark.parametrize("second_class", [AdamW, torch.optim.AdamW])
@pytest.mark.parametrize("flags", [{}, {"fused": True}], ids=str)
def test_state_dict_exchange(first_class, second_class, flags, dtype):
    """A state dict of either optimizer continues in either, through torch.save."""
    parameters, whole = make_parameters([33, 5], dtype), make_parameters([33, 5], dtype)
    reference = run(first_class(whole, lr=0.01, amsgrad=True, **flags), 6)
    first = run(first_class(parameters, lr=0.01, amsgrad=True, **flags), 3)
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    second = second_class(parameters, lr=7.0)
    second.load_state_dict(torch.load(buffer, weights_only=True))
    run(second, 3, first=3)
    # torch rounds the moments of bfloat16 parameters.
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
    for own, other in zip(parameters, whole, strict=True):
        torch.testing.assert_close(own, other, **tolerance)
        if first_class is second_class is AdamW:
            assert torch.equal(own, other)
            assert torch.equal(second.state[own]["exp_avg_sq"], reference.state[other]["exp_avg_sq"])


def _zero_the_moments(optimizer, state_dict):
    for entry in state_dict["state"].values():
        entry["exp_avg"] = torch.zeros_like(entry["exp_avg"])


def test_hooks_change_what_is_loaded():
    """A hook before loading may replace the state dict, in any dtype."""
    for dtype in (torch.float32, torch.bfloat16):
        state = run(Adam(make_parameters([17], dtype))).state_dict()
        optimizer = Adam(make_parameters([17], dtype))
        optimizer.register_load_state_dict_pre_hook(_zero_the_moments)
        optimizer.load_state_dict(state)
        (entry,) = optimizer.state.values()
        assert entry["exp_avg"].count_nonzero() == 0
        assert entry["exp_avg_sq"].count_nonzero() > 0


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["copy", "pickle"])
def test_copies_are_independent(duplicate):
    """A copied or pickled optimizer continues with its own parameters, moments and counts."""
    parameters = make_parameters([12])
    optimizer = run(Adam(parameters, lr=0.1))
    twin = duplicate(optimizer)
    before = parameters[0].detach().clone()
    run(twin, 1, first=9)
    assert torch.equal(parameters[0], before)
    run(optimizer, 1, first=9)
    assert_same(parameters, twin.param_groups[0]["params"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("own_class", "torch_class"), PAIRS)
def test_conversion_in_the_middle(own_class, torch_class, dtype):
    """torch's optimizer takes some steps on the kernels, and continues with the state afterwards."""
    changing, plain = make_parameters([40], dtype), make_parameters([40], dtype)
    optimizer, reference = torch_class(changing, lr=0.01), torch_class(plain, lr=0.01)
    run(optimizer, 2)
    revert = convert(optimizer)
    run(optimizer, 2, first=2)
    assert optimizer.state[changing[0]]["exp_avg"].dtype == torch.float32
    # torch's class steps a copy from within the conversion.
    copied = copy.deepcopy(optimizer)
    run(copied, 1, first=4)
    assert type(copied) is torch_class and vars(copied).keys() == vars(copy.deepcopy(reference)).keys()
    # A state dict that is loaded during the conversion keeps its precision.
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(saved)
    assert torch.equal(optimizer.state[changing[0]]["exp_avg"], saved["state"][0]["exp_avg"])
    assert optimizer.state[changing[0]]["exp_avg"].dtype == torch.float32
    revert()
    run(optimizer, 2, first=4)
    run(reference, 6)
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
    torch.testing.assert_close(changing[0], plain[0], **tolerance)
    assert optimizer.state[changing[0]]["exp_avg"].dtype == dtype


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Parameter(torch.randn(6, dtype=torch.complex64)),
        lambda: nn.Parameter(torch.randn(6, 4)[:, ::2]),
        lambda: nn.Parameter(torch.randn(6, 4).t()),
    ],
    ids=["complex", "with gaps", "transposed"],
)
def test_what_the_kernel_does_not_take(make):
    """Torch steps complex parameters and memory with gaps; the kernel steps any other memory layout."""
    torch.manual_seed(0)
    own = make()
    other = nn.Parameter(own.detach().clone(memory_format=torch.preserve_format))
    for parameter, optimizer_class in ((own, Adam), (other, torch.optim.Adam)):
        optimizer = optimizer_class([parameter], lr=0.1)
        for step in range(3):
            generator = torch.Generator().manual_seed(step)
            parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            optimizer.step()
    torch.testing.assert_close(own, other)


def test_sparse_gradients_are_refused_as_by_torch():
    """Sparse gradients are an error, as in torch, which has SparseAdam."""
    parameter = nn.Parameter(torch.randn(5))
    parameter.grad = torch.zeros(5).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        Adam([parameter]).step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "Invalid learning rate"),
        ({"betas": (1.0, 0.9)}, "Invalid beta"),
        ({"differentiable": True}, "differentiable=True is not supported"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be positive"),
        ({"ema_decay": 1.0}, "ema_decay must be"),
        ({"master_weights": True, "stochastic_rounding": True}, "exclude each other"),
    ],
)
def test_wrong_arguments(options, message):
    """The constructor rejects impossible values."""
    with pytest.raises(ValueError, match=message):
        Adam(make_parameters([3]), **options)


def test_betas_from_a_configuration():
    """The betas may be a list."""
    optimizer = run(Adam(make_parameters([3]), betas=[0.8, 0.9]), 1)
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.9)


def test_bit_identical_across_threads():
    """The number of threads changes no bit."""

    def compute():
        parameters = make_parameters([100_003, 5, 70_000])
        run(Adam(parameters, lr=0.1, max_grad_norm=0.1), 3)
        return [p.detach() for p in parameters]

    assert_same_with_any_threads(compute)


def test_means_that_fade_away_become_zero():
    """The running mean of a parameter without gradients ends at 0, not at slow denormal numbers."""
    (parameter,) = make_parameters([100])
    optimizer = Adam([parameter], lr=1e-3)
    for step in range(1500):
        parameter.grad = torch.ones_like(parameter) if step == 0 else torch.zeros_like(parameter)
        optimizer.step()
    assert (optimizer.state[parameter]["exp_avg"] == 0).all()
    # The step restores the processor's denormal mode.
    assert (torch.full((4,), 1e-39) * 1.0 != 0).all()


@pytest.mark.parametrize("optimizer_class", [Adam, AdamW])
def test_gradient_scaler(optimizer_class):
    """With fused=True a scaler leaves unscaling to the step, and an overflow at the first step does no harm."""
    ours, theirs = make_parameters([20]), make_parameters([20])
    optimizer = optimizer_class(ours, lr=0.1, fused=True)
    reference = optimizer_class(theirs, lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for step in range(4):
        set_gradients(ours, step)
        theirs[0].grad = ours[0].grad.clone()
        ours[0].grad *= scaler.get_scale()
        if step == 0:
            ours[0].grad[0] = float("inf")
        else:
            reference.step()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scaler.scale(torch.zeros(()))
            scaler.step(optimizer)
            scaler.update()
    assert optimizer.skipped_steps == 1
    assert_same(ours, theirs)
