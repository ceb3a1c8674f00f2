"""``python -m lightkit.predict ckpt_path=... input=...``: use a checkpoint."""

from __future__ import annotations

import sys
from pathlib import Path

from omegaconf import DictConfig

from lightkit.cli import entry_point


@entry_point("predict")
def main(config: DictConfig) -> None:
    """Prints what the model of a checkpoint makes of an input."""
    # Only now, as in lightkit.train.
    from lightkit import prediction, results
    from lightkit.job import restore

    results.check_output(config.output)
    predicted = prediction.predict(config, restore(config.ckpt_path))
    predicted.show()
    if config.output is not None:
        predicted.write(Path(config.output))


if __name__ == "__main__":
    sys.exit(main())
