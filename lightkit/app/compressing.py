"""Compression of a finished run, for `lightkit.compress`: trains a smaller model and compares it with the dense one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightkit import native
from lightkit.app import run_files
from lightkit.app.compression_job import CompressionJob, Trained
from lightkit.app.compression_measurements import measure_in_runtimes, measure_models
from lightkit.app.compression_outcome import compression_outcome
from lightkit.app.compression_report import Comparison, content, page
from lightkit.app.compression_request import CompressionRequest
from lightkit.app.compression_search import dense_accuracy, search
from lightkit.app.deployment import write_deployed
from lightkit.checkpoints import load_checkpoint
from lightkit.compress import QuantizationScheme
from lightkit.errors import ConfigError


def compress_checkpoint(path: Path, request: CompressionRequest) -> Comparison:
    """Trains a smaller model from a checkpoint, and compares it with the dense model, trained equally long.

    The checkpoint may come from an untrusted source. The directory of the results gets ``checkpoints/best.ckpt``,
    ``deploy.ckpt``, which is small, ``compression.json`` and ``report.html``.

    Args:
        path: a checkpoint of lightkit.train.
        request: the options.

    Raises:
        LightkitError: the checkpoint, its data or an option cannot be used, or no model keeps ``max_drop``.
    """
    request.check()
    directory = Path(request.output) if request.output is not None else path.with_name(f"{path.stem}-compressed")
    if directory.exists() and not directory.is_dir():
        raise ConfigError(f"output={directory} is a file; give a new directory")
    if directory.exists() and any(directory.iterdir()):
        raise ConfigError(f"output={directory} holds files already; give another directory")
    native.start()
    job = CompressionJob(path, request, directory)
    native.load()
    trials: list[dict[str, Any]] = []
    dense = dense_accuracy(job) if request.max_drop is not None else None
    models: dict[str, Any] = {"dense": job.restored.task}
    if request.compare and job.epochs > 0:
        # The dense model comes first: it is the better teacher after the same training.
        models["dense, trained on"] = job.train(directory / "dense").task
        job.teacher = models["dense, trained on"].model
    if dense is not None:
        compressed, trials = search(job, dense)
    else:
        compressed = _compress(job)
    models["compressed"] = compressed.task
    columns = measure_models(job, models)
    runtimes = measure_in_runtimes(job, models) if request.runtimes else {}
    checkpoint = load_checkpoint(compressed.path)
    sizes = write_deployed(checkpoint, compressed.levels, directory / "deploy.ckpt")
    columns["compressed"] |= {f"bytes {kind}": size for kind, size in sizes.items()}
    outcome = compression_outcome(compressed.callbacks, checkpoint, compressed.levels, sizes)
    comparison = Comparison(directory, columns, trials, outcome, runtimes)
    run_files.write_json(directory / "compression.json", content(comparison, path, job.epochs))
    (directory / "report.html").write_text(page(comparison, path, job.epochs), encoding="utf-8")
    return comparison


def _compress(job: CompressionJob) -> Trained:
    """Returns the model that the request describes, with a training or rounded without one."""
    request = job.request
    scheme = QuantizationScheme(request.bits) if isinstance(request.bits, int) else None
    if job.epochs > 0:
        return job.train(job.directory / "checkpoints", request.keep_macs, request.zeros, scheme, request.distil)
    assert scheme is not None
    task, calibration = job.calibrate(scheme, scheme.bits)
    return job.round(calibration.spec(scheme.formats(task)))
