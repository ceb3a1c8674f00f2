"""Tells what torch itself can do on this processor."""

from __future__ import annotations

import functools

import pytest
import torch


@functools.cache
def _runs_lstm_in_bfloat16() -> bool:
    try:
        with torch.autocast("cpu", torch.bfloat16):
            torch.nn.LSTM(8, 8)(torch.zeros(2, 2, 8))
    except RuntimeError:
        return False
    return True


def skip_without_bfloat16_lstm() -> None:
    """Skips a test where torch has no LSTM under autocast: oneDNN has none for processors with AVX2 alone."""
    if not _runs_lstm_in_bfloat16():
        pytest.skip("torch has no bfloat16 LSTM for this processor")
