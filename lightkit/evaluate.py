"""The command ``python -m lightkit.evaluate ckpt_path=...``, which computes the test metrics of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn, TypedDict

from omegaconf import DictConfig

from lightkit.app.cli import entry_point
from lightkit.runtime.command_process import begin_to_collect, run_as_process


class Keys(TypedDict):
    """The types of the keys of ``conf/evaluate.yaml``, by which `lightkit.app.cli.Command` checks the values."""

    ckpt_path: str
    data_dir: str | None
    download: bool
    output: str | None
    accelerator: str


@entry_point("evaluate", Keys)
def main(config: DictConfig) -> None:
    """Computes and prints the test metrics of a checkpoint; writes them to ``config.output`` unless it is None."""
    # As in lightkit.train, --help does not wait for these imports.
    from lightkit.app.console import print_table
    from lightkit.app.evaluation import evaluate
    from lightkit.app.run_files import check_output, write_json

    begin_to_collect()
    check_output(config.output)
    metrics = evaluate(
        config.ckpt_path, data_dir=config.data_dir, download=config.download, accelerator=config.accelerator
    )
    print_table(f"{config.ckpt_path}", {name: f"{value:.6g}" for name, value in metrics.items()})
    if config.output is not None:
        write_json(Path(config.output), metrics)


def command() -> NoReturn:
    """Runs `main` and ends the process with the exit status."""
    run_as_process(main)


if __name__ == "__main__":
    command()
