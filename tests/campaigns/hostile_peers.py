"""Attacks a parameter server by hostile connections while a worker trains, and measures the cost for that worker.

    python tests/campaigns/hostile_peers.py [--seed 1] [--connections 5000] [--threads 4] [--note TEXT]

The server is a process, and all traffic is on 127.0.0.1. The worker pushes gradients of ones, and SGD steps by one, so
that the parameters show how many pushes count: ``lost`` is the number of the worker's pushes with a reply that do not
count, ``added`` the number of pushes that count beyond them. ``server_threads`` is the largest number of threads of the
server, ``megabytes_more`` the growth of its memory, ``longest_s`` the worker's longest time from one reply to the next.
The program appends a row to benchmarks/results/hostile_peers.csv.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import torch

HERE = Path(__file__).resolve()
sys.path[:0] = [str(HERE.parents[1] / "parameter_server"), str(HERE.parents[2] / "benchmarks")]

import hostile  # noqa: E402
from rows import append  # noqa: E402
from workers import SECRET, ServerProcess, Training, network, spec_of  # noqa: E402

from lightkit.errors import LightkitError  # noqa: E402

SILENCE = 5.0


def plain(parameters):
    return torch.optim.SGD(parameters, lr=1.0)


def description(rng):
    """Returns the join request of a hostile worker, with another rank than the honest worker's."""
    model = network()
    spec = spec_of(model, plain(model.parameters()), mode="async", snapshot_every=1000)
    who = {"rank": rng.randrange(1, 40), "incarnation": f"{rng.getrandbits(64):x}", "timeout": SILENCE}
    return {**who, "job": spec.to_json()}


def attack(address, rng):
    """Makes one hostile connection; returns its kind."""
    kind = rng.choices(["stranger", "join_request", "worker"], [6, 1, 3])[0]
    with contextlib.suppress(OSError, LightkitError, KeyError, TypeError):
        if kind == "stranger":
            name = rng.choice(sorted(hostile.STRANGERS))
            hostile.STRANGERS[name](address, rng)
        elif kind == "join_request":
            requests = hostile.join_requests(description(rng))
            connection = hostile.connect(address, SECRET, requests[rng.choice(sorted(requests))], 5.0, SILENCE)
            connection.receive_header()
            connection.release()
        else:
            peer = hostile.JoinedWorker(address, SECRET, description(rng), SILENCE)
            hostile.WORKERS[rng.choice(sorted(hostile.WORKERS))](peer, rng)
            # Some workers leave, and some stay until the server refuses them.
            if rng.random() < 0.8:
                peer.connection.release()
    return kind


class Honest(threading.Thread):
    """A worker that pushes until `over`, and records the longest time from one reply to the next."""

    def __init__(self, address):
        super().__init__(daemon=True)
        self.training = Training([address], 0, plain, mode="async", timeout=SILENCE, patience=60.0)
        self.start_weights = torch.cat([p.detach().flatten().clone() for p in self.training.parameters])
        self.over = threading.Event()
        self.pushes, self.longest, self.error = 0, 0.0, None

    def run(self):
        try:
            ones = [torch.ones_like(p) for p in self.training.parameters]
            while not self.over.is_set():
                before = time.monotonic()
                self.training.take(self.training.client.push(0, ones, self.training.optimizer.param_groups).result())
                self.pushes += 1
                self.longest = max(self.longest, time.monotonic() - before)
                time.sleep(0.002)
        except Exception as error:
            self.error = error


def usage(pid):
    """Returns the number of threads and the megabytes of a process."""
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
    return int(lines["Threads"]), int(lines["VmRSS"].split()[0]) / 1024


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--connections", type=int, default=5000)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--note", default="")
    options = parser.parse_args()
    # Strangers do not wait for the server to end the connection, so that more of them connect.
    hostile.PATIENCE = 0.02
    torch.set_num_threads(1)
    server = ServerProcess(timeout=SILENCE, quiet=True)
    honest = Honest(server.address)
    first_threads, first_megabytes = usage(server.process.pid)
    honest.start()
    done, lock = Counter(), threading.Lock()
    most = [first_threads, first_megabytes]

    def work(number):
        rng = random.Random(f"{options.seed}/{number}")
        for _ in range(options.connections // options.threads):
            kind = attack(server.address, rng)
            with lock:
                done[kind] += 1

    threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(options.threads)]
    started = time.monotonic()
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads) and server.process.poll() is None:
        for place, value in enumerate(usage(server.process.pid)):
            most[place] = max(most[place], value)
        time.sleep(0.05)
    seconds = time.monotonic() - started
    survived = server.process.poll() is None
    honest.over.set()
    honest.join(90)
    lost = added = None
    if survived and honest.error is None and not honest.is_alive():
        weights, _ = honest.training.end()
        counted = round((honest.start_weights - weights).double().mean().item())
        lost, added = max(honest.pushes - counted, 0), max(counted - honest.pushes, 0)
        survived = server.process.wait(60) == 0
    server.stop()
    row = {
        "seed": options.seed,
        "connections": sum(done.values()),
        "strangers": done["stranger"],
        "hellos": done["join_request"],
        "workers": done["worker"],
        "server_ended_well": survived,
        "pushes": honest.pushes,
        "lost": lost,
        "added": added,
        "longest_s": round(honest.longest, 2),
        "server_threads": most[0],
        "megabytes_more": round(most[1] - first_megabytes, 1),
        "seconds": round(seconds, 1),
        "note": options.note,
    }
    print(row, honest.error or "")
    append("hostile_peers", [row])
    return 0 if survived and lost == added == 0 and honest.error is None else 1


if __name__ == "__main__":
    sys.exit(main())
