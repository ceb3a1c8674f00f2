"""The command ``python -m lightkit.evaluate ckpt_path=...``, which computes the test metrics of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn, TypedDict

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
    trust: bool


@entry_point("evaluate", Keys)
def main(config: DictConfig) -> None:
    """Computes and prints the test metrics of a checkpoint, or of several and of their ensemble.

    Args:
        config: the keys of ``conf/evaluate.yaml``. If ``output`` is set, the function also writes the metrics to that
            file; of an ensemble with those of each member under ``members``.

    Raises:
        LightkitError: a checkpoint, its data or an option cannot be used.
    """
    # As in lightkit.train, --help does not wait for these imports.
    from lightkit._util.numbers import format_number
    from lightkit.app.console import print_table
    from lightkit.app.ensembles import find_members
    from lightkit.app.evaluation import evaluate_ensemble
    from lightkit.app.run_files import check_output, write_json

    begin_to_collect()
    check_output(config.output)
    paths = find_members(config.ckpt_path)
    own, metrics = evaluate_ensemble(
        paths,
        data_dir=config.data_dir,
        download=config.download,
        accelerator=config.accelerator,
        trust=config.trust,
    )
    members = [{"ckpt_path": str(path), **values} for path, values in zip(paths, own, strict=True)]
    # First the file: standard output may fail.
    if config.output is not None:
        write_json(Path(config.output), metrics if len(own) == 1 else {**metrics, "members": members})
    if len(own) > 1:
        rows = {str(path): _in_a_line(values) for path, values in zip(paths, own, strict=True)}
        print_table("members", rows)
    title = str(paths[0]) if len(own) == 1 else f"ensemble of {len(own)}"
    print_table(title, {name: format_number(value) for name, value in metrics.items()})


def _in_a_line(metrics: dict[str, Any]) -> str:
    from lightkit._util.numbers import format_number

    return ", ".join(f"{name} {format_number(value)}" for name, value in metrics.items())


def command() -> NoReturn:
    """Runs `main` and ends the process with the exit status."""
    run_as_process(main)


if __name__ == "__main__":
    command()
