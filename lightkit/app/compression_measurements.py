"""The measurements of a compression: accuracy, sizes and latencies of each model, in lightkit and in other runtimes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lightkit.app.compression_job import CompressionJob
from lightkit.app.compression_report import ACCURACY
from lightkit.app.deployment import bytes_of
from lightkit.app.exporting import model_calls
from lightkit.app.model_measurements import accuracy_interval, latencies, multiply_adds
from lightkit.app.parts import model_of
from lightkit.app.runtime_comparison import installed_runtimes, measure_runtimes
from lightkit.callbacks import TestRecorder
from lightkit.errors import ConfigError
from lightkit.models import LanguageModel
from lightkit.tasks import ClassificationTask
from lightkit.tasks.task import Task

_BATCH_SIZES = (1, 32)


def measure_models(job: CompressionJob, tasks: Mapping[str, Task]) -> dict[str, dict[str, Any]]:
    """Returns the test metrics, sizes and latencies of tasks by name.

    Args:
        job: the job with the test set.
        tasks: the tasks by name.
    """
    columns: dict[str, dict[str, Any]] = {}
    models: dict[str, nn.Module] = {}
    inputs: list[tuple[Any, ...]] = []

    def keep_first(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        if not inputs:
            inputs.append(arguments)

    for name, task in tasks.items():
        model = model_of(task)
        assert model is not None
        recorder = TestRecorder()
        with model.register_forward_pre_hook(keep_first):
            metrics = job.test(task, [recorder])
        count = len(next(iter(recorder.result().values()), ()))
        columns[name] = {**metrics, "test samples": count}
        share = metrics.get(f"test/{ACCURACY}")
        if share is not None and count:
            columns[name]["interval"] = list(accuracy_interval(share, count))
        columns[name] |= {f"bytes {kind}": size for kind, size in bytes_of(model.state_dict()).items()}
        models[name] = model.eval()
    arguments = inputs[0] if inputs else None
    if arguments is None:
        return columns
    device = next((x.device for x in arguments if isinstance(x, torch.Tensor)), torch.device("cpu"))
    for name, model in models.items():
        columns[name]["multiply-adds"] = multiply_adds(model.to(device), arguments)
    for size in _BATCH_SIZES:
        if all(len(x) >= size for x in arguments if isinstance(x, torch.Tensor)):
            for name, value in latencies(models, arguments, size).items():
                columns[name][f"ms at batch {size}"] = value
    return columns


def measure_in_runtimes(job: CompressionJob, tasks: Mapping[str, Task]) -> dict[str, dict[str, dict[str, Any]]]:
    """Returns what the installed runtimes do with the dense and the compressed model: see `measure_runtimes`.

    Language models, which runtimes run token by token, and tasks that call their model otherwise than an export can
    take, have no such measurements: the result is {}.

    Args:
        job: the job with the test set.
        tasks: the tasks by name; the first one is dense, and the last one compressed.
    """
    names = [next(iter(tasks)), list(tasks)[-1]]
    models = {name: model for name in names if (model := model_of(tasks[name])) is not None}
    if not installed_runtimes() or any(isinstance(model, LanguageModel) for model in models.values()):
        return {}
    compressed = tasks[names[-1]].eval().cpu()
    try:
        calls = list(model_calls(compressed, models[names[-1]], job.test_batches()))
    except ConfigError:
        return {}
    on_cpu = {name: model.eval().cpu() for name, model in models.items()}
    return measure_runtimes(on_cpu, calls, isinstance(compressed, ClassificationTask), _BATCH_SIZES)
