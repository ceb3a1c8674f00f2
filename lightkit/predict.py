"""The command ``python -m lightkit.predict ckpt_path=... input=...``, which predicts with a checkpoint."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Literal, NoReturn, TypedDict

from omegaconf import DictConfig

from lightkit.app.cli import entry_point
from lightkit.runtime.command_process import begin_to_collect, run_as_process


class Keys(TypedDict):
    """The types of the keys of ``conf/predict.yaml``, by which `lightkit.app.cli.Command` checks the values."""

    ckpt_path: str
    trust: bool
    input: str | None
    output: str | None
    invert: bool | Literal["auto"] | None
    batch_size: int | None
    column: str | None
    horizon: int | None
    time_column: str | None
    missing: str | None
    separator: str | None
    decimal: str | None
    encoding: str | None
    header: bool | None
    skip_lines: int | None
    sheet: str | None
    day_first: bool | None
    text: str | None
    length: int | None
    temperature: float | None
    top_k: int | None
    seed: int | None
    weights: str | None
    cache: str | None


@entry_point("predict", Keys)
def main(config: DictConfig) -> None:
    """Predicts with the model of a checkpoint or the ensemble of several, and prints the predictions.

    The kind of task decides about input and output: images give the classes, a series gives a forecast, rows of a
    table give a column (all are written as CSV), and a text gives its continuation.

    Args:
        config: the keys of ``conf/predict.yaml``. If ``output`` is set, the function also writes the predictions to
            that file.

    Raises:
        LightkitError: the checkpoint, the input or an option cannot be used.
    """
    # As in lightkit.train, --help does not wait for these imports.
    from lightkit.app.ensembles import combine, find_members, restore_members
    from lightkit.app.prediction import PredictionRequest, predict
    from lightkit.app.run_files import check_output

    begin_to_collect()
    check_output(config.output)
    request = PredictionRequest(**{field.name: config[field.name] for field in fields(PredictionRequest)})
    predicted = predict(combine(restore_members(find_members(config.ckpt_path), trust=config.trust)), request)
    # First the file: standard output may fail.
    if config.output is not None:
        predicted.write(Path(config.output))
    predicted.show()


def command() -> NoReturn:
    """Runs `main` and ends the process with the exit status."""
    run_as_process(main)


if __name__ == "__main__":
    command()
