"""Masks on servers: they come with a push, stay over restarts, and reach every worker with the parameters."""

from __future__ import annotations

import threading

import pytest
import torch
from workers import ServerProcess, Serving, Training, adam, sgd, together

import lightkit.optim
from lightkit.parameter_server.durable_state import Update
from lightkit.parameter_server.mask_update import MaskUpdate
from lightkit.parameter_server.protocol import Request


def masks_for(parameters, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(p.shape, generator=generator) < 0.5 if p.dim() > 1 else None for p in parameters]


def is_masked(parameters, masks):
    return all(mask is None or bool((p[~mask] == 0).all()) for p, mask in zip(parameters, masks, strict=True))


def averaging(parameters):
    return lightkit.optim.SGD(parameters, lr=0.1, momentum=0.9, ema_decay=0.9)


@pytest.mark.parametrize("make", [sgd, adam, averaging])
@pytest.mark.parametrize("servers", [1, 2])
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_masks_come_with_the_next_push(make, servers, mode):
    """The update with the push after `set_masks` sets the masks, and no later one moves a masked weight."""
    training = Training(Serving(servers).addresses, 0, make, workers=1, mode=mode)
    training.step(0)
    masks = masks_for(training.parameters)
    training.client.set_masks(0, 1, masks)
    assert training.client.mask_number(0) == 0 and not is_masked(training.parameters, masks)
    for step in range(1, 5):
        training.step(step)
        assert training.client.mask_number(0) == 1 and is_masked(training.parameters, masks)
    found = training.client.masks(0)
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(found, masks, strict=True))
    (state,) = training.client.state()
    assert is_masked(state.values, masks)
    averages = [entry["average"] for entry in state.state if "average" in entry]
    assert not averages or is_masked(averages, masks)
    training.end()


def test_all_workers_get_zeros_after_the_same_update():
    """In sync the masks of worker 0 are set by the update with its push, for the other worker in the same step."""
    serving, barrier = Serving(2), threading.Barrier(2, timeout=20)

    def run(rank):
        training = Training(serving.addresses, rank, workers=2)
        masks, zeros = masks_for(training.parameters), []
        for step in range(6):
            if step == 3 and rank == 0:
                training.client.set_masks(0, 1, masks)
            barrier.wait()
            training.step(step)
            zeros.append((training.client.mask_number(0), is_masked(training.parameters, masks)))
        return zeros, training.end()[0]

    (first, weights), (second, others) = together(lambda: run(0), lambda: run(1))
    assert first == second == [(0, False)] * 3 + [(1, True)] * 3
    assert torch.equal(weights, others)


def test_a_late_worker_gets_zeros():
    """A worker that joins after the masks begins with zeros, knows their number, and finds the masks."""
    serving = Serving(1)
    training = Training(serving.addresses, 0, mode="async", workers=2)
    masks = masks_for(training.parameters)
    training.client.set_masks(0, 2, masks)
    training.step(0)
    late = Training(serving.addresses, 1, mode="async", workers=2)
    assert late.client.mask_number(0) == 2 and is_masked(late.parameters, masks)
    # Older masks of another worker change nothing.
    late.client.set_masks(0, 1, masks_for(training.parameters, seed=9))
    late.step(0)
    assert is_masked(late.parameters, masks)
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(late.client.masks(0), masks, strict=True))
    together(training.end, late.end)


@pytest.mark.slow
@pytest.mark.parametrize("snapshot_every", [1, 1000])
def test_killed_servers_keep_masks(tmp_path, snapshot_every):
    """A training with servers that are killed around the masks is that without faults, to the bit, masks included."""
    settings = {"mode": "async", "workers": 1, "patience": 120.0, "snapshot_every": snapshot_every}

    def trained(addresses, kill):
        training = Training(addresses, 0, **settings)
        for step in range(8):
            if step in (2, 5):
                training.client.set_masks(0, step, masks_for(training.parameters, step))
            if step in (2, 3, 6):
                kill(step)
            training.step(step)
            masks = masks_for(training.parameters, 5 if step >= 5 else 2)
            assert step < 2 or is_masked(training.parameters, masks)
        return training.end()[0]

    servers = [ServerProcess(tmp_path / str(number)) for number in range(2)]

    def kill(step):
        servers[step % 2].kill()
        servers[step % 2].start()

    try:
        faulty = trained([server.address for server in servers], kill)
        assert [server.process.wait(20) for server in servers] == [0, 0]
    finally:
        for server in servers:
            server.stop()
    assert torch.equal(faulty, trained(Serving(2).addresses, lambda step: None))


def test_updates_are_written_with_their_masks():
    """An update of the log has the masks as JSON, and one of the previous release has none."""
    masks = MaskUpdate(3, [torch.tensor([5, 200], dtype=torch.uint8), None])
    update = Update(0, False, [0.1], [True, True], {}, masks)
    again = Update.from_json(update.to_json()).masks
    assert again.number == 3 and again.packed[1] is None and torch.equal(again.packed[0], masks.packed[0])
    plain = Update(0, False, [0.1], [True, True], {}).to_json()
    assert "masks" not in plain and Update.from_json(plain).masks is None


@pytest.mark.parametrize(
    "packed",
    [[], "x", [None] * 3, [torch.zeros(5), None, None, None], [torch.zeros(4, dtype=torch.uint8), None, None, None]],
)
def test_masks_that_do_not_fit(packed):
    """A server refuses a worker whose masks have another size or type, and goes on with the others."""
    serving = Serving(1)
    training = Training(serving.addresses, 0, mode="async", workers=1)

    def exchange(connection):
        connection.send_header(Request.MASK, 0, 1)
        connection.send_message(packed)
        connection.receive_header()
        return connection.receive_message()

    (session,) = training.client._sessions
    assert set(session._exchange(exchange)) == {"error"}
    session._connection.close()
    session._connection = None
    training.step(0)
    assert training.client.mask_number(0) == 0
    training.end()
