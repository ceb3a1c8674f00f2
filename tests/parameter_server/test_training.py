"""Workers and servers compute the results of torch alone, in every mode and with every compression."""

from __future__ import annotations

import math
import threading
import time

import pytest
import torch
import torch.nn.functional as F
from workers import (
    BATCH,
    INPUTS,
    LABELS,
    Serving,
    Training,
    adam,
    network,
    reference,
    sgd,
    together,
    train,
)

import lightkit.optim
from lightkit.errors import ConfigError
from lightkit.parameter_server import Clipping
from lightkit.parameter_server.hyperparameters import HyperparameterPath, write_hyperparameters
from lightkit.parameter_server.membership import Membership


def two_groups(parameters):
    """Makes an optimizer of two groups with different options, in another order than the module's."""
    first, *rest = parameters
    return lightkit.optim.SGD([{"params": rest, "lr": 0.05}, {"params": [first]}], lr=0.2, momentum=0.5, nesterov=True)


@pytest.mark.parametrize("make_optimizer", [sgd, adam, two_groups])
@pytest.mark.parametrize(("servers", "workers"), [(1, 1), (1, 2), (2, 3), (7, 2)])
def test_sync_is_one_process_with_the_whole_batch(servers, workers, make_optimizer):
    """Any numbers of servers (even more than parameters) and workers give the same weights and states, to rounding."""
    serving = Serving(servers)
    run = [
        lambda rank=rank: train(serving.addresses, rank, workers=workers, make_optimizer=make_optimizer)
        for rank in range(workers)
    ]
    results = together(*run)
    expected, optimizer = reference(make_optimizer)
    ordered = [p for group in optimizer.param_groups for p in group["params"]]
    expected = torch.cat([p.detach().flatten() for p in ordered])
    for weights, state in results:
        torch.testing.assert_close(weights, expected, rtol=0, atol=1e-6)
        for parameter, entry in zip(ordered, state, strict=True):
            assert entry.keys() == optimizer.state[parameter].keys()
            for name, value in entry.items():
                torch.testing.assert_close(value, optimizer.state[parameter][name], rtol=1e-5, atol=1e-6)


def test_one_worker_is_torch_bit_for_bit():
    """One worker reaches the weights of torch alone to the bit."""
    serving = Serving(2)
    weights, _ = train(serving.addresses, 0)
    assert torch.equal(weights, reference()[0])


@pytest.mark.parametrize("servers", [1, 2])
def test_sync_clips_the_norm_of_the_mean(servers):
    """Clipping uses the norm of the mean gradient over all servers, as in data parallel training."""
    serving = Serving(servers)
    clipping = Clipping(max_norm=0.1)
    run = [lambda rank=rank: train(serving.addresses, rank, clipping=clipping, workers=2) for rank in (0, 1)]
    (weights, _), _ = together(*run)
    expected, _ = reference(clip=lambda parameters: torch.nn.utils.clip_grad_norm_(list(parameters), 0.1))
    torch.testing.assert_close(weights, expected, rtol=0, atol=1e-6)
    assert (weights - reference()[0]).abs().max() > 0.1


def test_every_worker_gets_the_norm_of_every_server(monkeypatch):
    """A worker whose thread on a server wakes after the step gets the norm too: its factor may reach another server."""
    serving = Serving(2)
    slow = serving.servers[0]._training.members
    waits, stepped = threading.Event(), threading.Event()
    wait = Membership.wait

    def wait_until_stepped(members, connection, rank=None):
        # The thread of worker 1 on one server sleeps until worker 0 has its reply, as on a crowded machine.
        if members is slow and rank == 1:
            waits.set()
            slow._changed.release()
            assert stepped.wait(10)
            slow._changed.acquire()
        wait(members, connection, rank)

    def work(rank):
        training = Training(serving.addresses, rank, workers=2)
        gradients = [torch.ones_like(p) for p in training.parameters]
        if rank == 0:
            assert waits.wait(10)
        push = training.client.push(0, gradients, training.optimizer.param_groups, Clipping(max_norm=0.1))
        training.take(push.result())
        stepped.set()
        training.end()
        return training.client.norm

    monkeypatch.setattr(Membership, "wait", wait_until_stepped)
    elements = sum(p.numel() for p in network().parameters())
    assert together(lambda: work(0), lambda: work(1)) == [pytest.approx(math.sqrt(elements))] * 2


