"""The search for the smallest model whose accuracy drops by at most ``max_drop``."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from lightkit.app.compression_job import CompressionJob, Trained
from lightkit.app.compression_report import ACCURACY
from lightkit.app.compression_request import AUTO
from lightkit.compress import QuantizationScheme
from lightkit.compress.prune import TooSmallError
from lightkit.compress.sensitivity import measure_losses, order_of_bits
from lightkit.compress.weight_formats import BITS, quantizable_weights
from lightkit.errors import ConfigError

# The shares of the multiply-adds among which the search for widths chooses.
_SHARES = (0.7, 0.5, 0.35, 0.25, 0.18, 0.12, 0.09, 0.06)

# The share of the drop that pruning may take if rounding follows.
_PRUNING_SHARE = 0.5

# Rounding of float32 must not decide.
_TOLERANCE = 1e-6

_NAME = f"val/{ACCURACY}"

Candidate = TypeVar("Candidate")


def dense_accuracy(job: CompressionJob) -> float:
    """Returns the accuracy of the dense model on the validation set, from which ``max_drop`` counts.

    Raises:
        ConfigError: the task has no validation accuracy.
    """
    found = job.validate(job.restored.task).get(_NAME)
    if found is None:
        raise ConfigError("max_drop needs a task with the metric accuracy and validation data, which this one has not")
    return found


def search(job: CompressionJob, dense: float) -> tuple[Trained, list[dict[str, Any]]]:
    """Returns the smallest model whose accuracy is at most ``max_drop`` below the dense one, and what was tried.

    First the widths of the layers, unless ``keep_macs`` is null: by bisection, with a training for each share of the
    multiply-adds. Then, with ``bits=auto``, the bits of each weight: the weights lose bits in the order of their
    measured sensitivity. How far that goes without a training is found first; trainings begin where rounding alone
    loses too much.

    Args:
        job: the job, whose request has ``max_drop``.
        dense: the accuracy of the dense model: see `dense_accuracy`.

    Raises:
        ConfigError: each model has lost more.
    """
    request = job.request
    assert request.max_drop is not None
    trials: list[dict[str, Any]] = []
    best: Trained | None = None
    has_bits = request.bits == AUTO
    if not has_bits or (request.keep_macs is not None and job.epochs > 0):
        allowed = request.max_drop * (_PRUNING_SHARE if has_bits else 1.0)
        best = _search_widths(job, dense, allowed, trials)
    if has_bits:
        rounding = job if best is None else CompressionJob(best.path, replace(request, keep_macs=None), job.directory)
        # The teacher of a pruned model is the dense one.
        rounding.teacher, rounding.epochs = job.teacher, job.epochs
        rounded = _search_bits(rounding, dense, request.max_drop, trials)
        if rounded is not None:
            before = [] if best is None else best.callbacks
            best = replace(rounded, callbacks=[*before, *rounded.callbacks])
    if best is None:
        raise ConfigError(
            f"max_drop={request.max_drop}: each model has lost more; train longer with epochs=N, or allow a larger drop"
        )
    target = job.directory / "checkpoints"
    target.mkdir(parents=True, exist_ok=True)
    if best.path != target / "best.ckpt":
        os.replace(best.path, target / "best.ckpt")
    return replace(best, path=target / "best.ckpt"), trials


def _search_widths(job: CompressionJob, dense: float, max_drop: float, trials: list[dict[str, Any]]) -> Trained | None:
    """Returns the model of the smallest share of the multiply-adds that keeps the accuracy; None if none does."""
    request = job.request
    scheme = QuantizationScheme(request.bits) if isinstance(request.bits, int) else None

    def train(share: float) -> Trained | None:
        try:
            return job.train(job.directory / f"keep_{share}", share, request.zeros, scheme, request.distil)
        except TooSmallError as error:
            print(error, flush=True)
            return None

    found = _bisect(_SHARES, train, dense, max_drop, trials, lambda share: {"keep_macs": share})
    return None if found is None else found[1]


def _search_bits(job: CompressionJob, dense: float, max_drop: float, trials: list[dict[str, Any]]) -> Trained | None:
    """Returns the model of the fewest bits that keeps the accuracy; None if none does."""
    scheme = QuantizationScheme(max(BITS))
    task, calibration = job.calibrate(scheme, min(BITS))
    # The groups of values that share a scale are those of few bits.
    formats = QuantizationScheme(min(BITS), edge_bits=min(BITS)).formats(task)
    print(f"measuring how the loss depends on the bits of {len(formats)} weights", flush=True)
    losses = measure_losses(task, calibration, formats, job.validation_loss(task))
    sizes = {name: weight.numel() for name, _, weight in quantizable_weights(task)}
    order = order_of_bits(losses, sizes)

    def describe(bits: dict[str, int]) -> dict[str, Any]:
        return {"bits": sum(sizes[name] * count for name, count in bits.items()) / sum(sizes.values())}

    def round(bits: dict[str, int]) -> Trained:
        return job.round(calibration.spec({name: replace(formats[name], bits=bits[name]) for name in formats}))

    def train(bits: dict[str, int]) -> Trained:
        layers = {glob.escape(name): count for name, count in bits.items()}
        # Neighbours may have the same mean of bits.
        name = f"bits_{order.index(bits)}"
        return job.train(job.directory / name, scheme=replace(scheme, layers=layers), distil=job.request.distil)

    found = _bisect(order, round, dense, max_drop, trials, lambda bits: describe(bits) | {"trained": "no"})
    begin = 0 if found is None else found[0] + 1
    if job.epochs > 0 and begin < len(order):
        again = _bisect(order[begin:], train, dense, max_drop, trials, lambda bits: describe(bits) | {"trained": "yes"})
        if again is not None:
            return again[1]
    if found is None:
        return None
    # The checkpoint is that of the last rounding, and this one was the best.
    return round(order[found[0]])


def _bisect(
    candidates: Sequence[Candidate],
    make: Callable[[Candidate], Trained | None],
    dense: float,
    max_drop: float,
    trials: list[dict[str, Any]],
    describe: Callable[[Candidate], dict[str, Any]],
) -> tuple[int, Trained] | None:
    """Returns the index and the model of the last candidate that keeps the accuracy, by bisection; None if none does.

    Args:
        candidates: the candidates, the largest model first.
        make: makes the model of a candidate; None if the model cannot become so small.
        dense: the accuracy of the dense model.
        max_drop: the largest drop.
        trials: the function adds an entry for each model that it makes.
        describe: returns the first values of the entry.
    """
    best: tuple[int, Trained] | None = None
    low, high = 0, len(candidates) - 1
    is_first = True
    while low <= high:
        middle = (low + high + 1) // 2 if is_first else (low + high) // 2
        is_first = False
        trained = make(candidates[middle])
        if trained is None:
            trials.append(describe(candidates[middle]))
            high = middle - 1
            continue
        drop = dense - trained.validation[_NAME]
        trials.append({**describe(candidates[middle]), "drop": drop})
        shown = ", ".join(
            f"{name} {value:.3g}" if isinstance(value, float) else f"{name}: {value}"
            for name, value in describe(candidates[middle]).items()
        )
        print(f"{shown}: validation accuracy {trained.validation[_NAME]:.4f}, {dense:.4f} dense", flush=True)
        if drop <= max_drop + _TOLERANCE:
            best, low = (middle, trained), middle + 1
        else:
            high = middle - 1
    return best
