"""``python -m lightkit.train +experiment=cnn``: compose, train, test, report."""

from __future__ import annotations

from typing import NoReturn, TypedDict

from omegaconf import DictConfig

from lightkit.app.cli import entry_point
from lightkit.runtime.command_process import begin_to_collect, run_as_process


class Keys(TypedDict):
    """The keys of ``conf/train.yaml`` that are no groups."""

    name: str
    seed: int
    ckpt_path: str | None
    compile: bool
    test: bool
    objective: str
    run_dir: str


@entry_point("train", Keys, several_processes=True)
def main(config: DictConfig) -> float | None:
    """Trains what the configuration describes; the result is what a sweeper such as Optuna's looks at."""
    # Only now: torch and Lightning take seconds, which nobody waits for to see --help or a typing error.
    from lightkit import native
    from lightkit.memory import keep_freed_memory

    # Before what takes seconds to import: compilers may run meanwhile.
    native.start()
    from lightkit.app.training import train

    begin_to_collect()
    keep_freed_memory()
    return train(config).get(config.objective)


def command() -> NoReturn:
    """Runs `main` as a process of its own."""
    run_as_process(main)


if __name__ == "__main__":
    command()
