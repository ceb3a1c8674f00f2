"""Failures of servers and workers during a training: who recovers, who continues, and who is refused."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from workers import STEPS, ServerProcess, Serving, Training, adam, reference, sgd, together, train

from lightkit.errors import ConfigError, LightkitError


def other_hyperparameters(parameters):
    """Makes an optimizer with fewer options that are numbers."""
    optimizer = sgd(parameters)
    optimizer.param_groups[0]["dampening"] = None
    return optimizer


def test_workers_come_and_go():
    """In sync, one of two workers disappears and the other continues alone; both continue with a replacement."""
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
        # The connections break, as at the end of the process.
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


def test_a_replacement_counts_anew():
    """The server does not count a push of the lost worker for its replacement, and counts all of the replacement's."""
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
        # The worker goes when the server has its third push, and not the other worker's.
        training.client.push(0, training.gradients(2), training.optimizer.param_groups)
        while not server.status().workers[1].pending:
            time.sleep(0.01)
        training.client.abandon()
        while 1 in server.status().connected:
            time.sleep(0.01)
        again = Training(serving.addresses, 1, workers=2)
        goes_on.set()
        # The other worker pushes first, and waits for this one.
        time.sleep(0.3)
        for step in (2, 3, 4):
            again.step(step)
        return again.end()

    (weights, _), _ = together(stays, comes_and_goes)
    assert server.status().workers[1].pushes == (3,) and server.status().versions == (5,)
    # Every step has gradients of both.
    torch.testing.assert_close(weights, reference(steps=5)[0], rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("snapshot_every", [1, 5, 1000])
@pytest.mark.parametrize("workers", [1, 2])
def test_killed_servers_recover(tmp_path, workers, snapshot_every):
    """A training with repeatedly killed servers gives the result of one without faults, bit for bit.

    The servers recover from the snapshot alone, from the log alone, and from both. Some pushes reach no server, and
    some get no reply for a step that the server has made: each counts once.
    """
    servers = [ServerProcess(tmp_path / str(number)) for number in range(2)]
    addresses = [server.address for server in servers]
    settings = {"workers": workers, "snapshot_every": snapshot_every, "mode": "sync" if workers > 1 else "async"}
    # On a crowded machine a server needs many seconds to start.
    settings["patience"] = 120.0

    def killing(step):
        if step in (3, 6, 7):
            server = servers[step % 2]
            server.kill()
            server.start()

    try:
        run = [lambda: train(addresses, 0, before=killing, **settings)]
        run += [lambda rank=rank: train(addresses, rank, **settings) for rank in range(1, workers)]
        faulty = together(*run, timeout=240)
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
    """A server that is killed at random moments during pushes of a constant gradient counts each push once."""
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
        training = Training([server.address], 0, make_optimizer=plain, mode="async", snapshot_every=50, patience=120.0)
        start = torch.cat([p.detach().flatten().clone() for p in training.parameters])
        pushes = 0
        while kills < 4 or pushes < 100:
            gradients = [torch.ones_like(p) for p in training.parameters]
            training.take(training.client.push(0, gradients, training.optimizer.param_groups).result())
            pushes += 1
        over.set()
        return start, pushes, training.end()[0]

    try:
        (start, pushes, weights), _ = together(work, kill, timeout=240)
    finally:
        server.stop()
    # float32 adds whole numbers exactly up to 2^24; the initial weights are no whole numbers.
    torch.testing.assert_close(weights, start - pushes, rtol=1e-6, atol=0.02)
    assert (weights - (start - pushes)).abs().max() < 0.5


@pytest.mark.slow
def test_an_incomplete_record_is_left_out(tmp_path):
    """A record that the end of the server cut short has no reply: the server leaves it out, and uses the rest."""
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
def test_a_server_without_a_snapshot_cannot_recover():
    """The worker gets an error, and the training does not begin anew."""
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
    """The worker waits for its patience, not for ever."""
    server = ServerProcess()
    training = Training([server.address], 0, patience=1.0)
    server.kill()
    started = time.monotonic()
    with pytest.raises(LightkitError, match=rf"{server.address} did not come back in 1 s"):
        training.step(0)
    assert time.monotonic() - started < 15


def test_a_silent_worker_is_dropped():
    """A disconnected host sends no end of the connection: the others continue after the timeout."""
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


def test_a_worker_that_never_comes():
    """The first steps wait for all workers of the specification, for the timeout at most."""
    serving = Serving(1, timeout=1.0)
    started = time.monotonic()
    weights, _ = train(serving.addresses, 0, workers=2, timeout=1.0)
    assert torch.isfinite(weights).all() and 0.5 < time.monotonic() - started < 30


def test_refusals():
    """A wrong secret, model, optimizer, mode or rank is a clear error within seconds."""
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
        Training(serving.addresses, 1, make_optimizer=other_hyperparameters, workers=2)
    with pytest.raises(ConfigError, match="there is a worker 0 already"):
        Training(serving.addresses, 0, workers=2)
    first.client.abandon()


def test_another_version(monkeypatch):
    """Workers and servers of different releases refuse each other."""
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
