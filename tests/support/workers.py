"""Deals the tests out to the workers of pytest-xdist, in the groups and the order in which they were collected.

xdist's own ``--dist=loadgroup`` does not know the groups of pytest 9.2: it writes them into a field that has gone. Here
a worker writes the group of each test into a file, which the scheduler reads.
"""

from __future__ import annotations

import fcntl
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from xdist.scheduler import LoadScopeScheduling


def _place(workerinput: dict) -> Path:
    """The path of the files that the processes of one run share, without a suffix."""
    return Path(tempfile.gettempdir()) / f"lightkit-tests-{workerinput['testrunuid']}"


def publish_groups(config: pytest.Config, groups: dict[str, str]) -> None:
    """Writes which group each test belongs to, by node id; only the first worker of a run does."""
    workerinput = getattr(config, "workerinput", {})
    if workerinput.get("workerid") == "gw0":
        _place(workerinput).with_suffix(".groups").write_text(json.dumps(groups))


@contextmanager
def turn(config: pytest.Config, is_alone: bool) -> Iterator[None]:
    """Waits for this process's turn to run a test: if ``is_alone``, until no other worker runs one."""
    workerinput = getattr(config, "workerinput", None)
    if workerinput is None:
        yield
        return
    with _place(workerinput).with_suffix(".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX if is_alone else fcntl.LOCK_SH)
        yield


class GroupScheduling(LoadScopeScheduling):
    """Gives a worker that has nothing left to do the next group."""

    _groups: dict[str, str]
    _shared: Path | None = None

    def schedule(self) -> None:
        if self.collection is None:
            self._shared = _place(self.nodes[0].workerinput)
            self._groups = json.loads(self._shared.with_suffix(".groups").read_text())
        super().schedule()

    def _split_scope(self, nodeid: str) -> str:
        return self._groups[nodeid]

    def remove_files(self) -> None:
        """Removes what the processes of the run shared."""
        for suffix in (".groups", ".lock") if self._shared is not None else ():
            self._shared.with_suffix(suffix).unlink(missing_ok=True)
