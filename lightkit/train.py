"""The command ``python -m lightkit.train +experiment=cnn``, which trains, tests and writes a report."""

from __future__ import annotations

from typing import NoReturn, TypedDict

from omegaconf import DictConfig

from lightkit.app.cli import entry_point
from lightkit.runtime.command_process import begin_to_collect, run_as_process


class Keys(TypedDict):
    """The types of the keys of ``conf/train.yaml`` except the groups; `lightkit.app.cli.Command` checks the values."""

    name: str
    seed: int
    ckpt_path: str | None
    init_from: str | None
    init_skip: list[str] | str
    freeze: list[str] | str
    unfreeze: dict[int, list[str]] | None
    compile: bool
    test: bool
    objective: str
    kfold: int | None
    fold: int | None
    run_dir: str
    tags: list[str]


@entry_point("train", Keys, several_processes=True)
def main(config: DictConfig) -> float | None:
    """Trains, tests and reports as ``config`` says.

    Returns:
        The value of the metric whose name is ``config.objective``, for a sweeper such as Optuna's; None if the job has
        no such metric.
    """
    # The import of torch and Lightning takes seconds, for which --help and a misspelt override need not wait.
    from lightkit import native
    from lightkit.memory import keep_freed_memory

    # Compilers may run during the imports below, which take seconds.
    native.start()
    from lightkit.app.training import train

    begin_to_collect()
    keep_freed_memory()
    return train(config).get(config.objective)


def command() -> NoReturn:
    """Runs `main` and ends the process with the exit status."""
    run_as_process(main)


if __name__ == "__main__":
    command()
