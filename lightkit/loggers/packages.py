"""The packages that loggers of Lightning need, and the error for one that is not installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable

from lightkit.errors import ConfigError

# By the name of the logger's class, the packages of which it needs one, the usual one first.
_PACKAGES: dict[str, tuple[str, ...]] = {
    "CometLogger": ("comet_ml",),
    "MLFlowLogger": ("mlflow",),
    "NeptuneLogger": ("neptune",),
    "TensorBoardLogger": ("tensorboard", "tensorboardX"),
    "WandbLogger": ("wandb",),
}


def check_packages(classes: Iterable[str]) -> None:
    """Rejects loggers whose packages are not installed; imports no package.

    Args:
        classes: the names of the loggers' classes, such as ``WandbLogger``; dots may precede them.

    Raises:
        ConfigError: packages are missing; the message has the command that installs them.
    """
    names = [cls.rpartition(".")[2] for cls in classes]
    missing = [name for name in names if name in _PACKAGES and not any(map(_is_installed, _PACKAGES[name]))]
    if missing:
        packages = " ".join(dict.fromkeys(_PACKAGES[name][0] for name in missing))
        raise ConfigError(
            f"{' and '.join(dict.fromkeys(missing))} need{'s' if len(set(missing)) == 1 else ''} a package that is not "
            f"installed: pip install {packages}"
        )


def _is_installed(package: str) -> bool:
    spec = importlib.util.find_spec(package)
    # A directory of this name without __init__.py, which wandb makes for its files, has no origin.
    return spec is not None and spec.origin is not None
