"""Runs a computation with several numbers of torch's threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# More than a machine of the tests has cores: the parts are then not the threads.
COUNTS = (1, 2, 3, 7, 2)


def assert_same_with_any_threads(compute: Callable[[], Sequence[Tensor]], counts: Sequence[int] = COUNTS) -> None:
    """Fails unless the tensors that ``compute()`` returns are the same, bit for bit, with each number of threads."""
    before = torch.get_num_threads()
    try:
        results = []
        for count in counts:
            torch.set_num_threads(count)
            results.append([tensor.clone() for tensor in compute()])
    finally:
        torch.set_num_threads(before)
    for count, result in zip(counts[1:], results[1:], strict=True):
        for one, other in zip(results[0], result, strict=True):
            assert torch.equal(one, other), f"{count} threads compute something else than {counts[0]}"
