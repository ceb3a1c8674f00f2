"""Machines for tests: Linux network namespaces with a virtual cable between them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path


def why_not() -> str | None:
    """Returns the reason why this machine cannot make network namespaces, or None if it can."""
    if shutil.which("ip") is None:
        return "no ip: install iproute2"
    result = subprocess.run(["unshare", "-n", "true"], capture_output=True, text=True)
    if result.returncode:
        return f"no network namespaces: {result.stderr.strip()}"
    probe = subprocess.run(["ip", "netns", "add", name := f"lightkit{os.getpid()}"], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "delete", name], capture_output=True)
    return f"ip netns: {probe.stderr.strip()}" if probe.returncode else None


class Network:
    """Two machines, ``10.77.0.1`` and ``10.77.0.2``; each has one end of the cable as the interface ``cable``."""

    addresses = ("10.77.0.1", "10.77.0.2")

    def __init__(self) -> None:
        self.names = [f"lk{os.getpid()}n{node}" for node in (0, 1)]
        self.started: list[subprocess.Popen] = []

    def __enter__(self) -> Network:
        try:
            for name in self.names:
                ip("netns", "add", name)
            here, there = self.names
            ip("link", "add", "cable", "netns", here, "type", "veth", "peer", "name", "cable", "netns", there)
            for name, address in zip(self.names, self.addresses, strict=True):
                ip("-n", name, "address", "add", f"{address}/24", "dev", "cable")
                ip("-n", name, "link", "set", "cable", "up")
                ip("-n", name, "link", "set", "lo", "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *unused: object) -> None:
        for process in self.started:
            process.kill()
            process.wait()
        for name in self.names:
            # A killed torchrun leaves processes behind.
            pids = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout.split()
            for pid in pids:
                subprocess.run(["kill", "-KILL", pid], capture_output=True)
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)

    def start(
        self, node: int, command: list[str], cwd: Path, log: Path, environment: dict[str, str] | None = None
    ) -> subprocess.Popen:
        """Starts a command on one of the machines; its output goes to a file."""
        # The commands torchrun and python lie beside the interpreter of the tests.
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        with log.open("w") as file:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.names[node], *command],
                cwd=cwd,
                env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", **(environment or {})},
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
            )
        self.started.append(process)
        return process

    def cut(self, node: int) -> None:
        """Unplugs the cable from a machine."""
        ip("-n", self.names[node], "link", "set", "cable", "down")

    def mend(self, node: int) -> None:
        """Plugs the cable in again."""
        ip("-n", self.names[node], "link", "set", "cable", "up")


def ip(*words: str) -> None:
    """Runs ``ip`` and raises an error if it fails."""
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)
