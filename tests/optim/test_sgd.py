"""SGD against torch's own loop and float64, with changes of parameters and state between two steps."""

from __future__ import annotations

import copy
import io
import itertools
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from steps import make_parameters, set_gradients
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from lightkit.optim import SGD

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
OPTIONS = [
    {},
    {"weight_decay": 0.1},
    {"momentum": 0.9},
    {"momentum": 0.9, "dampening": 0.5},
    {"momentum": 0.9, "nesterov": True},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "maximize": True},
    {"maximize": True},
]
# One less and one more than vectors of 4 to 32 elements, the unit of 64 that threads meet at, and the grain
# of 32768 below which one thread does it all.
SIZES = [0, 1, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 1000, 32767, 32768, 32769, 100003]


def run(optimizer_class, parameters, steps=4, **options):
    """Returns the parameters after some steps with gradients that are the same for every optimizer."""
    optimizer = optimizer_class(parameters, lr=0.1, **options)
    for step in range(steps):
        set_gradients(parameters, step)
        optimizer.step()
    return optimizer


def assert_same(ours, theirs, dtype=torch.float32):
    """Asserts equality up to a few roundings: torch rounds after each operation, lightkit once."""
    tolerance = {"rtol": 8 * torch.finfo(dtype).eps, "atol": 8 * torch.finfo(dtype).eps}
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, other, **tolerance)


@pytest.mark.sanitized
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_same_steps_as_torch(dtype, options):
    """Every option, at every size where a loop ends, moves parameters and buffers as torch does."""
    ours, theirs = make_parameters(SIZES, dtype), make_parameters(SIZES, dtype)
    optimizer, reference = run(SGD, ours, **options), run(torch.optim.SGD, theirs, foreach=False, **options)
    assert_same(ours, theirs, dtype)
    for own, other in zip(ours, theirs, strict=True):
        assert optimizer.state[own].keys() == reference.state[other].keys()
        if "momentum_buffer" in optimizer.state[own]:
            assert_same([optimizer.state[own]["momentum_buffer"]], [reference.state[other]["momentum_buffer"]], dtype)


@pytest.mark.sanitized
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_half_precision_is_at_least_as_exact_as_torch(dtype, options):
    """Rounded once a step: the mean error against float64 is not above that of torch's loop."""
    sizes = [5, 64, 4097]
    exact, ours, theirs = (make_parameters(sizes, dtype) for _ in range(3))
    exact = [nn.Parameter(p.detach().double()) for p in exact]
    reference = torch.optim.SGD(exact, lr=0.1, foreach=False, **options)
    own, other = SGD(ours, lr=0.1, **options), torch.optim.SGD(theirs, lr=0.1, foreach=False, **options)
    for step in range(20):
        set_gradients(ours, step)
        for a, b, c in zip(ours, theirs, exact, strict=True):
            b.grad, c.grad = a.grad.clone(), a.grad.double()
        for optimizer in (own, other, reference):
            optimizer.step()

    def error(parameters):
        return torch.cat([(p.double() - e) for p, e in zip(parameters, exact, strict=True)]).abs().mean()

    assert error(ours) <= error(theirs) * 1.02
    assert all((p != q).any() for p, q in zip(ours, make_parameters(sizes, dtype), strict=True))


