"""Compares lazy running values with Lightning's own at every step."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.trainer.connectors.logger_connector.result import _Metadata, _ResultMetric, _Sync

from lightkit.loops import lazy_metrics
from lightkit.loops.lazy_metrics import LazyMetric, make_eager, make_lazy


def make(on_step=True, on_epoch=True, reduce_fx=torch.mean, sync=False) -> _ResultMetric:
    meta = _Metadata(fx="training_step", name="x", on_step=on_step, on_epoch=on_epoch, reduce_fx=reduce_fx)
    meta.sync = _Sync(_should=sync)
    return _ResultMetric(meta, is_tensor=True)


def state(metric: _ResultMetric) -> list:
    """Returns everything that Lightning reads of a metric, to the bit."""
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
def test_flushed_values_equal_lightnings_to_the_bit(steps, looks, levels):
    """Any values, NaN and infinity among them, and any number of pending values give Lightning's state."""
    own, ours = make(*levels), make(*levels)
    assert LazyMetric.supports(ours)
    make_lazy(ours)
    for index, (value, size) in enumerate(steps):
        own.update(torch.tensor(value, dtype=torch.float32), size)
        own.has_reset = False
        ours.append(torch.tensor(value, dtype=torch.float32).item(), size)
        if index in looks:
            assert state(ours) == state(own)
    make_eager(ours)
    assert type(ours) is _ResultMetric
    assert "_pending" not in vars(ours)
    assert state(ours) == state(own)
    assert vars(ours).keys() == vars(own).keys()


def test_the_number_of_pending_values_is_bounded(monkeypatch):
    """An epoch of any length takes the memory of a fixed number of steps."""
    monkeypatch.setattr(lazy_metrics, "_MAX_PENDING", 8)
    metric = make()
    make_lazy(metric)
    for step in range(100):
        metric.append(float(step), 2)
        assert len(metric._pending) < 8
    assert metric.cumulated_batch_size == 200
    assert metric.value == 2 * sum(range(100))


@pytest.mark.parametrize(
    "metric",
    [make(reduce_fx=torch.max), make(reduce_fx=torch.sum), make(sync=True)],
)
def test_other_reductions_are_not_supported(metric):
    """Lightning computes reductions other than the mean, and those over several processes."""
    assert not LazyMetric.supports(metric)


def test_other_batch_sizes_and_dtypes_are_not_appended():
    """A batch size that is no int, or a value of another dtype, would give other sums."""
    metric = make()
    make_lazy(metric)
    one = torch.tensor(1.0)
    assert metric.can_append(one, 3)
    assert not any(metric.can_append(one, size) for size in (3.0, np.uint8(3), torch.tensor(3), True))
    assert not metric.can_append(one.double(), 3) and not metric.can_append(one.half(), 3)
    _ResultMetric.update(metric, one.double(), 3)
    assert not metric.can_append(one, 3)


def test_an_absent_attribute_stays_absent():
    """Lightning's metric without a mean has no batch size, and the lazy one has none either."""
    metric = make(on_step=True, on_epoch=False, reduce_fx=torch.sum)
    make_lazy(metric)
    assert not hasattr(metric, "cumulated_batch_size")


def test_other_dtypes_are_not_supported():
    """A flush computes in float32."""
    metric = make()
    metric.value = metric.value.double()
    assert not LazyMetric.supports(metric)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_and_resets(duplicate):
    """A copy has the pending values accumulated; a reset drops them."""
    metric = make()
    make_lazy(metric)
    metric.append(1.5, 4)
    other = duplicate(metric)
    assert other.value == 6 and other.cumulated_batch_size == 4
    metric.append(1.0, 1)
    metric.reset()
    assert metric.value == 0 and metric.cumulated_batch_size == 0
    metric.append(2.0, 3)
    assert metric.value == 6 and metric._forward_cache == 2
