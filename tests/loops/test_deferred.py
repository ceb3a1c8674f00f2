"""Running values that wait, against Lightning's own at every step."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.trainer.connectors.logger_connector.result import _Metadata, _ResultMetric, _Sync

from lightkit.loops import deferred
from lightkit.loops.deferred import DeferredMetric, defer, settle


def make(on_step=True, on_epoch=True, reduce_fx=torch.mean, sync=False) -> _ResultMetric:
    meta = _Metadata(fx="training_step", name="x", on_step=on_step, on_epoch=on_epoch, reduce_fx=reduce_fx)
    meta.sync = _Sync(_should=sync)
    return _ResultMetric(meta, is_tensor=True)


def state(metric: _ResultMetric) -> list:
    """Everything that Lightning looks at, to the bit."""
    values = [metric.value, metric.cumulated_batch_size if metric.meta.is_mean_reduction else None]
    values += [metric._forward_cache, metric._update_count, metric.has_reset, metric._computed]
    return [
        (v.dtype, v.view(torch.int32).item()) if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for v in values
    ]


NUMBERS = st.floats(width=32, allow_nan=True, allow_infinity=True)


@given(
    steps=st.lists(st.tuples(NUMBERS, st.integers(1, 2**26)), max_size=30),
    looks=st.sets(st.integers(0, 30)),
    levels=st.sampled_from([(True, True), (True, False), (False, True)]),
)
def test_the_same_to_the_bit_whenever_somebody_looks(steps, looks, levels):
    """Values of any size, NaN and infinity among them, however many wait."""
    own, ours = make(*levels), make(*levels)
    assert DeferredMetric.fits(ours)
    defer(ours)
    for index, (value, size) in enumerate(steps):
        own.update(torch.tensor(value, dtype=torch.float32), size)
        own.has_reset = False
        ours.wait(torch.tensor(value, dtype=torch.float32).item(), size)
        if index in looks:
            assert state(ours) == state(own)
    settle(ours)
    assert type(ours) is _ResultMetric
    assert "_waiting" not in vars(ours)
    assert state(ours) == state(own)
    assert vars(ours).keys() == vars(own).keys()


def test_so_many_do_not_wait_for_ever(monkeypatch):
    """An epoch of any length takes no more memory than some of its steps."""
    monkeypatch.setattr(deferred, "_MOST_WAITING", 8)
    metric = make()
    defer(metric)
    for step in range(100):
        metric.wait(float(step), 2)
        assert len(metric._waiting) < 8
    assert metric.cumulated_batch_size == 200
    assert metric.value == 2 * sum(range(100))


@pytest.mark.parametrize(
    "metric",
    [make(reduce_fx=torch.max), make(reduce_fx=torch.sum), make(sync=True)],
)
def test_what_is_more_than_a_mean_does_not_wait(metric):
    """Other reductions, and those that ask other processes, are Lightning's."""
    assert not DeferredMetric.fits(metric)


def test_sizes_and_dtypes_that_add_up_to_something_else():
    """Floats, NumPy's integers, tensors; values in another dtype, now or before."""
    metric = make()
    defer(metric)
    one = torch.tensor(1.0)
    assert metric.can_wait(one, 3)
    assert not any(metric.can_wait(one, size) for size in (3.0, np.uint8(3), torch.tensor(3), True))
    assert not metric.can_wait(one.double(), 3) and not metric.can_wait(one.half(), 3)
    _ResultMetric.update(metric, one.double(), 3)
    assert not metric.can_wait(one, 3)


def test_attributes_that_are_not_there():
    """Are not there, as with Lightning's."""
    metric = make(on_step=True, on_epoch=False, reduce_fx=torch.sum)
    defer(metric)
    assert not hasattr(metric, "cumulated_batch_size")


def test_other_dtypes_do_not_wait():
    """The sums are those of float32."""
    metric = make()
    metric.value = metric.value.double()
    assert not DeferredMetric.fits(metric)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_and_resets(duplicate):
    """A copy has the values that waited; a reset forgets them."""
    metric = make()
    defer(metric)
    metric.wait(1.5, 4)
    other = duplicate(metric)
    assert other.value == 6 and other.cumulated_batch_size == 4
    metric.wait(1.0, 1)
    metric.reset()
    assert metric.value == 0 and metric.cumulated_batch_size == 0
    metric.wait(2.0, 3)
    assert metric.value == 6 and metric._forward_cache == 2