@given(
    sizes=st.lists(st.integers(0, 300), min_size=1, max_size=8),
    lr=st.floats(0, 1),
    momentum=st.sampled_from([0.0, 0.5, 0.9]),
    dampening=st.sampled_from([0.0, 0.3]),
    weight_decay=st.sampled_from([0.0, 0.01]),
    maximize=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_options_as_torch(sizes, lr, momentum, dampening, weight_decay, maximize, seed):
    """Any combination of hyperparameters and sizes gives torch's result."""
    options = {
        "lr": lr,
        "momentum": momentum,
        "dampening": dampening,
        "weight_decay": weight_decay,
        "maximize": maximize,
    }
    ours, theirs = make_parameters(sizes, torch.float64, seed), make_parameters(sizes, torch.float64, seed)
    for parameters, optimizer_class in ((ours, SGD), (theirs, torch.optim.SGD)):
        optimizer = optimizer_class(parameters, **options)
        for step in range(3):
            set_gradients(parameters, step)
            optimizer.step()
    assert_same(ours, theirs, torch.float64)


@pytest.mark.sanitized
def test_groups_and_changes_at_any_time():
    """Groups have options of their own, which a scheduler or a program may change between steps."""
    results = []
    for optimizer_class in (SGD, torch.optim.SGD):
        parameters = make_parameters([10, 20, 30])
        optimizer = optimizer_class(
            [{"params": parameters[:1], "lr": 0.5}, {"params": parameters[1:2], "momentum": 0.9}], lr=0.1
        )
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        for step in range(5):
            if step == 2:
                optimizer.add_param_group({"params": parameters[2:], "momentum": 0.5, "weight_decay": 0.1})
                scheduler.base_lrs.append(0.1)
            if step == 3:
                optimizer.param_groups[1]["momentum"] = 0.0
                optimizer.param_groups[0]["nesterov"] = True
                optimizer.param_groups[0]["momentum"] = 0.9
            set_gradients(parameters, step)
            optimizer.step()
            scheduler.step()
        results.append(parameters)
    assert_same(*results)


def test_tensor_learning_rate():
    """A one-element tensor is a learning rate."""
    ours, theirs = make_parameters([17]), make_parameters([17])
    for parameters, optimizer in ((ours, SGD(ours, lr=torch.tensor(0.1))), (theirs, torch.optim.SGD(theirs, lr=0.1))):
        set_gradients(parameters, 0)
        optimizer.step()
    assert_same(ours, theirs)


@pytest.mark.parametrize("first_class", [SGD, torch.optim.SGD])
@pytest.mark.parametrize("second_class", [SGD, torch.optim.SGD])
def test_state_dict_exchange(first_class, second_class):
    """A state dict of either optimizer continues in either, through torch.save."""
    options = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}
    uninterrupted, parameters = make_parameters([33, 5]), make_parameters([33, 5])
    reference, first = torch.optim.SGD(uninterrupted, **options), first_class(parameters, **options)
    for step in range(3):
        for group, optimizer in ((uninterrupted, reference), (parameters, first)):
            set_gradients(group, step)
            optimizer.step()
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    second = second_class(parameters, lr=7.0)
    second.load_state_dict(torch.load(buffer, weights_only=True))
    for step in range(3, 6):
        for group, optimizer in ((uninterrupted, reference), (parameters, second)):
            set_gradients(group, step)
            optimizer.step()
    assert_same(parameters, uninterrupted)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["copy", "pickle"])
def test_copies_are_independent(duplicate):
    """A copied or pickled optimizer continues with its own parameters and buffers."""
    parameters = make_parameters([12])
    optimizer = run(SGD, parameters, momentum=0.9)
    twin = duplicate(optimizer)
    copied = twin.param_groups[0]["params"]
    before = parameters[0].detach().clone()
    set_gradients(copied, 9)
    twin.step()
    assert torch.equal(parameters[0], before)
    set_gradients(parameters, 9)
    optimizer.step()
    assert_same(parameters, copied)


@pytest.mark.sanitized
def test_missing_late_and_returning_gradients():
    """Parameters without a gradient rest with their buffers; one that is unfrozen late has a first step."""
    results = []
    for optimizer_class in (SGD, torch.optim.SGD):
        parameters = make_parameters([8, 9, 10])
        optimizer = optimizer_class(parameters, lr=0.1, momentum=0.9, dampening=0.5)
        for step in range(6):
            set_gradients(parameters, step)
            if step < 3:
                parameters[1].grad = None
            if step % 2:
                parameters[2].grad = None
            optimizer.step()
        results.append(parameters)
    assert_same(*results)


@pytest.mark.sanitized
def test_moved_and_repointed_parameters():
    """After .data = and a change of dtype the step works on the new memory, and the momentum follows."""
    parameter = nn.Parameter(torch.ones(5))
    optimizer = SGD([parameter], lr=0.1, momentum=0.9)
    parameter.grad = torch.ones(5)
    optimizer.step()
    old = parameter.data
    parameter.data = torch.zeros(5)
    optimizer.step()
    torch.testing.assert_close(parameter.data, torch.full((5,), -0.19))
    torch.testing.assert_close(old, torch.full((5,), 0.9))

    parameter.grad = None
    parameter.data = parameter.data.double()
    parameter.grad = torch.ones(5, dtype=torch.float64)
    optimizer.step()
    torch.testing.assert_close(parameter.data, torch.full((5,), -0.19 - 0.271, dtype=torch.float64))
    assert optimizer.state[parameter]["momentum_buffer"].dtype == torch.float64


def test_parameters_that_share_memory():
    """Two parameters in one storage get both updates, one after the other."""
    storage = torch.zeros(50000)
    first, second = nn.Parameter(storage), nn.Parameter(storage)
    first.data = second.data = storage
    first.grad, second.grad = torch.ones(50000), torch.full((50000,), 2.0)
    SGD([first, second], lr=1.0).step()
    assert torch.equal(storage, torch.full((50000,), -3.0))


