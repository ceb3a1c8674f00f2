"""Measures the pushes a second of a parameter server beside an all_reduce, and simulates 1,000 workers.

    python benchmarks/parameter_server.py [--seconds 3] [--sizes 10000 1000000 25000000] [--note TEXT]

Workers and servers are processes on this machine. A push is a gradient in float32 and the answer with as many
parameters, after a step of SGD with momentum in ``async``, without snapshots; the workers do nothing else. The
all_reduce is gloo's, of as many numbers among as many processes, in turns with the pushes of the same processes.

In the simulation each worker computes for a while and pushes to all servers at once. A server takes pushes one after
the other, each for the time that was measured with the most workers here. The network takes no time. The script
compares the simulation with the measurements at other numbers of workers, and then runs it for up to 1,000.
"""

from __future__ import annotations

import argparse
import heapq
import os
import random
import secrets
import socket
import time
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rows import append
from timing import median
from torch import nn

from lightkit.parameter_server import Client, OptimizerSpec, TrainingSpec, group_options
from lightkit.parameter_server.local_servers import LocalServers

# Tensors that the numbers are spread over, so that servers have something to share.
TENSORS = 8


def work(rank: int, workers: int, addresses: list[str], secret: str, size: int, seconds: float, port: int, results):
    """Runs one worker, which pushes and then reduces for the given seconds, three times."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.TCPStore("127.0.0.1", port, workers, is_master=rank == 0, timeout=timedelta(minutes=5))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=workers)
    model = nn.ParameterDict({f"tensor{i}": nn.Parameter(torch.zeros(size // TENSORS)) for i in range(TENSORS)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    names = {parameter: name for name, parameter in model.named_parameters()}
    spec = TrainingSpec(
        [OptimizerSpec.from_optimizer(optimizer, names)], workers=workers, mode="async", snapshot_every=0
    )
    client = Client(addresses, secret, rank, spec)
    values = [parameter.detach() for parameter in model.values()]
    client.start([group_options(optimizer)], [values])
    gradients = [torch.randn_like(value) for value in values]
    flat = torch.randn(size)

    def push() -> None:
        client.push(0, gradients, optimizer.param_groups).result()

    def rate(action) -> float:
        """Returns calls of ``action`` a second, of all workers together."""
        action()
        dist.barrier()
        count, start = 0, time.perf_counter()
        while time.perf_counter() - start < seconds:
            action()
            count += 1
        mine = torch.tensor([count / (time.perf_counter() - start)])
        dist.all_reduce(mine)
        return mine.item()

    def reduce_rate() -> float:
        dist.all_reduce(flat)
        dist.barrier()
        start, count = time.perf_counter(), 0
        more = torch.ones(1)
        while more:
            # All processes make as many calls before they look at one clock.
            for _ in range(3):
                dist.all_reduce(flat)
            count += 3
            more.fill_(time.perf_counter() - start < seconds)
            dist.broadcast(more, 0)
        return count / (time.perf_counter() - start)

    found = [(rate(push), reduce_rate() if workers > 1 else 0.0) for _ in range(3)]
    client.finish()
    client.leave()
    dist.destroy_process_group()
    if rank == 0:
        results.put(found)


def measure(workers: int, servers: int, size: int, seconds: float) -> tuple[float, float]:
    """Returns pushes and all_reduces a second, of all workers together."""
    secret = secrets.token_hex(8)
    local = LocalServers(servers, secret, None)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    context = mp.get_context("spawn")
    results = context.SimpleQueue()
    arguments = (workers, local.addresses, secret, size, seconds, port, results)
    processes = [context.Process(target=work, args=(rank, *arguments)) for rank in range(workers)]
    for process in processes:
        process.start()
    found = results.get()
    for process in processes:
        process.join()
    local.stop(5.0)
    return median([push for push, _ in found]), median([reduce for _, reduce in found])


def simulate(workers: int, service: float, compute: float, steps: int = 50) -> float:
    """Returns pushes a second at one queue, of workers that compute for ``compute`` seconds, give or take a tenth."""
    chance = random.Random(0)

    def think() -> float:
        return compute * chance.uniform(0.9, 1.1)

    waiting = [(think(), worker) for worker in range(workers)]
    heapq.heapify(waiting)
    free, pushes = 0.0, 0
    total = workers * steps
    while pushes < total:
        arrival, worker = heapq.heappop(waiting)
        free = max(free, arrival) + service
        pushes += 1
        heapq.heappush(waiting, (free + think(), worker))
    return pushes / free


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 1_000_000, 25_000_000], help="float32 numbers")
    parser.add_argument("--note", default="", help="put into the rows, such as what else was running")
    options = parser.parse_args()
    rows = []
    for size in options.sizes:
        rates = {}
        for servers in (1, 2):
            for workers in (1, 2, 4):
                rates[servers, workers], reduces = measure(workers, servers, size, options.seconds)
                row = {"what": "measured", "numbers": size, "servers": servers, "workers": workers, "compute_ms": 0}
                row |= {"pushes_per_second": round(rates[servers, workers], 1)}
                # Each worker that takes part in an all_reduce has sent a gradient.
                row |= {"all_reduce": round(reduces * workers, 1) if workers > 1 else "", "n": 3, "note": options.note}
                rows.append(row)
                print(row, flush=True)
        # With the most workers the server is what all wait for.
        service = 1 / rates[1, 4]
        for workers, compute in [(2, 0.0), *((n, c) for c in (0.01, 0.1, 1.0) for n in (1, 10, 100, 1000))]:
            row = {"what": "simulated", "numbers": size, "servers": 1, "workers": workers, "compute_ms": 1e3 * compute}
            row |= {"pushes_per_second": round(simulate(workers, service, compute), 1), "all_reduce": "", "n": ""}
            row |= {"note": f"full at {(compute + service) / service:.0f} workers"}
            rows.append(row)
            print(row, flush=True)
    print(f"appended to {append('parameter_server', rows)}")


if __name__ == "__main__":
    main()
