"""Connections and workers that come to an end while others wait: who is told, who goes on, and what ends with them."""

from __future__ import annotations

import copy
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from lightkit.errors import ConfigError, LightkitError
from lightkit.parameter_server import Client
from lightkit.parameter_server.client import Clipping
from lightkit.parameter_server.job import options_of
from lightkit.parameter_server.shard import Shard
from lightkit.parameter_server.transport import TransportError

sys.path.insert(0, str(Path(__file__).parent))
from workers import SECRET, Serving, Training, stop_serving, together


@pytest.fixture(autouse=True)
def servers_end():
    yield
    stop_serving()


def until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def in_background(function):
    """Runs it; what it raised is in the list that is returned."""
    errors = []

    def run():
        try:
            function()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, errors


def test_connecting_anew_during_a_round():
    """The new connection takes the place of the old one, once: they do not push each other out."""
    serving = Serving(1)
    (server,) = serving.servers
    first = Training(serving.addresses, 0, workers=2)
    second = Training(serving.addresses, 1, workers=2)
    in_background(lambda: first.step(0))
    until(lambda: 0 in server._rounds[0].pushes)
    first.client.abandon()
    # The same worker by another connection, as after one that broke.
    again = copy.copy(first)
    again.client = Client(serving.addresses, SECRET, 0, first.client._job, 5.0)
    again.client._channels[0]._who["incarnation"] = first.client._channels[0]._who["incarnation"]
    assert not again.client.start([options_of(first.optimizer)], [[p.detach() for p in first.parameters]])
    new, errors = in_background(lambda: again.step(0))
    until(lambda: len(server._links) == 2)
    time.sleep(0.5)
    inboxes = {id(server._rounds[0].pushes[0][0]) for _ in range(50) if time.sleep(0.005) is None}
    assert len(inboxes) == 1
    second.step(0)
    new.join(20)
    assert not errors and not new.is_alive() and server._versions == [1]
    together(again.end, second.end)


def test_a_failed_step_is_told_to_all(monkeypatch):
    """In sync nobody goes on with parameters that were not updated."""
    serving = Serving(1)
    trainings = [Training(serving.addresses, rank, workers=2) for rank in (0, 1)]

    def fail(*unused):
        raise RuntimeError("the optimizer cannot do that")

    monkeypatch.setattr(Shard, "step", fail)

    def work(training):
        with pytest.raises(ConfigError, match="the optimizer cannot do that"):
            training.step(0)

    together(*(lambda training=training: work(training) for training in trainings))
    for training in trainings:
        training.client.abandon()


def test_the_first_cause_is_told(monkeypatch):
    """With clipping, servers wait for each other: the error is that of the one that failed."""
    serving = Serving(2)
    training = Training(serving.addresses, 0)
    real = serving.servers[1]._average

    def fail(*arguments):
        real(*arguments)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(serving.servers[1], "_average", fail)
    with pytest.raises(ConfigError, match="out of memory"):
        training.step(0, Clipping(max_norm=0.1))
    training.client.abandon()


def test_lost_after_it_has_finished():
    """A worker that waits for the others at the end, and loses its connection, has not ended the job for them."""
    serving = Serving(1, timeout=3.0)
    (server,) = serving.servers
    trainings = [Training(serving.addresses, rank, workers=2, mode="async") for rank in (0, 1)]
    thread, _ = in_background(trainings[0].client.finish)
    until(lambda: server._workers[0].finished)
    with server._changed:
        for rank, link in list(server._links.items()):
            server._remove(rank, link)
    time.sleep(1.0)
    assert serving.threads[0].is_alive()
    trainings[1].step(0)
    together(lambda: thread.join(20), trainings[1].end)
    trainings[0].client.leave()
    serving.threads[0].join(20)
    assert not serving.threads[0].is_alive()


def test_an_end_does_not_wait_for_others():
    """Who is interrupted while it waits for a slow worker is free within a few seconds, and does not come back."""
    serving = Serving(1)
    trainings = [Training(serving.addresses, rank, workers=2) for rank in (0, 1)]
    thread, errors = in_background(lambda: trainings[0].step(0))
    until(lambda: 0 in serving.servers[0]._rounds[0].pushes)
    trainings[0].client.abandon()
    thread.join(15)
    assert not thread.is_alive() and isinstance(errors[0], LightkitError) and not isinstance(errors[0], TransportError)
    # It counts as lost, and the other goes on.
    trainings[1].step(1)
    trainings[1].end()


@pytest.mark.parametrize(("server", "worker"), [(1.0, 20.0), (20.0, 1.0)])
def test_timeouts_need_not_agree(server, worker, monkeypatch):
    """Signs of life come often enough for the less patient of the two: nobody has to connect anew."""
    serving = Serving(1, timeout=server)
    join, joined = serving.servers[0]._join, []
    monkeypatch.setattr(serving.servers[0], "_join", lambda *args: joined.append(1) or join(*args))
    trainings = [Training(serving.addresses, rank, workers=2, timeout=worker) for rank in (0, 1)]

    def slow():
        for step in range(2):
            time.sleep(2.5)
            trainings[1].step(step)
        trainings[1].end()

    def fast():
        for step in range(2):
            trainings[0].step(step)
        trainings[0].end()

    together(slow, fast)
    assert serving.servers[0]._versions == [2] and len(joined) == 2


def test_worker_0_never_comes(monkeypatch):
    """The others do not wait for its parameters for ever."""
    import lightkit.parameter_server.server as module

    monkeypatch.setattr(module, "_BEGIN", 1.0)
    serving = Serving(1, timeout=1.0)
    with pytest.raises(ConfigError, match="worker 0, which brings the parameters, did not come"):
        Training(serving.addresses, 1, workers=2, timeout=1.0)


def test_a_training_that_has_begun():
    """Who comes for worker 0 later is told that the servers have parameters already."""
    serving = Serving(1)
    first = Training(serving.addresses, 0)
    first.step(0)
    weights = torch.cat([p.detach().flatten().clone() for p in first.parameters])
    first.client.abandon()
    until(lambda: not serving.servers[0]._links)
    again = Training(serving.addresses, 0)
    assert not again.begun
    assert torch.equal(weights, torch.cat([p.detach().flatten() for p in again.parameters]))
    again.end()
