"""The command ``python -m lightkit.serve ckpt_path=...``, which answers requests by HTTP with a checkpoint."""

from __future__ import annotations

from dataclasses import fields
from typing import NoReturn, TypedDict

from omegaconf import DictConfig

from lightkit.app.cli import entry_point
from lightkit.runtime.command_process import begin_to_collect, run_as_process


class Keys(TypedDict):
    """The types of the keys of ``conf/serve.yaml``, by which `lightkit.app.cli.Command` checks the values."""

    ckpt_path: str
    trust: bool
    host: str
    port: int
    devices: int | str
    workers: int
    max_batch_size: int
    batch_timeout: float
    max_waiting: int
    max_body_mb: float
    timeout: float
    max_length: int


@entry_point("serve", Keys, uses_lightning=False)
def main(config: DictConfig) -> None:
    """Answers requests by HTTP with the model of a checkpoint, or the ensemble of several, until it is stopped.

    Args:
        config: the keys of ``conf/serve.yaml``.

    Raises:
        LightkitError: the checkpoint or an option cannot be used, or the address is in use.
    """
    # As in lightkit.train, --help does not wait for these imports.
    from lightkit.app.serving import ServerSettings, serve

    begin_to_collect()
    settings = {field.name: config[field.name] for field in fields(ServerSettings)}
    serve(config.ckpt_path, trust=config.trust, **settings)


def command() -> NoReturn:
    """Runs `main` and ends the process with the exit status."""
    run_as_process(main)


if __name__ == "__main__":
    command()
