"""Measures a training step in torch's own layers with and without `lightkit.memory.keep_freed_memory`.

    python benchmarks/freed_memory.py [--rounds 3]

A step is that of the documented CNN: forward pass, cross-entropy, backward pass and the fused Adam. Each way runs in
processes of its own, and the two take turns.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time

import torch
import torch.nn.functional as F
from cnn_contenders import torch_cnn
from rows import append
from timing import median

from lightkit.memory import keep_freed_memory

BATCHES = (32, 128, 512)
FORMATS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}
STEPS = 60


def measure() -> dict[str, float]:
    """Returns microseconds an image by batch size and memory format."""
    found = {}
    for batch in BATCHES:
        images, labels = torch.rand(STEPS * batch, 1, 28, 28), torch.randint(0, 10, (STEPS * batch,))
        for name, memory_format in FORMATS.items():
            model = torch_cnn().to(memory_format=memory_format)
            optimizer = torch.optim.Adam(model.parameters(), fused=True)
            times = []
            for _ in range(2):
                for x, y in zip(images.split(batch), labels.split(batch), strict=True):
                    started = time.perf_counter()
                    optimizer.zero_grad()
                    F.cross_entropy(model(x.contiguous(memory_format=memory_format)), y).backward()
                    optimizer.step()
                    times.append(time.perf_counter() - started)
            found[f"{batch} {name}"] = median(times[STEPS:]) / batch * 1e6
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--how", choices=("left", "kept"), help="measure in this process")
    options = parser.parse_args()
    if options.how is not None:
        assert options.how == "left" or keep_freed_memory()
        print(json.dumps(measure()))
        return
    found = {"left": [], "kept": []}
    for _ in range(options.rounds):
        for how, results in found.items():
            done = subprocess.run([sys.executable, __file__, "--how", how], stdout=subprocess.PIPE, check=True)
            results.append(json.loads(done.stdout))
    rows = []
    for key in found["left"][0]:
        times = {how: median([result[key] for result in results]) for how, results in found.items()}
        for how, value in times.items():
            batch, name = key.split()
            rows.append({"batch": batch, "memory_format": name, "freed_memory": how})
            rows[-1] |= {"microseconds_per_image": round(value, 1), "times_left": round(times["left"] / value, 2)}
            rows[-1]["n"] = options.rounds
            print(rows[-1], flush=True)
    print(f"appended to {append('freed_memory', rows)}")


if __name__ == "__main__":
    main()
