"""What workers and servers compute together, against torch alone; and what happens when some of them die."""

from __future__ import annotations

import math
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import lightkit.optim
from lightkit.errors import ConfigError, LightkitError
from lightkit.parameter_server import Clipping
from lightkit.parameter_server.hyperparameters import HyperparameterPath, write_hyperparameters

sys.path.insert(0, str(Path(__file__).parent))
from workers import (
    BATCH,
    INPUTS,
    LABELS,
    STEPS,
    ServerProcess,
    Serving,
    Training,
    network,
    reference,
    sgd,
    stop_serving,
    together,
)


@pytest.fixture(autouse=True)
def servers_end():
    yield
    stop_serving()


def train(addresses, rank, steps=STEPS, clipping=None, before=lambda step: None, **settings):
    training = Training(addresses, rank, **settings)
    for step in range(steps):
        before(step)
        training.step(step, clipping)
    return training.end()


def adam(parameters):
    return lightkit.optim.Adam(parameters, lr=0.02)


def other_numbers(parameters):
    optimizer = sgd(parameters)
    optimizer.param_groups[0]["dampening"] = None
    return optimizer


def two_groups(parameters):
    """Groups with options of their own, in another order than the module's."""
    first, *rest = parameters
    return lightkit.optim.SGD([{"params": rest, "lr": 0.05}, {"params": [first]}], lr=0.2, momentum=0.5, nesterov=True)


@pytest.mark.parametrize("make_optimizer", [sgd, adam, two_groups])
@pytest.mark.parametrize(("servers", "workers"), [(1, 1), (1, 2), (2, 3), (7, 2)])
def test_sync_is_one_process_with_the_whole_batch(servers, workers, make_optimizer):
    """Any numbers of servers (also more than parameters) and workers: the same weights and state, to rounding."""
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
    """The wire and the server add nothing of their own."""
    serving = Serving(2)
    weights, _ = train(serving.addresses, 0)
    assert torch.equal(weights, reference()[0])


@pytest.mark.parametrize("servers", [1, 2])
def test_sync_clips_the_norm_of_the_mean(servers):
    """As data parallel training does: the norm over all servers, not of a worker's gradient."""
    serving = Serving(servers)
    clipping = Clipping(max_norm=0.1)
    run = [lambda rank=rank: train(serving.addresses, rank, clipping=clipping, workers=2) for rank in (0, 1)]
    (weights, _), _ = together(*run)
    expected, _ = reference(clip=lambda parameters: torch.nn.utils.clip_grad_norm_(list(parameters), 0.1))
    torch.testing.assert_close(weights, expected, rtol=0, atol=1e-6)
    assert (weights - reference()[0]).abs().max() > 0.1


