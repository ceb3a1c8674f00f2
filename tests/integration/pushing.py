"""A worker of a parameter server that pushes ones; SGD then steps by one, so that the parameters count the pushes.

    LIGHTKIT_SECRET=... python pushing.py ADDRESSES RANK DIARY --until FILE [--workers 2] [--mode async] ...

The diary has a line for each reply, with its time; the last line has the final counts of all servers.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import torch
from torch import nn

from lightkit.parameter_server import Client, OptimizerSpec, TrainingSpec, group_options

SECRET = "of pushing.py"
TENSORS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("addresses", help="HOST:PORT,HOST:PORT,...")
    parser.add_argument("rank", type=int)
    parser.add_argument("diary", type=Path)
    parser.add_argument("--until", type=Path, required=True, help="a file that says that it is enough")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--mode", default="async", choices=["sync", "async", "bounded"])
    parser.add_argument("--numbers", type=int, default=100_000, help="float32 numbers of the model")
    parser.add_argument("--snapshot-every", type=int, default=1000)
    parser.add_argument("--timeout", type=float, default=30.0)
    parser.add_argument("--pull", action="store_true", help="pull after each push")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = nn.ParameterDict({f"{i}": nn.Parameter(torch.zeros(options.numbers // TENSORS)) for i in range(TENSORS)})
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    optimizer_spec = OptimizerSpec.from_optimizer(
        optimizer, {parameter: name for name, parameter in model.named_parameters()}
    )
    spec = TrainingSpec(
        [optimizer_spec], workers=options.workers, mode=options.mode, snapshot_every=options.snapshot_every
    )
    client = Client(options.addresses.split(","), os.environ["LIGHTKIT_SECRET"], options.rank, spec, options.timeout)
    client.start([group_options(optimizer)], [[parameter.detach() for parameter in model.values()]])
    ones = [torch.ones_like(parameter) for parameter in model.values()]
    with options.diary.open("w", buffering=1) as diary:
        while not options.until.exists():
            client.push(0, ones, optimizer.param_groups).result()
            diary.write(json.dumps({"time": time.time(), "what": "push"}) + "\n")
            if options.pull:
                client.pull(0)
                diary.write(json.dumps({"time": time.time(), "what": "pull"}) + "\n")
        client.finish()
        ((values, _, _),) = client.state()
        counts = {-value for tensor in values for value in tensor.unique().tolist()}
        diary.write(json.dumps({"time": time.time(), "what": "end", "counts": sorted(counts)}) + "\n")
        client.leave()


if __name__ == "__main__":
    main()
