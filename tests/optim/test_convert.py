"""Conversion of torch's optimizers in place, at any time of their lives, and back."""

from __future__ import annotations

import gc
import pickle
import weakref

import pytest
import torch
from torch import nn

from lightkit.optim import SGD, convert
from lightkit.optim.convert import REPLACEMENTS, obstacle

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


def test_back_and_forth_between_steps():
    """The momentum goes through every change of class, and the steps are torch's."""
    changing, plain = make(), make()
    revert = None
    for seed in range(8):
        if seed % 2:
            revert = convert(changing)
            assert type(changing) is SGD
        elif revert is not None:
            revert()
            assert type(changing) is torch.optim.SGD
        step(changing, seed)
        step(plain, seed)
        assert (vars(changing).get("_plan") is not None) == bool(seed % 2)
    torch.testing.assert_close(parameter_of(changing), parameter_of(plain))
    revert()
    assert vars(changing).keys() == vars(plain).keys()


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
    assert optimizer._step_supports_amp_scaling == flags.get("fused", False)
    optimizer.load_state_dict(saved)
    step(optimizer, 2)
    revert()
    assert optimizer.param_groups[0].items() >= before.items() and saved["param_groups"][0].items() >= before.items()
    assert getattr(optimizer, "_step_supports_amp_scaling", False) == bool(flags.get("fused"))
    assert state.keys() == optimizer.state.keys()
    assert group["lr"] == 0.1


def test_fallback_does_not_take_torchs_fused_step():
    """What the kernel cannot do is done by torch's loop also where the group asks for the fused step."""
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
    """An optimizer whose step was wrapped meanwhile is not taken apart."""
    optimizer = make()
    revert = convert(optimizer)
    inner = optimizer.step
    optimizer.step = lambda closure=None: inner(closure)
    revert()
    before = parameter_of(optimizer).detach().clone()
    step(optimizer, 0)
    assert type(optimizer) is SGD and not torch.equal(before, parameter_of(optimizer))


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
    """What cannot be converted says why, and stays what it is."""
    optimizer = made(nn.Parameter(torch.ones(3)))
    cls = type(optimizer)
    with pytest.raises(ValueError, match=f"{cls.__name__} cannot be converted: .*{cause}"):
        convert(optimizer)
    assert cause in obstacle(optimizer) and type(optimizer) is cls


def test_every_replacement_fits():
    """What the table promises: a subclass that does without what its own __init__ sets."""
    for original, replacement in REPLACEMENTS.items():
        assert issubclass(replacement, original)
        plain, own = original([nn.Parameter(torch.ones(1))]), replacement([nn.Parameter(torch.ones(1))])
        assert all(hasattr(replacement, name) for name in vars(own).keys() - vars(plain).keys())
        assert plain.param_groups[0].keys() <= own.param_groups[0].keys()


@pytest.mark.parametrize("cls", list(REPLACEMENTS))
def test_groups_that_are_added_or_loaded_while_converted(cls):
    """A converted optimizer takes further groups and state dicts, and nothing of ours is in it afterwards."""
    optimizer = cls([nn.Parameter(torch.randn(3))], lr=0.1)
    revert = convert(optimizer)
    optimizer.add_param_group({"params": [nn.Parameter(torch.randn(2))], "lr": 0.2})
    step(optimizer, 0)
    optimizer.load_state_dict(optimizer.state_dict())
    step(optimizer, 1)
    revert()
    plain = cls([nn.Parameter(torch.randn(3))], lr=0.1)
    assert [group.keys() for group in optimizer.param_groups] == [plain.param_groups[0].keys()] * 2
