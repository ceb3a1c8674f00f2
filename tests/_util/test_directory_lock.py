"""Locks of directories."""

from __future__ import annotations

import os

from lightkit._util import directory_lock
from lightkit._util.directory_lock import hold, is_held_by_another, release


def test_one_writer(tmp_path):
    """A directory is held by one process until that releases it or ends, however it ends."""
    assert hold(tmp_path) and hold(tmp_path) and not is_held_by_another(tmp_path)
    reader, writer = os.pipe()
    if (pid := os.fork()) == 0:
        directory_lock._held.clear()
        os.write(writer, b"%d" % is_held_by_another(tmp_path))
        os._exit(0)
    assert os.read(reader, 1) == b"1"
    os.waitpid(pid, 0)
    release(tmp_path)
    if (pid := os.fork()) == 0:
        os.write(writer, b"%d" % hold(tmp_path))
        os.read(os.pipe()[0], 1)
    assert os.read(reader, 1) == b"1"
    assert is_held_by_another(tmp_path) and not hold(tmp_path)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    assert hold(tmp_path)
    release(tmp_path)
