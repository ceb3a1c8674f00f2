"""How fast does a language model continue a text, and what does int8 cost in bits a byte?

    python benchmarks/generation.py [--runs DIRECTORY] [--models language_model char_rnn] [--rounds 15] [--threads 1]

Each experiment is trained as it comes, unless DIRECTORY has its run already; its checkpoint of the lowest validation
loss continues a passage of the test set by 400 bytes at temperature 0.8. Peer: torch's operations in the loop that one
would write, with the state of the tokens before and ``torch.multinomial``. The contenders take turns; a ratio is the
median of those of the rounds. Bits a byte are of the same 32,768 bytes of the test set for all.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from rows import append
from timing import interleaved, median
from torch import Tensor

from lightkit import native
from lightkit.app.ensembles import find_members
from lightkit.app.restore import restore
from lightkit.data.text import Text
from lightkit.models import LanguageModel, Transformer, decoder
from lightkit.tasks import LanguageModelTask

LENGTH, TEMPERATURE, PROMPT = 400, 0.8, 64
WINDOWS = 256

PRECISIONS = {
    "lightkit": {},
    "lightkit, int8 weights": {"weights": "int8"},
    "lightkit, int8 weights and cache": {"weights": "int8", "cache": "int8"},
}


@torch.inference_mode()
def torch_loop(model: LanguageModel, prompt: Tensor) -> Tensor:
    """Continues a text with torch's operations, in the windows of `LanguageModelTask.generate`."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.cat((prompt, prompt.new_empty(LENGTH)))
    context = model.context or len(tokens)
    start, read, state = 0, 0, None
    for end in range(len(prompt), len(tokens)):
        if end - start > context:
            start, read, state = end - (context + 1) // 2, 0, None
        hidden, state = model.hidden(tokens[None, start + read : end], state)
        read = end - start
        logits = model.head(hidden[0, -1])
        tokens[end] = (logits / TEMPERATURE).softmax(dim=0).multinomial(1, generator=generator)[0]
    return tokens[len(prompt) :]


@torch.inference_mode()
def bits_per_byte(logits_of: Callable[[Tensor], Tensor], windows: Tensor) -> float:
    """Returns the mean loss in bits of the targets of windows ``(N, T + 1)``."""
    losses = [
        F.cross_entropy(logits_of(part[:, :-1]).flatten(0, 1).double(), part[:, 1:].flatten(), reduction="none")
        for part in windows.split(32)
    ]
    return torch.cat(losses).mean().item() / math.log(2)


def measure(
    name: str, task: LanguageModelTask, windows: Tensor, seconds: float, rounds: int
) -> list[dict[str, object]]:
    """Returns a row for each contender."""
    model = task.model
    precisions = {
        what: given for what, given in PRECISIONS.items() if isinstance(model, Transformer) or "cache" not in given
    }
    prompt = windows[len(windows) // 2, :PROMPT]

    def generate(given: dict[str, str]) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return task.generate(prompt, LENGTH, TEMPERATURE, generator=generator, **given)

    load = os.getloadavg()[0]
    calls: dict[str, Callable[[], object]] = {"torch": lambda: torch_loop(model, prompt)}
    calls |= {what: lambda given=given: generate(given) for what, given in precisions.items()}
    times = interleaved(calls, seconds, least=rounds)
    bits = {"torch": bits_per_byte(model, windows)}
    for what, given in precisions.items():
        bits[what] = bits_per_byte(
            lambda part, given=given: decoder(model, sequences=len(part), **given).read(part, every=True), windows
        )
    rows = []
    for what, measured in times.items():
        ratios = [peer / own for peer, own in zip(times["torch"], measured, strict=True)]
        rows.append(
            {
                "model": name,
                "parameters": sum(p.numel() for p in model.parameters()),
                "what": what,
                "tokens_per_second": round(LENGTH / median(measured), 1),
                "most_tokens_per_second": round(LENGTH / min(measured), 1),
                "times_torch": round(statistics.median(ratios), 2),
                "bits_per_byte": round(bits[what], 6),
                "load": round(load, 1),
                "n": len(measured),
            }
        )
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", help="the directory of the runs, default: a temporary one")
    parser.add_argument("--models", nargs="+", default=["language_model", "char_rnn"], help="experiments")
    parser.add_argument("--seconds", type=float, default=20.0, help="for each model")
    parser.add_argument("--rounds", type=int, default=15, help="at least, for each model")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for name in options.models:
            directory = Path(options.runs or temporary) / name
            if not directory.exists():
                words = [f"+experiment={name}", f"hydra.run.dir={directory}", "test=false"]
                subprocess.run([sys.executable, "-m", "lightkit.train", *words], check=True)
            restored = restore(*find_members(str(directory)))
            data = restored.build_data()
            assert isinstance(data, Text) and isinstance(restored.task, LanguageModelTask)
            data.setup()
            step = len(data.test) // WINDOWS
            windows = data.test[: step * WINDOWS : step].long()
            torch.set_num_threads(options.threads)
            native.load()
            rows += measure(name, restored.task, windows, options.seconds, options.rounds)
    print(f"appended to {append('generation', rows)}")


if __name__ == "__main__":
    main()
