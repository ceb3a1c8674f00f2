"""The outputs of a test on several processes, merged."""

from __future__ import annotations

import pytest
import torch

from lightkit.callbacks import TestRecorder
from lightkit.callbacks.test_recorder import _interleave


@pytest.mark.parametrize("total", [0, 1, 6, 7, 8])
def test_in_the_order_of_the_data(total):
    """Parts that were dealt out in turns are interleaved, of equal lengths or not."""
    data = torch.randn(total, 3)
    assert torch.equal(_interleave([data[rank::3] for rank in range(3)]), data)


def test_parts_dealt_out_otherwise():
    """Other parts are not merged, since their order is unknown."""
    assert len(_interleave([torch.zeros(5), torch.zeros(2)])) == 0


@pytest.mark.parametrize(
    ("dtype", "kept"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.int64, torch.int64),
    ],
)
def test_dtypes(dtype, kept):
    """Forecasts stay float64, since float32 cannot hold every series; NumPy has no bfloat16."""
    recorder = TestRecorder()
    recorder.on_test_batch_end(None, None, {"x": torch.ones(2, dtype=dtype)}, None, 0)
    assert recorder.result()["x"].dtype == kept


@pytest.mark.parametrize(
    "outputs",
    [
        {"loss": torch.tensor(1.0)},
        {"logits": torch.zeros(2, 3), "samples": 2},
        {"logits": torch.zeros(2, 3), "labels": torch.zeros(4)},
        torch.tensor(1.0),
    ],
)
def test_outputs_of_other_tasks(outputs):
    """A task of a user's returns what it likes from ``test_step``; what has no samples is left out."""
    recorder = TestRecorder()
    recorder.on_test_batch_end(None, None, outputs, None, 0)
    assert recorder.result() == {}


def test_outputs_of_several_shapes():
    """Outputs that differ in shape between batches cannot be one tensor, and end no test."""
    recorder = TestRecorder()
    for length in (3, 4):
        recorder.on_test_batch_end(None, None, {"x": torch.zeros(2, length), "y": torch.zeros(2)}, None, 0)
    assert set(recorder.result()) == {"y"}
