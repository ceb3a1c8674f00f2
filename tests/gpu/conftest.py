"""What runs on a GPU alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def gpu() -> Iterator[None]:
    """Where there is none, these tests are skipped; tensors lie on it unless told otherwise."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    with torch.device("cuda"):
        yield
