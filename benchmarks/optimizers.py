"""How fast is a step of SGD, or of Adam, next to what a user would take instead?

    python benchmarks/optimizers.py [sgd|adam] [--compiled] [--seconds 4]

SGD with momentum, Nesterov and weight decay. Peers: torch's loop, foreach and fused steps and, with --compiled,
torch.compile of the loop. "clip" clips the gradients to a norm first (torch: clip_grad_norm_; ours: max_grad_norm),
"clip + ema" keeps averaged weights too (torch: AveragedModel's foreach average). The floor is a copy that moves as many
bytes: parameter and states read and written, gradient read, without the extra streams of clip and ema.
"""

from __future__ import annotations

import argparse

import torch
from rows import append
from timing import interleaved, median
from torch import nn

from lightkit.optim import SGD, Adam

# Ours, torch's, the options, and the streams of a step: twice each for parameter and states, once for the gradient.
OPTIMIZERS = {
    "sgd": (SGD, torch.optim.SGD, {"lr": 1e-6, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-4}, 5),
    "adam": (Adam, torch.optim.Adam, {"lr": 1e-6}, 7),
}
DECAY = 0.999
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def resnet50() -> list[tuple[int, ...]]:
    """The parameter shapes of a ResNet-50 for 1,000 classes (He et al., 2015)."""
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7), (64,), (64,)]
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            convolutions = [(width, inputs, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            if block == 0:
                convolutions.append((4 * width, inputs, 1, 1))
            for shape in convolutions:
                shapes += [shape, shape[:1], shape[:1]]
            inputs = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


def gpt2() -> list[tuple[int, ...]]:
    """The parameter shapes of a GPT-2 small (Radford et al., 2019), its head tied."""
    layer = [(768,), (768,), (2304, 768), (2304,), (768, 768), (768,)]
    layer += [(768,), (768,), (3072, 768), (3072,), (768, 3072), (768,)]
    return [(50257, 768), (1024, 768), *layer * 12, (768,), (768,)]


CASES = {
    "1000 x 100": [(100,)] * 1000,
    "60 x 36864": [(36864,)] * 60,
    "25 x 1M": [(1 << 20,)] * 25,
    "ResNet-50": resnet50(),
    "GPT-2 small": gpt2(),
}


def make_step(name: str, what: str, extras: str, shapes: list[tuple[int, ...]]):
    """A function that does one step of one implementation on parameters of its own."""
    own_class, torch_class, numbers, _ = OPTIMIZERS[name]
    generator = torch.Generator(DEVICE).manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape, generator=generator, device=DEVICE)) for shape in shapes]
    for p in parameters:
        # Small, so that clipping leaves its usual trace: a factor of 1.
        p.grad = torch.randn(p.shape, generator=generator, device=DEVICE) * 1e-6
    if what == "lightkit":
        clip = {"max_grad_norm": 1e3} if "clip" in extras else {}
        average = {"ema_decay": DECAY} if "ema" in extras else {}
        return own_class(parameters, **numbers, **clip, **average).step
    flags = {"loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
    optimizer = torch_class(parameters, **numbers, **flags.get(what, {"foreach": False}))
    averages = [p.detach().clone() for p in parameters] if "ema" in extras else []

    def step() -> None:
        if "clip" in extras:
            nn.utils.clip_grad_norm_(parameters, 1e3)
        optimizer.step()
        if averages:
            with torch.no_grad():
                torch._foreach_lerp_(averages, [p.detach() for p in parameters], 1 - DECAY)

    return torch.compile(step) if what == "compiled" else step


def make_copy(streams: int, shapes: list[tuple[int, ...]]):
    """The floor: as many bytes as some streams of the parameters, read and written in halves."""
    count = sum(torch.Size(shape).numel() for shape in shapes)
    source = torch.ones(count * streams // 2, device=DEVICE)
    target = torch.ones_like(source)
    return lambda: target.copy_(source)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("optimizer", nargs="?", choices=OPTIMIZERS, default="sgd")
    parser.add_argument("--compiled", action="store_true", help="also time torch.compile, which takes minutes to build")
    parser.add_argument("--seconds", type=float, default=4.0, help="for each case")
    options = parser.parse_args()
    names = ["loop", "foreach", "fused", *(["compiled"] if options.compiled else []), "lightkit"]
    rows = []
    for case, shapes in CASES.items():
        for extras in ("", "clip", "clip + ema"):
            # Each case is compiled for itself: dynamo gives up on a function that it has compiled eight times.
            torch._dynamo.reset()
            functions = {what: make_step(options.optimizer, what, extras, shapes) for what in names}
            functions["copy"] = make_copy(OPTIMIZERS[options.optimizer][3], shapes)
            measured = interleaved(functions, options.seconds)
            times = {what: median(t) for what, t in measured.items()}
            for what, seconds in times.items():
                rows.append(
                    {
                        "case": case,
                        "extras": extras,
                        "what": what,
                        "milliseconds": round(seconds * 1e3, 4),
                        "times_fused": round(times["fused"] / seconds, 2),
                        "fraction_of_copy": round(times["copy"] / seconds, 3),
                        "n": len(measured[what]),
                    }
                )
            print(f"{case} {extras}: " + ", ".join(f"{w} {t * 1e3:.3f} ms" for w, t in times.items()), flush=True)
    print(f"appended to {append(options.optimizer, rows)}")


if __name__ == "__main__":
    main()