@pytest.mark.sanitized
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_any_memory_layout(momentum):
    """Channels-last, transposed and strided parameters work, with gradients of the same or another layout."""

    def tensors():
        torch.manual_seed(3)
        yield torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
        yield torch.randn(6, 7).t()
        yield torch.randn(8, 8)[::2, ::3]
        yield torch.randn(4, 1, 4)

    results = []
    for optimizer_class in (SGD, torch.optim.SGD):
        parameters = [nn.Parameter(t) for t in tensors()]
        optimizer = optimizer_class(parameters, lr=0.1, momentum=momentum)
        for step, as_parameter in itertools.product(range(2), (True, False)):
            set_gradients(parameters, step)
            for parameter in parameters:
                if as_parameter:
                    parameter.grad = torch.empty_like(parameter).copy_(parameter.grad)
            optimizer.step()
        results.append(parameters)
    assert_same(*results)
    assert [p.stride() for p in results[0]] == [t.stride() for t in tensors()]


def test_mixed_dtypes_in_one_group():
    """Parameters of all four dtypes share an optimizer."""
    ours = [p for dtype in DTYPES for p in make_parameters([100], dtype)]
    theirs = copy.deepcopy(ours)
    run(SGD, ours, momentum=0.9)
    run(torch.optim.SGD, theirs, momentum=0.9, foreach=False)
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, other, rtol=0.05, atol=8 * torch.finfo(own.dtype).eps)


def test_sparse_gradients_as_torch():
    """torch's loop takes the steps with sparse gradients."""
    results = []
    for optimizer_class in (SGD, torch.optim.SGD):
        torch.manual_seed(0)
        embedding = nn.Embedding(10, 3, sparse=True)
        optimizer = optimizer_class(embedding.parameters(), lr=0.1)
        embedding(torch.tensor([1, 1, 4])).sum().backward()
        optimizer.step()
        results.append(list(embedding.parameters()))
    assert_same(*results)


def test_hooks_run_once_on_torchs_loop():
    """Hooks are called once if torch's loop takes the step."""
    torch.optim.SGD(make_parameters([1]))
    embedding = nn.Embedding(4, 2, sparse=True)
    optimizer = SGD(embedding.parameters(), lr=0.1)
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    embedding(torch.tensor([1])).sum().backward()
    optimizer.step()
    assert calls == ["after"]


def test_negated_gradients():
    """A lazily negated gradient is applied negated."""
    parameter = nn.Parameter(torch.zeros(3))
    parameter.grad = torch._neg_view(torch.ones(3))
    SGD([parameter], lr=1.0).step()
    assert torch.equal(parameter.data, torch.ones(3))


@pytest.mark.sanitized
def test_interleaved_parameters_in_one_storage():
    """Interleaved parameters in one storage get all their updates."""
    storage = torch.zeros(8)
    first, second = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))
    first.data, second.data = storage[0:6:2], storage[2:8:2]
    first.grad, second.grad = torch.ones(3), torch.ones(3)
    SGD([first, second], lr=1.0).step()
    assert torch.equal(storage[::2], torch.tensor([-1.0, -2.0, -2.0, -1.0]))


