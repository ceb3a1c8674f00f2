"""``python -m lightkit.evaluate ckpt_path=...``: measure a checkpoint on its test set."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TypedDict

from omegaconf import DictConfig

from lightkit.cli import entry_point


class Keys(TypedDict):
    """The keys of ``conf/evaluate.yaml``."""

    ckpt_path: str
    data_dir: str | None
    download: bool
    output: str | None
    accelerator: str


@entry_point("evaluate", Keys)
def main(config: DictConfig) -> None:
    """Measures a checkpoint and prints the figures."""
    # Only now, as in lightkit.train.
    from lightkit import results
    from lightkit.evaluation import evaluate

    results.check_output(config.output)
    metrics = evaluate(config)
    results.print_table(f"{config.ckpt_path}", {name: f"{value:.6g}" for name, value in metrics.items()})
    if config.output is not None:
        results.write_json(Path(config.output), metrics)


if __name__ == "__main__":
    sys.exit(main())
