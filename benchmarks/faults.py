"""Measures what is lost when a process or the network fails, and how long the work takes to go on.

    python benchmarks/faults.py [--times 3] [--only NAME ...] [--note TEXT]

Workers of a parameter server push gradients of ones, along which SGD steps by one, so that the parameters count the
pushes. Kills come at random moments. ``lost`` is the number of answered pushes that do not count, ``twice`` the number
of counts beyond the pushes that were sent. The seconds are the longest time without an answer after the fault: for the
worker that failed, or for the others where that worker does not return.

Jobs are the documented CNN in two processes, under torchrun. ``lost`` is the number of steps since the last checkpoint,
which is written after each epoch; the seconds are those from the fault to the first batch after it.

Two machines are network namespaces; making them needs privileges.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rows import append
from timing import median

from lightkit.parameter_server.local_servers import LocalServers

# The machines, the worker and the callback are those of the tests.
TESTS = Path(__file__).parents[1] / "tests" / "integration"
sys.path.insert(0, str(TESTS))

from network import Network, why_not  # noqa: E402
from pushing import SECRET  # noqa: E402

TIMEOUT = 30.0
PORT = 29660


def wait_for(condition: Callable[[], Any], what: str, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise SystemExit(f"{what}: not after {seconds:g} s")
        time.sleep(0.01)


class Pushing:
    """Processes of workers that push to servers until `stop`."""

    def __init__(self, directory: Path, addresses: list[str], workers: int, *settings: str, network: Any = None):
        self.directory = directory
        self.workers = []
        for rank in range(workers):
            command = [sys.executable, str(TESTS / "pushing.py"), ",".join(addresses), str(rank), str(self.diary(rank))]
            command += ["--until", str(directory / "stop"), f"--workers={workers}", f"--timeout={TIMEOUT}", *settings]
            if network is not None:
                log = directory / f"worker{rank}"
                self.workers.append(network.start(rank, command, directory, log, {"LIGHTKIT_SECRET": SECRET}))
            else:
                environment = {**os.environ, "LIGHTKIT_SECRET": SECRET}
                self.workers.append(subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL))
        wait_for(lambda: all(len(self.answers(rank)) > 20 for rank in range(workers)), "the first pushes")

    def diary(self, rank: int) -> Path:
        return self.directory / f"diary{rank}"

    def lines(self, rank: int) -> list[dict[str, Any]]:
        text = self.diary(rank).read_text() if self.diary(rank).exists() else ""
        # The last line may be half written.
        return [json.loads(line) for line in text.splitlines() if line.endswith("}")]

    def answers(self, rank: int) -> list[float]:
        return [line["time"] for line in self.lines(rank) if line["what"] != "end"]

    def pushes(self, rank: int) -> int:
        return sum(line["what"] == "push" for line in self.lines(rank))

    def wait_for_answers(self, rank: int, after: float, seconds: float = 120.0) -> None:
        wait_for(lambda: sum(t > after for t in self.answers(rank)) > 20, f"worker {rank} after the fault", seconds)

    def pause(self, rank: int, fault: float) -> float:
        """Returns the longest time without an answer after the fault, in seconds."""
        times = [fault, *(t for t in self.answers(rank) if t > fault)]
        return max(later - earlier for earlier, later in itertools.pairwise(times))

    def stop(self, *ranks: int) -> int:
        """Ends the workers, and returns the number of pushes that counted. The given workers must be alive."""
        (self.directory / "stop").touch()
        for rank in ranks:
            if (status := self.workers[rank].wait(120)) != 0:
                raise SystemExit(f"worker {rank} ended with status {status}")
        (count,) = self.lines(ranks[0])[-1]["counts"]
        return round(count)


@contextmanager
def local_servers(directory: Path, count: int = 1) -> Iterator[LocalServers]:
    servers = LocalServers(count, SECRET, directory / "servers", timeout=TIMEOUT)
    try:
        yield servers
    finally:
        servers.stop(5.0)


def server_killed(*settings: str) -> Callable[[Path], dict[str, float]]:
    """Returns a fault: the server of one worker is killed."""

    def fault(directory: Path) -> dict[str, float]:
        with local_servers(directory) as servers:
            pushing = Pushing(directory, servers.addresses, 1, *settings)
            time.sleep(random.uniform(0.5, 1.0))
            at = time.time()
            servers.processes[0].kill()
            pushing.wait_for_answers(0, at)
            counted, answered = pushing.stop(0), pushing.pushes(0)
        return {"lost": max(answered - counted, 0), "twice": max(counted - answered, 0), "s": pushing.pause(0, at)}

    return fault


def worker_gone(mode: str, how: signal.Signals) -> Callable[[Path], dict[str, float]]:
    """Returns a fault: one of two workers gets a signal, and the other goes on."""

    def fault(directory: Path) -> dict[str, float]:
        with local_servers(directory) as servers:
            pushing = Pushing(directory, servers.addresses, 2, f"--mode={mode}")
            time.sleep(random.uniform(0.5, 1.0))
            at = time.time()
            pushing.workers[1].send_signal(how)
            if how == signal.SIGSTOP:
                time.sleep(TIMEOUT * 1.5)
            pushing.wait_for_answers(0, at)
            time.sleep(1.0)
            counted = pushing.stop(0)
            pushing.workers[1].kill()
        answered = pushing.pushes(0) if mode == "sync" else pushing.pushes(0) + pushing.pushes(1)
        # The last push of the worker that failed may count without having been answered.
        return {
            "lost": max(answered - counted, 0),
            "twice": max(counted - answered - 1, 0),
            "s": pushing.pause(0, at),
        }

    return fault


def network_cut(seconds: float, mode: str, watched: int) -> Callable[[Path], dict[str, float]]:
    """Returns a fault: the machine of the second worker has no network for some seconds."""

    def fault(directory: Path) -> dict[str, float]:
        with Network() as network:
            host = Network.addresses[0]
            command = [sys.executable, "-m", "lightkit.parameter_server", "--host", host, "--port", str(PORT)]
            command += ["--timeout", str(TIMEOUT), "--directory", str(directory / "server")]
            network.start(0, command, directory, directory / "log", {"LIGHTKIT_SECRET": SECRET})
            pushing = Pushing(directory, [f"{host}:{PORT}"], 2, f"--mode={mode}", network=network)
            at = time.time()
            network.cut(1)
            time.sleep(seconds)
            network.mend(1)
            for rank in (0, 1):
                pushing.wait_for_answers(rank, time.time())
            counted = pushing.stop(0, 1)
        answered = pushing.pushes(0) if mode == "sync" else pushing.pushes(0) + pushing.pushes(1)
        return {
            "lost": max(answered - counted, 0),
            # In sync the second worker may push once more when the first has stopped.
            "twice": max(counted - answered - (mode == "sync"), 0),
            "s": pushing.pause(watched, at),
        }

    return fault


def events(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "diary").read_text().splitlines()]


def arguments_of(directory: Path, **faults: Any) -> list[str]:
    callback = {"_target_": "faults.Faults", "directory": directory, **faults}
    settings = [f"+callbacks.faults.{name}={value}" for name, value in callback.items()]
    return ["+experiment=cnn", "trainer.accelerator=cpu", "strategy=ddp", "trainer.max_epochs=3", *settings]


VARIABLES = {"PYTHONPATH": str(TESTS), "LIGHTKIT_TARGETS": "faults", "OMP_NUM_THREADS": "1"}


def job_killed(**faults: Any) -> Callable[[Path], dict[str, float]]:
    """Returns a fault: a process of a job on one machine is killed."""

    def fault(directory: Path) -> dict[str, float]:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        command += ["--max-restarts=1", "-m", "lightkit.train", *arguments_of(directory, **faults)]
        subprocess.run(command, cwd=directory, env={**os.environ, **VARIABLES}, check=True, capture_output=True)
        return recovery(directory, "kill")

    return fault


def job_on_two_machines(nodes: str, cut: bool, **faults: Any) -> Callable[[Path], dict[str, float]]:
    """Returns a fault of a job on two machines: a process is killed, or the network is cut."""

    def fault(directory: Path) -> dict[str, float]:
        with Network() as network:
            started = []
            for rank, name in enumerate(network.names):
                words = ["torchrun", f"--nodes={nodes}", f"--endpoint={Network.addresses[0]}:{PORT}"]
                words += [f"--node-rank={rank}", "--id=faults", "--", *arguments_of(directory, **faults)]
                launch = ["ip", "netns", "exec", name, sys.executable, "-m", "lightkit.launch", *words]
                line = subprocess.run(launch, capture_output=True, text=True, check=True).stdout
                log = directory / f"log{rank}"
                started.append(network.start(rank, ["bash", "-c", line], directory, log, VARIABLES))
            if cut:
                wait_for(lambda: list(directory.glob("runs/cnn/*/checkpoints/last.ckpt")), "the first checkpoint")
                network.cut(1)
                with (directory / "diary").open("a") as file:
                    file.write(json.dumps({"what": "cut", "time": time.time()}) + "\n")
            if started[0].wait(300) != 0:
                raise SystemExit((directory / "log0").read_text())
        return recovery(directory, "cut" if cut else "kill")

    return fault


def recovery(directory: Path, what: str) -> dict[str, float]:
    fault = next(event for event in events(directory) if event["what"] == what)
    after = [event for event in events(directory) if event["what"] == "start" and event["time"] > fault["time"]]
    lost = fault["step"] - after[0]["step"] if "step" in fault else math.nan
    return {"lost": lost, "twice": 0, "s": max(event["time"] for event in after) - fault["time"]}


# By name: what happens, and how often at most, where waiting is most of it.
FAULTS: dict[str, tuple[Callable[[Path], dict[str, float]], int]] = {
    "server killed, pushes under way": (server_killed(), 99),
    "server killed, pushes and pulls under way": (server_killed("--pull"), 99),
    "server killed, snapshots being written": (server_killed("--snapshot-every=1", "--numbers=2000000"), 99),
    "worker killed, async": (worker_gone("async", signal.SIGKILL), 99),
    "worker killed, bounded": (worker_gone("bounded", signal.SIGKILL), 99),
    "worker killed, sync": (worker_gone("sync", signal.SIGKILL), 99),
    "worker stopped without a word, sync": (worker_gone("sync", signal.SIGSTOP), 1),
    "network cut for 5 s, sync": (network_cut(5.0, "sync", 0), 99),
    "network cut for 45 s, sync: the others": (network_cut(45.0, "sync", 0), 1),
    "network cut for 45 s, sync: the worker": (network_cut(45.0, "sync", 1), 1),
    "job: process killed": (job_killed(rank=1, epoch=1, batch=30), 99),
    "job: first process killed, writing a checkpoint": (job_killed(rank=0, epoch=1, writing=True), 99),
    "job, two machines: process killed": (job_on_two_machines("2", False, rank=1, epoch=1, batch=30), 99),
    "job, two machines: network cut for good": (job_on_two_machines("1:2", True, pause=0.05), 1),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=3, help="each fault")
    parser.add_argument("--only", nargs="+", choices=FAULTS, default=list(FAULTS), help="these faults")
    parser.add_argument("--note", default="", help="put into the rows, such as what else was running")
    options = parser.parse_args()
    if (reason := why_not()) is not None:
        print(f"without the faults of the network: {reason}")
        options.only = [name for name in options.only if "network" not in name and "machines" not in name]
    rows = []
    for name in options.only:
        fault, most = FAULTS[name]
        found = []
        for _ in range(min(options.times, most)):
            with tempfile.TemporaryDirectory() as directory:
                found.append(fault(Path(directory)))
        seconds = [result["s"] for result in found]
        lost = max(result["lost"] for result in found)
        # How many steps the network's end has cost nobody has noted down.
        row: dict[str, Any] = {"fault": name, "lost": "" if math.isnan(lost) else lost}
        row |= {"twice": max(result["twice"] for result in found), "median_s": round(median(seconds), 2)}
        row |= {"max_s": round(max(seconds), 2), "timeout_s": TIMEOUT, "n": len(found), "note": options.note}
        rows.append(row)
        print(row, flush=True)
    print(f"appended to {append('faults', rows)}")


if __name__ == "__main__":
    main()
