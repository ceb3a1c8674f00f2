"""The command ``python -m lightkit.compress ckpt_path=...``, which makes the model of a finished run smaller."""

from __future__ import annotations

from dataclasses import fields
from typing import NoReturn, TypedDict

from omegaconf import DictConfig

from lightkit.app.cli import entry_point
from lightkit.runtime.command_process import begin_to_collect, run_as_process


class Keys(TypedDict):
    """The types of the keys of ``conf/compress.yaml``, by which `lightkit.app.cli.Command` checks the values."""

    ckpt_path: str
    keep_macs: float | None
    zeros: float | None
    bits: int | str | None
    max_drop: float | None
    distil: float
    epochs: int | None
    lr: float
    compare: bool
    output: str | None
    data_dir: str | None
    download: bool
    accelerator: str
    seed: int
    runtimes: bool


@entry_point("compress", Keys)
def main(config: DictConfig) -> None:
    """Trains a smaller model from a checkpoint, and prints how it compares with the dense one.

    Args:
        config: the keys of ``conf/compress.yaml``.

    Raises:
        LightkitError: the checkpoint, its data or an option cannot be used, or no model keeps ``max_drop``.
    """
    # As in lightkit.train, --help does not wait for these imports.
    from lightkit.app.compressing import compress_checkpoint
    from lightkit.app.compression_report import print_comparison
    from lightkit.app.compression_request import CompressionRequest
    from lightkit.app.ensembles import find_members
    from lightkit.errors import ConfigError

    begin_to_collect()
    paths = find_members(config.ckpt_path)
    if len(paths) != 1:
        raise ConfigError(f"ckpt_path={config.ckpt_path} means {len(paths)} checkpoints; compress one at a time")
    request = CompressionRequest(**{field.name: config[field.name] for field in fields(CompressionRequest)})
    print_comparison(compress_checkpoint(paths[0], request))


def command() -> NoReturn:
    """Runs `main` and ends the process with the exit status."""
    run_as_process(main)


if __name__ == "__main__":
    command()
