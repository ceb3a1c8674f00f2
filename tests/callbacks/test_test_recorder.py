"""The outputs of a test on several processes, merged."""

from __future__ import annotations

import pytest
import torch

from lightkit.callbacks.test_recorder import _interleave


@pytest.mark.parametrize("total", [0, 1, 6, 7, 8])
def test_in_the_order_of_the_data(total):
    """Parts that were dealt out in turns are interleaved, of equal lengths or not."""
    data = torch.randn(total, 3)
    assert torch.equal(_interleave([data[rank::3] for rank in range(3)]), data)


def test_parts_dealt_out_otherwise():
    """Other parts are not merged, since their order is unknown."""
    assert len(_interleave([torch.zeros(5), torch.zeros(2)])) == 0