def test_modules_can_be_converted_by_swapping():
    """swap_tensors, by which modules may move, works with the optimizer."""
    module = nn.Linear(2, 2)
    optimizer = SGD(module.parameters(), lr=0.1, momentum=0.9)
    module(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        module.to(torch.float64)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    module(torch.ones(1, 2, dtype=torch.float64)).sum().backward()
    optimizer.step()
    assert module.weight.dtype == torch.float64


def test_tensor_subclasses_go_to_torch():
    """torch's loop takes the steps of a parameter whose memory is elsewhere, such as a DTensor."""
    from torch.testing._internal.two_tensor import TwoTensor

    parameter = nn.Parameter(TwoTensor(torch.ones(4), torch.ones(4)))
    (parameter * 1.0).sum().backward()
    SGD([parameter], lr=0.5).step()
    assert torch.equal(parameter.detach().a, torch.full((4,), 0.5))


def test_groups_need_not_be_lists():
    """Parameters may be in a tuple, and an object that is no tensor is an error."""
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.ones(2)
    optimizer = SGD([parameter], lr=1.0)
    optimizer.param_groups[0]["params"] = (parameter,)
    optimizer.step()
    assert torch.equal(parameter.data, -torch.ones(2))
    optimizer.param_groups[0]["params"] = [1]
    with pytest.raises(TypeError, match="expected a tensor"):
        optimizer.step()


def test_infinite_parameters_and_unwritten_buffers_stay_out():
    """A term with factor 0 does not turn Inf into NaN."""
    parameter = nn.Parameter(torch.tensor([float("inf"), 1.0]))
    parameter.grad = torch.ones(2)
    SGD([parameter], lr=0.1).step()
    assert torch.equal(parameter.data, torch.tensor([float("inf"), 0.9]))


def test_closure():
    """The closure runs with gradients enabled, and the step returns its loss."""
    parameter = nn.Parameter(torch.tensor([2.0]))
    optimizer = SGD([parameter], lr=0.25)

    def closure():
        optimizer.zero_grad()
        loss = (parameter**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 4.0
    assert parameter.item() == 1.0


def test_autograd_notices_the_step():
    """A step on a tensor that autograd saved makes backward an error."""
    weight = nn.Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    product = (weight * weight).sum()
    SGD([weight], lr=0.1).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_hooks_run():
    """Step hooks, which Lightning and profilers use, are called."""
    calls = []
    optimizer = SGD(make_parameters([3]), lr=0.1)
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    optimizer.step()
    assert calls == ["before", "after"]


def test_hooks_of_all_optimizers_run():
    """Global step hooks are called while they are registered."""
    calls = []
    optimizer = SGD(make_parameters([3]), lr=0.1)
    handles = [
        register_optimizer_step_pre_hook(lambda *_: calls.append("before")),
        register_optimizer_step_post_hook(lambda *_: calls.append("after")),
    ]
    optimizer.step()
    for handle in handles:
        handle.remove()
    optimizer.step()
    assert calls == ["before", "after"]


def test_profilers_see_the_step():
    """A profiler shows the step under torch's name."""
    optimizer = SGD(make_parameters([3]), lr=0.1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
        optimizer.zero_grad()
    names = {event.key for event in profile.key_averages()}
    assert {"Optimizer.step#SGD.step", "Optimizer.zero_grad#SGD.zero_grad"} <= names


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(set_to_none):
    """Gradients are None, or zeros in the same memory."""
    parameters = make_parameters([3, 2])
    gradients = [torch.ones_like(parameter) for parameter in parameters]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    SGD(parameters, lr=0.1).zero_grad(set_to_none)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        assert parameter.grad is (None if set_to_none else gradient)
        assert set_to_none or not gradient.any()


@pytest.mark.sanitized
def test_replaced_state_is_seen():
    """A buffer that a program replaces or clears between steps takes effect."""
    parameter = nn.Parameter(torch.zeros(4))
    optimizer = SGD([parameter], lr=1.0, momentum=0.5)
    parameter.grad = torch.ones(4)
    optimizer.step()
    optimizer.state[parameter]["momentum_buffer"] = torch.full((4,), 10.0)
    optimizer.step()
    torch.testing.assert_close(parameter.data, torch.full((4,), -7.0))
    optimizer.state.clear()
    optimizer.step()
    torch.testing.assert_close(parameter.data, torch.full((4,), -8.0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "Invalid learning rate"),
        ({"momentum": -1.0}, "Invalid momentum"),
        ({"nesterov": True}, "Nesterov momentum requires"),
        ({"differentiable": True}, "differentiable=True is not supported"),
    ],
)
def test_wrong_arguments(options, message):
    """Arguments that torch rejects are rejected, and errors name what the kernel cannot do."""
    with pytest.raises(ValueError, match=message):
        SGD(make_parameters([3]), **options)


@pytest.mark.sanitized
def test_gradient_of_another_shape():
    """A parameter of a new shape with its old gradient is an error and not a read past the end."""
    parameter = nn.Parameter(torch.zeros(10))
    parameter.grad = torch.ones(10)
    parameter.data = torch.zeros(20)
    with pytest.raises(RuntimeError, match=r"shape \[20\] has a gradient of shape \[10\]"):
        SGD([parameter], lr=0.1).step()


def test_scaler_skips_the_first_overflowing_step():
    """An overflow at the first step leaves parameters and buffers alone; the next step is a first step."""
    parameter = nn.Parameter(torch.ones(6))
    optimizer = SGD([parameter], lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for gradient, expected in ((float("inf"), 1.0), (2.0, 0.9)):
        loss = scaler.scale((parameter * 1.0).sum())
        optimizer.zero_grad()
        loss.backward()
        scale = scaler.get_scale()
        parameter.grad.fill_(gradient if gradient == float("inf") else scale)
        scaler.step(optimizer)
        scaler.update()
        torch.testing.assert_close(parameter.data, torch.full((6,), expected))


def test_without_the_native_library(monkeypatch):
    """Without a compiler torch's loop takes the steps."""
    monkeypatch.setattr("lightkit.native.load", lambda: None)
    ours, theirs = make_parameters([40]), make_parameters([40])
    run(SGD, ours, momentum=0.9)
    run(torch.optim.SGD, theirs, momentum=0.9)
    assert_same(ours, theirs)
