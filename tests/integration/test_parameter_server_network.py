"""A parameter server and two workers on two machines, which are network namespaces, while the cable is cut."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
from network import Network, why_not
from pushing import SECRET

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif((reason := why_not()) is not None, reason=str(reason)),
]

ADDRESS = f"{Network.addresses[0]}:29650"
TIMEOUT = 3.0


class Pushing:
    """A server and worker 0 on one machine and worker 1 on the other; the workers push until `stop`."""

    def __init__(self, network, directory, mode):
        self.directory = directory
        environment = {"LIGHTKIT_SECRET": SECRET}
        host, port = ADDRESS.split(":")
        serve = [sys.executable, "-m", "lightkit.parameter_server", "--host", host, "--port", port]
        self.server = network.start(
            0, [*serve, "--timeout", str(TIMEOUT)], directory, directory / "server", environment
        )
        program = [sys.executable, str(Path(__file__).with_name("pushing.py")), ADDRESS]
        settings = ["--until", str(directory / "stop"), "--workers=2", f"--mode={mode}", "--snapshot-every=0"]
        self.workers = [
            network.start(
                rank,
                [*program, str(rank), str(directory / f"diary{rank}"), *settings, f"--timeout={TIMEOUT}"],
                directory,
                directory / f"worker{rank}",
                environment,
            )
            for rank in (0, 1)
        ]

    def wait_for_pushes(self, *ranks, seconds=60):
        """Waits until each of the workers has received another reply."""
        before = {rank: self.pushes(rank) for rank in ranks}
        end = time.monotonic() + seconds
        while any(self.pushes(rank) <= count for rank, count in before.items()):
            assert time.monotonic() < end, self.said()
            assert all(process.poll() is None for process in (self.server, *self.workers)), self.said()
            time.sleep(0.05)

    def pushes(self, rank):
        path = self.directory / f"diary{rank}"
        return path.read_text().count('"push"') if path.exists() else 0

    def stop(self):
        """Ends all processes and returns the server's count of pushes."""
        (self.directory / "stop").touch()
        assert [process.wait(60) for process in (*self.workers, self.server)] == [0, 0, 0], self.said()
        ends = [json.loads((self.directory / f"diary{rank}").read_text().splitlines()[-1]) for rank in (0, 1)]
        assert ends[0]["counts"] == ends[1]["counts"]
        (count,) = ends[0]["counts"]
        return count

    def said(self):
        return "\n".join((self.directory / name).read_text() for name in ("server", "worker0", "worker1"))


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_worker_is_cut_off(tmp_path, mode):
    """The other worker continues after the timeout, the cut-off one rejoins, and each acknowledged push counts once."""
    with Network() as network:
        pushing = Pushing(network, tmp_path, mode)
        pushing.wait_for_pushes(0, 1)
        network.cut(1)
        end = time.monotonic() + 30
        while "worker 1 sent no heartbeat for 3 s: continuing without it" not in pushing.said():
            assert time.monotonic() < end, pushing.said()
            time.sleep(0.1)
        pushing.wait_for_pushes(0)
        alone = pushing.pushes(1)
        network.mend(1)
        pushing.wait_for_pushes(0, 1)
        count = pushing.stop()
    assert pushing.pushes(1) > alone
    if mode == "sync":
        # A step has one push of each worker; worker 1 may make one more after worker 0 has stopped.
        assert count - pushing.pushes(0) in (0, 1)
    else:
        assert count == pushing.pushes(0) + pushing.pushes(1)


def test_a_short_cut_is_waited_for(tmp_path):
    """The connections survive a cut that is shorter than the timeout."""
    with Network() as network:
        pushing = Pushing(network, tmp_path, "sync")
        pushing.wait_for_pushes(0, 1)
        network.cut(1)
        time.sleep(TIMEOUT / 3)
        network.mend(1)
        pushing.wait_for_pushes(0, 1)
        count = pushing.stop()
    assert "is gone" not in pushing.said() and "continuing without" not in pushing.said()
    # One worker may stop a push before the other.
    assert count == max(pushing.pushes(0), pushing.pushes(1)) <= min(pushing.pushes(0), pushing.pushes(1)) + 1