def test_sync_clamps_the_mean():
    """Clipping by value, of the mean's elements."""
    serving = Serving(2)
    clipping = Clipping(max_value=0.01)
    run = [lambda rank=rank: train(serving.addresses, rank, clipping=clipping, workers=2) for rank in (0, 1)]
    (weights, _), _ = together(*run)
    expected, _ = reference(clip=lambda parameters: torch.nn.utils.clip_grad_value_(list(parameters), 0.01))
    torch.testing.assert_close(weights, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_skips_what_is_not_finite(mode):
    """A step with a NaN in one worker's gradient changes nothing, on no server."""
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
    """Sets an option of all groups before each step."""

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
def test_options_come_with_the_push(make_optimizer, schedule):
    """What a scheduler sets is what the servers step with, whole numbers, tensors and parts of tuples among it."""
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
    """An option that counts something is still a count on the server, where its value is one."""
    group = {"option": before}
    write_hyperparameters(group, [HyperparameterPath("option", 0 if isinstance(before, tuple) else -1)], [value])
    assert repr(group["option"]) == repr(after)


@pytest.mark.parametrize("value", [None, True, "much", (0.9, 0.999)])
def test_an_option_that_is_no_number_any_more(value):
    """Refused by the worker: the server could not be told."""
    serving = Serving(1)
    training = Training(serving.addresses, 0)
    training.optimizer.param_groups[0]["weight_decay"] = value
    with pytest.raises(ConfigError, match="option weight_decay has become"):
        training.step(0)
    training.client.abandon()


def test_no_gradient_no_update():
    """A parameter without gradient stays as it is, weight decay or not, and has no state."""
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
def test_compression_sends_less(compression, share):
    """Half the bytes in bfloat16; of top-k an eighth of the elements, each with its position."""
    serving = Serving(1)
    training = Training(serving.addresses, 0, mode="async", compression=compression, fraction=1 / 8)
    training.step(0)
    count = sum(p.numel() for p in training.parameters)
    sent, received = training.client.traffic
    # Three facts, four options of SGD, and which of four gradients there are.
    facts = 8 * (3 + 4 + 4)
    assert abs((sent - facts) / (4 * count) - share) < 0.02 and received >= 4 * count
    training.end()


def test_topk_sends_everything_in_the_end():
    """Error feedback: with a constant gradient and plain SGD nothing is lost, only late."""
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
def test_topk_and_a_gradient_that_is_not_finite(mode):
    """A step that is left out takes nothing of what is still to be sent, and leaves nothing infinite behind."""
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
        # A worker clips its own gradient, before it is compressed: all of the first one arrives.
        torch.testing.assert_close(moved, torch.ones_like(moved))
    else:
        # In sync the mean is looked at, after that: what was added to the NaN is gone with it.
        assert torch.isfinite(moved).all() and moved.sum() >= 5


def test_async_counts_every_push_once():
    """Pushes of a constant gradient by three workers add up exactly, in whatever order they come."""
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


@pytest.mark.parametrize("staleness", [0, 2])
def test_bounded_holds_its_bound(staleness):
    """With a slow worker the fast one is never further ahead than allowed, and comes to that."""
    serving = Serving(2)
    counts, leads = [0, 0], []

    def work(rank):
        training = Training(serving.addresses, rank, workers=2, mode="bounded", staleness=staleness)
        for step in range(8):
            if rank == 1:
                time.sleep(0.05)
            training.step(step)
            counts[rank] += 1
            leads.append(counts[0] - counts[1])
        return training.end()

    together(lambda: work(0), lambda: work(1))
    # A push of the slow one may be on the servers, and not yet counted here.
    assert max(leads) <= staleness + 1
    assert max(leads) >= min(staleness, 1)


def test_workers_come_and_go():
    """In sync: one of two leaves without a word, the other goes on alone; who takes the place is waited for."""
    serving = Serving(2)
    steps_together = threading.Barrier(2, timeout=20)
    left, came = threading.Event(), threading.Event()

    def stays():
        training = Training(serving.addresses, 0, workers=2)
        for step in range(3):
            steps_together.wait()
            training.step(step)
        left.wait(20)
        for step in range(3, 6):
            training.step(step)
        came.wait(20)
        for step in range(6, 9):
            training.step(step)
        return training.end()[0]

    def leaves():
        training = Training(serving.addresses, 1, workers=2)
        for step in range(3):
            steps_together.wait()
            training.step(step)
        # As when its process dies: the connections break.
        for session in training.client._sessions:
            session._connection.close()
        training.client.abandon()
        left.set()
        time.sleep(0.5)
        again = Training(serving.addresses, 1, workers=2)
        came.set()
        for step in range(6, 9):
            again.step(step)
        return again.end()[0]

    one, two = together(stays, leaves)
    assert torch.equal(one, two) and torch.isfinite(one).all()


def test_who_takes_a_place_begins_to_count_anew():
    """A push of a worker that is gone is not taken for one of who came in its place, whose own all count."""
    serving = Serving(1)
    (server,) = serving.servers
    waits, goes_on = threading.Event(), threading.Event()

    def stays():
        training = Training(serving.addresses, 0, workers=2)
        training.step(0)
        training.step(1)
        waits.set()
        goes_on.wait(20)
        for step in (2, 3, 4):
            training.step(step)
        return training.end()

    def comes_and_goes():
        training = Training(serving.addresses, 1, workers=2)
        training.step(0)
        training.step(1)
        waits.wait(20)
        # Its third push is there, but not the other worker's, when it goes.
        training.client.push(0, training.gradients(2), training.optimizer.param_groups)
        while not server.status().workers[1].pending:
            time.sleep(0.01)
        training.client.abandon()
        while 1 in server.status().connected:
            time.sleep(0.01)
        again = Training(serving.addresses, 1, workers=2)
        goes_on.set()
        # The other one pushes first, and waits for this one.
        time.sleep(0.3)
        for step in (2, 3, 4):
            again.step(step)
        return again.end()

    (weights, _), _ = together(stays, comes_and_goes)
    assert server.status().workers[1].pushes == (3,) and server.status().versions == (5,)
    # Both have been part of every step.
    torch.testing.assert_close(weights, reference(steps=5)[0], rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("snapshot_every", [1, 5, 1000])
@pytest.mark.parametrize("workers", [1, 2])
def test_servers_come_back(tmp_path, workers, snapshot_every):
    """Servers killed in the middle, again and again: the result is that without faults, bit for bit.

    From the snapshot alone, from the log alone, and from both. Some pushes meet a server that is gone, and some one
    that had made the step but could not say so: they count once.
    """
    servers = [ServerProcess(tmp_path / str(number)) for number in range(2)]
    addresses = [server.address for server in servers]
    settings = {"workers": workers, "snapshot_every": snapshot_every, "mode": "sync" if workers > 1 else "async"}

    def killing(step):
        if step in (3, 6, 7):
            server = servers[step % 2]
            server.kill()
            server.start()

    try:
        run = [lambda: train(addresses, 0, before=killing, **settings)]
        run += [lambda rank=rank: train(addresses, rank, **settings) for rank in range(1, workers)]
        faulty = together(*run)
        assert [server.process.wait(20) for server in servers] == [0, 0]
    finally:
        for server in servers:
            server.stop()
    serving = Serving(2)
    whole = together(*(lambda rank=rank: train(serving.addresses, rank, **settings) for rank in range(workers)))
    assert torch.equal(faulty[0][0], whole[0][0])
    for one, another in zip(faulty[0][1], whole[0][1], strict=True):
        assert torch.equal(one["momentum_buffer"], another["momentum_buffer"])
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_killed_during_a_push(tmp_path):
    """Kills at no particular moment, while pushes of a constant gradient come one after the other: none is lost, none
    counts twice."""
    server = ServerProcess(tmp_path / "server")
    plain = lambda parameters: torch.optim.SGD(parameters, lr=1.0)  # noqa: E731
    over = threading.Event()
    kills = 0

    def kill():
        nonlocal kills
        pause = torch.Generator().manual_seed(1)
        while not over.wait(0.05 + 0.3 * torch.rand(1, generator=pause).item()) and kills < 4:
            server.kill()
            server.start()
            kills += 1

    def work():
        training = Training([server.address], 0, make_optimizer=plain, mode="async", snapshot_every=50)
        start = torch.cat([p.detach().flatten().clone() for p in training.parameters])
        pushes = 0
        while kills < 4 or pushes < 100:
            gradients = [torch.ones_like(p) for p in training.parameters]
            training.take(training.client.push(0, gradients, training.optimizer.param_groups).result())
            pushes += 1
        over.set()
        return start, pushes, training.end()[0]

    try:
        (start, pushes, weights), _ = together(work, kill)
    finally:
        server.stop()
    # Of whole numbers up to 2^24 the sum of float32 is exact; the start is none.
    torch.testing.assert_close(weights, start - pushes, rtol=1e-6, atol=0.02)
    assert (weights - (start - pushes)).abs().max() < 0.5


@pytest.mark.slow
def test_a_torn_log_is_cut_off(tmp_path):
    """A record that the end of the server cut short was never answered: it is left out, and the rest counts."""
    server = ServerProcess(tmp_path / "server")
    try:
        training = Training([server.address], 0)
        for step in range(6):
            training.step(step)
        server.kill()
        (log,) = (tmp_path / "server").glob("log-*.bin")
        with log.open("ab") as stream:
            stream.write(b"\x10\x00\x00\x00\x00\x00\x00\x00\x20")
        server.start()
        for step in range(6, STEPS):
            training.step(step)
        assert torch.equal(training.end()[0], reference()[0])
    finally:
        server.stop()


@pytest.mark.slow
def test_without_a_snapshot_it_cannot_come_back():
    """A server that has lost the parameters says so, instead of beginning anew."""
    server = ServerProcess()
    try:
        training = Training([server.address], 0, snapshot_every=0)
        training.step(0)
        server.kill()
        server.start()
        with pytest.raises(LightkitError, match="came back without the parameters"):
            training.step(1)
    finally:
        server.stop()


@pytest.mark.slow
def test_a_server_that_stays_away():
    """The worker does not wait for ever."""
    server = ServerProcess()
    training = Training([server.address], 0, patience=1.0)
    server.kill()
    started = time.monotonic()
    with pytest.raises(LightkitError, match=rf"{server.address} did not come back in 1 s"):
        training.step(0)
    assert time.monotonic() - started < 15


def test_a_silent_worker_is_given_up():
    """A host that is cut off sends nothing, not even that it ends: without signs of life the others go on."""
    serving = Serving(1, timeout=1.0)

    def stays():
        training = Training(serving.addresses, 0, workers=2, timeout=1.0)
        for step in range(4):
            training.step(step)
        return training.end()[0]

    def falls_silent():
        training = Training(serving.addresses, 1, workers=2, timeout=1.0)
        training.step(0)
        training.client._ended.set()
        return training

    started = time.monotonic()
    weights, _ = together(stays, falls_silent)
    assert torch.isfinite(weights).all() and time.monotonic() - started < 30


def test_who_never_comes_is_not_waited_for_for_ever():
    """The first steps wait for all workers that the job was told of, for the timeout."""
    serving = Serving(1, timeout=1.0)
    started = time.monotonic()
    weights, _ = train(serving.addresses, 0, workers=2, timeout=1.0)
    assert torch.isfinite(weights).all() and 0.5 < time.monotonic() - started < 30


def test_refusals():
    """Each a clear error within seconds: the secret, the model, the mode, a place that is taken."""
    serving = Serving(1)
    with pytest.raises(ConfigError, match="the secret is not that of the server"):
        Training(serving.addresses, 0, secret="another")
    first = Training(serving.addresses, 0, workers=2)
    wide = lambda parameters: torch.optim.SGD(list(parameters)[:2], lr=0.1)  # noqa: E731
    with pytest.raises(ConfigError, match="another model, of 2 parameters instead of 4"):
        Training(serving.addresses, 1, make_optimizer=wide, workers=2)
    with pytest.raises(ConfigError, match=r"the optimizer is lightkit\.optim\.adam\.Adam at this worker"):
        Training(serving.addresses, 1, make_optimizer=adam, workers=2)
    with pytest.raises(ConfigError, match="mode is async at this worker and sync at the others"):
        Training(serving.addresses, 1, workers=2, mode="async")
    with pytest.raises(ConfigError, match="other options that are numbers"):
        Training(serving.addresses, 1, make_optimizer=other_numbers, workers=2)
    with pytest.raises(ConfigError, match="there is a worker 0 already"):
        Training(serving.addresses, 0, workers=2)
    first.client.abandon()


def test_another_version(monkeypatch):
    """Workers and servers of different releases do not begin."""
    import lightkit.parameter_server.rendezvous as rendezvous

    class Release:
        @property
        def __version__(self):
            is_worker = threading.current_thread().name.startswith("lightkit-parameter-server")
            return "9.9" if is_worker else "1.0"

    monkeypatch.setattr(rendezvous, "lightkit", Release())
    serving = Serving(1)
    with pytest.raises(ConfigError, match=r"the worker has lightkit 9\.9, the server 1\.0"):
        Training(serving.addresses, 0)


assert BATCH % 6 == 0, "equal parts for 1, 2 and 3 workers"
