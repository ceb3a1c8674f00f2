"""Fixtures of the parameter server's tests."""

from __future__ import annotations

import pytest
from workers import stop_serving


@pytest.fixture(autouse=True)
def servers_end():
    """Stops the servers of a test in threads of this process: none may outlive the interpreter."""
    yield
    stop_serving()
