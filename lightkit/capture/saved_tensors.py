"""The functions by which a program packs the tensors that autograd saves, such as those of torch's checkpointing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_autograd: Any = torch._C._autograd  # pyright: ignore[reportAttributeAccessIssue]
_top_hooks = _autograd._top_saved_tensors_default_hooks


def are_saved_tensors_packed() -> bool:
    """Returns True within `torch.autograd.graph.saved_tensors_hooks` and what is built on it."""
    return _top_hooks(True) is not None


@contextmanager
def unpacked_saved_tensors() -> Iterator[None]:
    """Saves tensors as they are within the context."""
    taken = []
    while (hooks := _top_hooks(True)) is not None:
        taken.append(hooks)
        _autograd._pop_saved_tensors_default_hooks()
    try:
        yield
    finally:
        for hooks in reversed(taken):
            _autograd._push_saved_tensors_default_hooks(*hooks)
