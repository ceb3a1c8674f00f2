"""Conversion of torch's optimizers in place, at any time, and back."""

from __future__ import annotations

import copy
import functools
import gc
import inspect
import pickle
import sys
import warnings
import weakref

import pytest
import torch
from torch import nn

from lightkit.optim import SGD, FusedStep, convert
from lightkit.optim.convert import REPLACEMENTS, is_converted, unsupported_reason

OPTIONS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}


def step(optimizer, seed):
    generator = torch.Generator().manual_seed(seed)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()


def make(**options):
    torch.manual_seed(0)
    return torch.optim.SGD([nn.Parameter(torch.randn(100))], **{**OPTIONS, **options})


def parameter_of(optimizer):
    return optimizer.param_groups[0]["params"][0]


@pytest.fixture
def kernel_steps(monkeypatch):
    """Returns the optimizers that took a step on the kernels, in order."""
    taken = []
    original = FusedStep.step_for

    def step_for(self, optimizer, closure=None):
        result = original(self, optimizer, closure)
        assert self._plan is not None
        taken.append(optimizer)
        return result

    monkeypatch.setattr(FusedStep, "step_for", step_for)
    return taken


def test_back_and_forth_between_steps(kernel_steps):
    """Momentum, steps and class are torch's through every conversion."""
    changing, plain = make(), make()
    revert = None
    for seed in range(8):
        if seed % 2:
            revert = convert(changing)
        elif revert is not None:
            revert()
        assert type(changing) is torch.optim.SGD and is_converted(changing) == bool(seed % 2)
        step(changing, seed)
        step(plain, seed)
        assert kernel_steps == [changing] * ((seed + 1) // 2)
    torch.testing.assert_close(parameter_of(changing), parameter_of(plain))
    revert()
    assert vars(changing).keys() == vars(plain).keys()
    assert not changing._optimizer_load_state_dict_pre_hooks and not changing._optimizer_load_state_dict_post_hooks


@pytest.mark.parametrize("flags", [{}, {"fused": True}, {"foreach": True}], ids=str)
def test_groups_and_state_stay(flags):
    """The objects in the optimizer are the same before, during and after, flags included."""
    optimizer = make(**flags)
    step(optimizer, 0)
    group, state = optimizer.param_groups[0], optimizer.state
    before = {name: value for name, value in group.items() if name != "params"}
    revert = convert(optimizer)
    step(optimizer, 1)
    saved = pickle.loads(pickle.dumps(optimizer.state_dict()))
    # With fused=True a scaler hands its scale to the step, as it did to torch's.
    assert getattr(optimizer, "_step_supports_amp_scaling", False) == flags.get("fused", False)
    optimizer.load_state_dict(saved)
    step(optimizer, 2)
    revert()
    assert optimizer.param_groups[0].items() >= before.items() and saved["param_groups"][0].items() >= before.items()
    assert getattr(optimizer, "_step_supports_amp_scaling", False) == bool(flags.get("fused"))
    assert state.keys() == optimizer.state.keys()
    assert group["lr"] == 0.1


def test_fallback_does_not_take_torchs_fused_step():
    """torch's loop takes the steps that the kernel cannot, even if the group asks for the fused step."""
    torch.manual_seed(0)
    embedding = nn.Embedding(10, 3, sparse=True)
    optimizer = torch.optim.SGD(embedding.parameters(), lr=0.1, fused=True)
    convert(optimizer)
    expected = embedding.weight.detach().clone()
    expected[4] -= 0.1
    embedding(torch.tensor([4])).sum().backward()
    optimizer.step()
    torch.testing.assert_close(embedding.weight.detach(), expected)
    assert optimizer.param_groups[0]["fused"] is True


def test_a_scheduler_keeps_no_optimizer_alive():
    """The step that replaces the scheduler's refers to the optimizer weakly, as the scheduler's does."""
    optimizer = make()
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    convert(optimizer)
    reference = weakref.ref(optimizer)
    gc.disable()
    try:
        del optimizer
        assert reference() is None
    finally:
        gc.enable()


def test_reverting_leaves_other_peoples_changes_alone():
    """A step that was wrapped meanwhile stays wrapped and calls torch's step again."""
    optimizer, plain = make(), make()
    revert = convert(optimizer)
    inner, calls = optimizer.step, []
    optimizer.step = wrapper = lambda closure=None: calls.append(inner(closure))
    step(optimizer, 0)
    revert()
    assert optimizer.step is wrapper and not is_converted(optimizer)
    for seed in (1, 2):
        step(optimizer, seed)
    for seed in (0, 1, 2):
        step(plain, seed)
    assert len(calls) == 3
    torch.testing.assert_close(parameter_of(optimizer), parameter_of(plain))


class Derived(torch.optim.SGD):
    pass


@pytest.mark.parametrize(
    ("made", "cause"),
    [
        (lambda p: torch.optim.RMSprop([p]), "lightkit has no kernel for it"),
        (lambda p: Derived([p]), "it is a subclass of torch.optim.SGD, which may do something else"),
        (lambda p: SGD([p]), "it is lightkit's already"),
        (lambda p: torch.optim.SGD([p], differentiable=True), "differentiable=True"),
        (lambda p: torch.optim.SGD([p, nn.Parameter(torch.ones(2, dtype=torch.cfloat))]), "dtype torch.complex64"),
    ],
)
def test_refused(made, cause):
    """An optimizer that cannot be converted has a reason and stays unchanged."""
    optimizer = made(nn.Parameter(torch.ones(3)))
    cls = type(optimizer)
    with pytest.raises(ValueError, match=f"{cls.__name__} cannot be converted: .*{cause}"):
        convert(optimizer)
    assert cause in unsupported_reason(optimizer) and type(optimizer) is cls


def test_every_replacement_fits():
    """Each class in the table works without the attributes that its own __init__ sets."""
    for original, replacement in REPLACEMENTS.items():
        assert issubclass(replacement, original)
        plain, own = original([nn.Parameter(torch.ones(1))]), replacement([nn.Parameter(torch.ones(1))])
        assert all(hasattr(replacement, name) for name in vars(own).keys() - vars(plain).keys())
        assert plain.param_groups[0].keys() <= own.param_groups[0].keys()


@pytest.mark.parametrize("cls", list(REPLACEMENTS))
def test_groups_that_are_added_or_loaded_while_converted(cls):
    """A converted optimizer takes new groups and state dicts, and is torch's afterwards."""
    optimizer = cls([nn.Parameter(torch.randn(3))], lr=0.1)
    revert = convert(optimizer)
    optimizer.add_param_group({"params": [nn.Parameter(torch.randn(2))], "lr": 0.2})
    step(optimizer, 0)
    optimizer.load_state_dict(optimizer.state_dict())
    step(optimizer, 1)
    revert()
    plain = cls([nn.Parameter(torch.randn(3))], lr=0.1)
    assert [group.keys() for group in optimizer.param_groups] == [plain.param_groups[0].keys()] * 2


def test_attributes_of_a_converted_optimizer():
    """The conversion shows in two attributes, which copies and pickles lack."""
    optimizer, plain = make(), make()
    convert(optimizer)
    assert vars(optimizer).keys() - vars(plain).keys() == {"step", "__getstate__"}
    assert type(optimizer) is torch.optim.SGD and repr(optimizer) == repr(plain)
    assert optimizer.step.__self__ is optimizer and optimizer.step.__name__ == "step"
    assert inspect.signature(optimizer.step) == inspect.signature(plain.step)
    for copied in (copy.deepcopy(optimizer), copy.copy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert type(copied) is torch.optim.SGD and not is_converted(copied)
        assert vars(copied).keys() == vars(copy.deepcopy(plain)).keys()
    assert b"lightkit" not in pickle.dumps(optimizer)


@pytest.mark.parametrize("cls", list(REPLACEMENTS))
@pytest.mark.parametrize("name", ["step", "_init_group"])
@pytest.mark.parametrize("before", [True, False], ids=["patched before", "patched meanwhile"])
def test_methods_patched_on_the_class(monkeypatch, cls, name, before):
    """A method that is patched on torch's class or on its base is called."""
    dtype = torch.bfloat16 if cls is not torch.optim.SGD else torch.float32
    optimizer = cls([nn.Parameter(torch.ones(3, dtype=dtype))], lr=0.1)
    optimizer.zero_grad()
    parameter_of(optimizer).grad = torch.ones(3, dtype=dtype)
    owner = next(base for base in cls.__mro__ if name in vars(base))
    original, calls = vars(owner)[name], []

    @functools.wraps(original)
    def patched(*args, **kwargs):
        calls.append(name)
        return original(*args, **kwargs)

    if before:
        monkeypatch.setattr(owner, name, patched)
        assert "has been replaced" in unsupported_reason(optimizer)
        return
    revert = convert(optimizer)
    optimizer.step()
    assert calls == []
    monkeypatch.setattr(owner, name, patched)
    optimizer.step()
    assert calls == [name]
    monkeypatch.setattr(owner, name, original)
    optimizer.step()
    assert calls == [name] and not torch.equal(parameter_of(optimizer), torch.ones(3, dtype=dtype))
    revert()


def test_functions_of_torchs_step_that_are_patched(monkeypatch):
    """A patched function that torch's step calls is called."""
    module = sys.modules["torch.optim.sgd"]
    original, calls = module.sgd, []
    optimizer = make()
    convert(optimizer)
    monkeypatch.setattr(module, "sgd", lambda *args, **kwargs: calls.append(original(*args, **kwargs)))
    step(optimizer, 0)
    assert len(calls) == 1


def test_hooks_and_schedulers_made_meanwhile(kernel_steps):
    """Hooks see torch's optimizer and arguments; a new scheduler finds a step to wrap."""
    seen = []

    def train(optimizer):
        optimizer.register_step_pre_hook(lambda *args: seen.append(args))
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        parameter_of(optimizer).grad = torch.ones(100)
        optimizer.step(closure=lambda: 3.0)
        scheduler.step()
        return optimizer.param_groups[0]["lr"], parameter_of(optimizer).detach()

    plain, converted = make(), make()
    expected = train(plain)
    revert = convert(converted)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = train(converted)
    assert kernel_steps == [converted] and result[0] == expected[0]
    torch.testing.assert_close(result[1], expected[1])
    for own, (optimizer, args, kwargs) in zip((plain, converted), seen, strict=True):
        assert optimizer is own and args == (own,) and list(kwargs) == ["closure"]
    revert()
    assert converted.step.__wrapped__ is torch.optim.SGD.step and plain.step.__wrapped__ is torch.optim.SGD.step


def test_the_profiler_names_the_users_class():
    """A profiler shows a step of torch's class."""
    optimizer = make()
    convert(optimizer)
    with torch.profiler.profile() as profile:
        step(optimizer, 0)
    assert "Optimizer.step#SGD.step" in {event.key for event in profile.key_averages()}


def test_no_optimizer_is_kept_alive():
    """A converted optimizer is freed with the last reference to it, without an error."""
    optimizer = make()
    revert = convert(optimizer)
    step(optimizer, 0)
    reference = weakref.ref(optimizer)
    gc.disable()
    try:
        del optimizer
        assert reference() is None
    finally:
        gc.enable()
    revert()