def test_sync_clamps_the_mean():
    """Clipping by value clamps the elements of the mean gradient."""
    serving = Serving(2)
    clipping = Clipping(max_value=0.01)
    run = [lambda rank=rank: train(serving.addresses, rank, clipping=clipping, workers=2) for rank in (0, 1)]
    (weights, _), _ = together(*run)
    expected, _ = reference(clip=lambda parameters: torch.nn.utils.clip_grad_value_(list(parameters), 0.01))
    torch.testing.assert_close(weights, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_nonfinite_gradients_are_skipped(mode):
    """A step with a NaN in a worker's gradient changes no parameter on any server."""
    serving = Serving(2)

    def work(rank):
        training = Training(serving.addresses, rank, workers=2, mode=mode)
        before = [p.detach().clone() for p in training.parameters]
        gradients = [torch.ones_like(p) for p in training.parameters]
        gradients[0][0] = float("nan")
        exchange = training.client.push(0, gradients, training.optimizer.param_groups, Clipping(skip_nonfinite=True))
        training.take(exchange.result())
        unchanged = all(map(torch.equal, before, training.parameters))
        training.end()
        return unchanged

    assert together(lambda: work(0), lambda: work(1)) == [True, True]


def scheduled(name, values):
    """Returns a scheduler that sets an option of all groups before each step."""

    def set_option(optimizer, step):
        for group in optimizer.param_groups:
            group[name] = values[step % len(values)]

    return set_option


@pytest.mark.parametrize(
    ("make_optimizer", "schedule"),
    [
        (sgd, scheduled("lr", [0.1, 0.0, 0.2])),
        (sgd, scheduled("weight_decay", [0.01, 0, 0.02])),
        (lambda p: torch.optim.SGD(p, lr=0.1), scheduled("weight_decay", [0, 0.01, 0.1])),
        (lambda p: torch.optim.Adam(p, lr=torch.tensor(0.02)), scheduled("lr", [torch.tensor(0.01), 0.03])),
        (lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=torch.tensor(0.01)), scheduled("momentum", [0.0, 0.9])),
        (adam, scheduled("betas", [(0.9, 0.999), (0, 0.99)])),
        (torch.optim.Adafactor, scheduled("d", [1.0, 2])),
        (torch.optim.Rprop, scheduled("etas", [(0.5, 1.2), (0.4, 1.1)])),
    ],
)
def test_a_push_carries_the_hyperparameters(make_optimizer, schedule):
    """The servers step with the options that a scheduler has set: whole numbers, tensors and elements of tuples."""
    serving = Serving(2)
    training = Training(serving.addresses, 0, make_optimizer=make_optimizer)
    model = network()
    optimizer = make_optimizer(model.parameters())
    for step in range(6):
        schedule(training.optimizer, step)
        training.step(step)
        schedule(optimizer, step)
        optimizer.zero_grad()
        F.cross_entropy(model(INPUTS[step]), LABELS[step]).backward()
        optimizer.step()
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    torch.testing.assert_close(training.end()[0], weights, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("before", "value", "after"),
    [(2, 3.0, 3), (2, 0.5, 0.5), (2, math.inf, math.inf), (0.5, 3.0, 3.0), ((1, None, 0.5), 4.0, (4, None, 0.5))],
)
def test_whole_numbers_stay_whole(before, value, after):
    """An ``int`` option stays an ``int`` on the server if its new value is a whole number."""
    group = {"option": before}
    write_hyperparameters(group, [HyperparameterPath("option", 0 if isinstance(before, tuple) else -1)], [value])
    assert repr(group["option"]) == repr(after)


@pytest.mark.parametrize("value", [None, True, "much", (0.9, 0.999)])
def test_an_option_that_is_not_a_number_any_more(value):
    """The worker rejects it: a push carries numbers alone."""
    serving = Serving(1)
    training = Training(serving.addresses, 0)
    training.optimizer.param_groups[0]["weight_decay"] = value
    with pytest.raises(ConfigError, match="option weight_decay has become"):
        training.step(0)
    training.client.abandon()


def test_no_gradient_no_update():
    """A parameter without a gradient keeps its value despite weight decay, and has no state."""
    serving = Serving(2)
    training = Training(serving.addresses, 0)
    before = [p.detach().clone() for p in training.parameters]
    gradients = training.gradients(0)
    gradients[0] = None
    training.take(training.client.push(0, gradients, training.optimizer.param_groups).result())
    after = training.parameters
    assert torch.equal(before[0], after[0]) and not torch.equal(before[1], after[1])
    _, state = training.end()
    assert not state[0] and state[1]


