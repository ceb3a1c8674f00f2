"""What do masks cost in a step of Adam, beside a product with the masks after the step and beside torch's own pruning?

    python benchmarks/masked_step.py [--threads 1] [--seconds 4]

The parameters are those of the documented CNN and of a ResNet-50; nine in ten weights are masked. "product" multiplies
the weights by float masks after the step, as a loop of one's own does. "torch's pruning" is `torch.nn.utils.prune`,
which keeps another copy of each weight and multiplies it by its mask before each forward pass; its product, the
gradient of the product and the step are timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from optimizers import resnet50
from rows import append
from timing import interleaved, median
from torch import Tensor, nn

from lightkit.models import CNN
from lightkit.optim import Adam, set_masks

CASES = {"documented CNN": [tuple(p.shape) for p in CNN().parameters()], "ResNet-50": resnet50()}


def contenders(shapes: list[tuple[int, ...]]) -> dict[str, Callable[[], None]]:
    """Returns a function for each contender that takes one step."""

    def parameters() -> list[nn.Parameter]:
        torch.manual_seed(0)
        found = [nn.Parameter(torch.randn(shape)) for shape in shapes]
        for parameter in found:
            parameter.grad = torch.randn_like(parameter)
        return found

    def weights(of: list[nn.Parameter]) -> dict[Tensor, Tensor]:
        return {p: torch.rand(p.shape) > 0.9 for p in of if p.dim() > 1}

    plain, masked, own, other = (Adam(parameters(), lr=1e-4) for _ in range(4))
    set_masks(masked, weights(masked.param_groups[0]["params"]))
    targets = weights(own.param_groups[0]["params"])
    tensors, factors = [p.detach() for p in targets], [mask.float() for mask in targets.values()]
    pruned = [(p, mask.float(), p.grad) for p, mask in weights(other.param_groups[0]["params"]).items()]

    def product() -> None:
        own.step()
        torch._foreach_mul_(tensors, factors)

    def torchs_pruning() -> None:
        for parameter, mask, gradient in pruned:
            value = parameter * mask
            parameter.grad = None
            value.backward(gradient)
        other.step()

    return {"no masks": plain.step, "set_masks": masked.step, "product": product, "torch's pruning": torchs_pruning}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=4)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for case, shapes in CASES.items():
        found = interleaved(contenders(shapes), options.seconds)
        least = median(found["no masks"])
        for what, seconds in found.items():
            times = round(median(seconds) / least, 3)
            rows.append({"parameters": case, "what": what, "ms": round(median(seconds) * 1e3, 4), "times": times})
            print(rows[-1])
    append("masked_step", rows)


if __name__ == "__main__":
    main()
