"""The command ``python -m lightkit.export ckpt_path=...``, which writes a checkpoint's model for other programs."""

from __future__ import annotations

from typing import NoReturn, TypedDict

from omegaconf import DictConfig

from lightkit.app.cli import entry_point
from lightkit.runtime.command_process import begin_to_collect, run_as_process


class Keys(TypedDict):
    """The types of the keys of ``conf/export.yaml``, by which `lightkit.app.cli.Command` checks the values."""

    ckpt_path: str
    format: str
    output: str | None
    data_dir: str | None
    download: bool


@entry_point("export", Keys)
def main(config: DictConfig) -> None:
    """Writes the model of a checkpoint, or the ensemble of several, to a file, and prints how far the two agree.

    Args:
        config: the keys of ``conf/export.yaml``.

    Raises:
        LightkitError: a checkpoint, its data or an option cannot be used; or the file would compute something else
            than the model, and is not kept.
    """
    # As in lightkit.train, --help does not wait for these imports.
    from lightkit.app.console import print_table
    from lightkit.app.ensembles import find_members
    from lightkit.app.exporting import export_checkpoints, output_path, rows
    from lightkit.app.run_files import check_output

    begin_to_collect()
    check_output(config.output)
    paths = find_members(config.ckpt_path)
    path = output_path(paths, config.format, config.output)
    agreement = export_checkpoints(paths, path, data_dir=config.data_dir, download=config.download)
    print_table(str(path), rows(agreement, path, config.format))


def command() -> NoReturn:
    """Runs `main` and ends the process with the exit status."""
    run_as_process(main)


if __name__ == "__main__":
    command()