@pytest.mark.parametrize(("compression", "share"), [("bf16", 0.5), ("topk", 0.25)])
def test_compression_reduces_the_bytes(compression, share):
    """bfloat16 halves the bytes; top-k sends an eighth of the elements, each with its index."""
    serving = Serving(1)
    training = Training(serving.addresses, 0, mode="async", compression=compression, fraction=1 / 8)
    training.step(0)
    count = sum(p.numel() for p in training.parameters)
    sent, received = training.client.traffic
    # Three flags, four hyperparameters of SGD, and the presence of four gradients.
    metadata = 8 * (3 + 4 + 4)
    assert abs((sent - metadata) / (4 * count) - share) < 0.02 and received >= 4 * count
    training.end()


def test_topk_loses_nothing():
    """Error feedback delays the elements of a constant gradient, and loses none."""
    serving = Serving(1)
    plain = lambda parameters: torch.optim.SGD(parameters, lr=1.0)  # noqa: E731
    settings = {"mode": "async", "compression": "topk", "fraction": 0.25}
    training = Training(serving.addresses, 0, make_optimizer=plain, **settings)
    before = torch.cat([p.detach().flatten().clone() for p in training.parameters])
    gradients = [torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) for p in training.parameters]
    flat = torch.cat([g.flatten() for g in gradients])
    for _ in range(200):
        training.take(training.client.push(0, gradients, training.optimizer.param_groups).result())
    moved = (before - torch.cat([p.detach().flatten() for p in training.parameters])) / 200
    assert (moved - flat).abs().max() < 4 * flat.abs().max() / 200 * 4
    training.end()


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_topk_with_a_nonfinite_gradient(mode):
    """A skipped step keeps the residual of earlier gradients, and leaves no NaN in it."""
    serving = Serving(1)
    plain = lambda parameters: torch.optim.SGD(parameters, lr=1.0)  # noqa: E731
    training = Training(
        serving.addresses, 0, make_optimizer=plain, mode=mode, compression="topk", fraction=1 / 15, workers=1
    )
    start = torch.cat([p.detach().flatten().clone() for p in training.parameters])

    def push(value):
        gradients = [torch.full_like(p, value) for p in training.parameters]
        clipping = Clipping(skip_nonfinite=True)
        training.take(training.client.push(0, gradients, training.optimizer.param_groups, clipping).result())

    push(1.0)
    push(float("nan"))
    for _ in range(40):
        push(0.0)
    moved = start - training.end()[0]
    if mode == "async":
        # A worker clips its gradient before the compression: the whole first gradient arrives.
        torch.testing.assert_close(moved, torch.ones_like(moved))
    else:
        # The servers check the mean after the compression: the residual that was added to the NaN is lost.
        assert torch.isfinite(moved).all() and moved.sum() >= 5


def test_async_counts_each_push_once():
    """The pushes of a constant gradient by three workers add up exactly, in any order."""
    serving = Serving(2)
    plain = lambda parameters: torch.optim.SGD(parameters, lr=0.5)  # noqa: E731

    def work(rank):
        training = Training(serving.addresses, rank, make_optimizer=plain, workers=3, mode="async")
        for _ in range(20):
            gradients = [torch.ones_like(p) for p in training.parameters]
            training.take(training.client.push(0, gradients, training.optimizer.param_groups).result())
        return training.end()[0]

    results = together(*(lambda rank=rank: work(rank) for rank in range(3)))
    start = torch.cat([p.detach().flatten() for p in network().parameters()])
    torch.testing.assert_close(results[0], start - 0.5 * 60, rtol=1e-6, atol=1e-5)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("staleness", [0, 2])
def test_bounded_keeps_its_bound(staleness, late):
    """The fast worker reaches the allowed lead over the slow one, even before that joins, and never exceeds it."""
    serving = Serving(2)
    counts, leads = [0, 0], []

    def work(rank):
        if late and rank == 1:
            time.sleep(0.3)
        training = Training(serving.addresses, rank, workers=2, mode="bounded", staleness=staleness)
        for step in range(8):
            if rank == 1:
                time.sleep(0.05)
            training.step(step)
            counts[rank] += 1
            leads.append(counts[0] - counts[1])
        return training.end()

    together(lambda: work(0), lambda: work(1))
    # The servers may have a push of the slow worker that the test has not counted yet.
    assert max(leads) <= staleness + 1
    assert max(leads) >= min(staleness, 1)


assert BATCH % 6 == 0, "equal parts for 1, 2 and 3 workers"
