"""Optimizers that several threads step, read, save, load, extend and convert: no memory and no step is lost."""

from __future__ import annotations

import copy
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from steps import make_parameters, set_gradients

from lightkit.optim import SGD, Adam, AdamW, convert

pytestmark = pytest.mark.sanitized

THREADS = 4
STEPS = 3
SIZES = [(3,), (64,), (7, 9), (5000,)]

CASES = [
    (Adam, {"lr": 0.01}),
    (AdamW, {"lr": 0.01, "amsgrad": True, "ema_decay": 0.9}),
    (SGD, {"lr": 0.01, "momentum": 0.9}),
    (SGD, {"lr": 0.01, "max_grad_norm": 0.5}),
]

# What Python and torch raise where a dict grows while another thread walks over it, groups and what is loaded into them
# no longer are of a size, or an optimizer gets another class in the middle of a method (super() raises TypeError).
RACES = (RuntimeError, ValueError, KeyError, AttributeError, IndexError, TypeError)


@pytest.fixture(autouse=True)
def frequent_switches() -> Iterator[None]:
    """Makes threads take turns far more often than by default."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@contextmanager
def running(*targets: Callable[[], None]) -> Iterator[None]:
    """Runs functions on threads that start together; raises their exceptions afterwards."""
    barrier = threading.Barrier(len(targets))
    errors = []

    def run(target: Callable[[], None]) -> None:
        barrier.wait()
        try:
            target()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(target,), daemon=True) for target in targets]
    for thread in threads:
        thread.start()
    yield
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive(), "a thread waits for ever"
    if errors:
        raise errors[0]


def with_gradients() -> list[torch.nn.Parameter]:
    parameters = make_parameters(SIZES)
    set_gradients(parameters, 0)
    return parameters


@pytest.mark.parametrize(("cls", "options"), CASES, ids=lambda value: getattr(value, "__name__", str(value)))
def test_first_steps_of_several_threads_are_steps_one_after_the_other(cls, options) -> None:
    """The state that one thread makes is there for the next: the result is bit for bit that of one thread.

    In an earlier version a thread rebuilt the plan that another one wrote into, which corrupted the heap in most runs.
    """
    alone = with_gradients()
    expected = cls(alone, **options)
    for _ in range(THREADS * STEPS):
        expected.step()
    for _ in range(30):
        parameters = with_gradients()
        optimizer = cls(parameters, **options)

        def steps(optimizer=optimizer) -> None:
            for _ in range(STEPS):
                optimizer.step()

        with running(*[steps] * THREADS):
            pass
        for own, other in zip(parameters, alone, strict=True):
            assert torch.equal(own, other)
            assert optimizer.state[own].keys() == expected.state[other].keys()
            for name, value in expected.state[other].items():
                assert value is None or torch.equal(optimizer.state[own][name], value), name


@pytest.mark.parametrize("cls", [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD])
def test_everything_at_once(cls) -> None:
    """Threads that step, save, load, add groups, read and convert leave an optimizer that works."""
    options = {"momentum": 0.9} if cls is torch.optim.SGD else {"amsgrad": True}
    optimizer = cls(with_gradients(), lr=1e-3, **options)
    saved = [copy.deepcopy(optimizer.state_dict())]
    end = time.monotonic() + 0.4
    done = {}

    def again_and_again(name: str, action: Callable[[], None], least: int = 1) -> Callable[[], None]:
        def run() -> None:
            done[name] = 0
            while time.monotonic() < end or done[name] < least:
                try:
                    action()
                except RACES:
                    continue
                done[name] += 1

        return run

    def read() -> None:
        for entry in list(optimizer.state.values()):
            for value in list(entry.values()):
                if isinstance(value, torch.Tensor):
                    # A copy: isfinite compares a value with itself, which may change in between.
                    assert value.clone().isfinite().all()

    def extend() -> None:
        if len(optimizer.param_groups) < 20:
            optimizer.add_param_group({"params": with_gradients()})
        time.sleep(0.01)

    def change_class() -> None:
        revert = convert(optimizer)
        time.sleep(0.003)
        revert()

    actions = {
        # The step is that of the class at that time.
        "step": lambda: type(optimizer).step(optimizer),
        "other step": lambda: optimizer.step(),
        "save": lambda: saved.append(optimizer.state_dict()) or saved.__delitem__(slice(0, -3)),
        "load": lambda: optimizer.load_state_dict(saved[-1]),
        "extend": extend,
        "read": read,
        "forget": lambda: optimizer.zero_grad(set_to_none=False),
        "convert": change_class,
    }
    with running(*(again_and_again(name, action) for name, action in actions.items())):
        pass
    assert all(count > 0 for count in done.values()), done
    # torch's step makes the state of a parameter key by key, and one that is saved in the middle of that lacks the rest
    # when it is loaded, as it does without lightkit.
    optimizer.state.clear()
    for group in optimizer.param_groups:
        set_gradients(group["params"], 1)
    optimizer.step()
    assert all(p.isfinite().all() for group in optimizer.param_groups for p in group["params"])


def test_a_step_may_take_another_step() -> None:
    """A number whose read steps the optimizer finds a free plan and does not wait."""
    parameters = with_gradients()
    optimizer = Adam(parameters, lr=0.01)

    class Restless:
        calls = 0

        def __float__(self) -> float:
            Restless.calls += 1
            if Restless.calls < 4:
                optimizer.step()
            return 0.01

    optimizer.param_groups[0]["lr"] = Restless()
    with running(optimizer.step):
        pass
    assert Restless.calls == 4
    assert all(p.isfinite().all() for p in parameters)
    optimizer.step()
    assert all(optimizer.state[p]["step"] > 1 for p in parameters)


def test_groups_may_grow_while_a_step_reads_them() -> None:
    """A parameter whose hash adds groups, as another thread may, causes no read beyond the list."""

    class Growing(torch.nn.Parameter):
        def __hash__(self) -> int:
            if growing and len(optimizer.param_groups) < 100:
                optimizer.param_groups.extend({**optimizer.param_groups[0], "params": []} for _ in range(20))
            return id(self)

    growing = False
    parameters = [Growing(torch.randn(3)) for _ in range(3)]
    set_gradients(parameters, 0)
    optimizer = SGD(parameters, lr=0.1, momentum=0.9)
    growing = True
    optimizer.step()
    optimizer.step()
    assert all("momentum_buffer" in optimizer.state[p] for p in parameters)
