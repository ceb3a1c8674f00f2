"""A logger of Weights & Biases that never asks for a login, and whose run ends with `finish`."""

from __future__ import annotations

import netrc
import os
from collections.abc import Sequence
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

from lightning.pytorch import loggers
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lightkit.errors import ConfigError
from lightkit.loggers.packages import check_packages


class WandbLogger(loggers.WandbLogger):
    """Lightning's ``WandbLogger``, except that a machine without a login keeps the run in ``save_dir``.

    Args:
        *arguments: the positional arguments of Lightning's ``WandbLogger``.
        offline: True keeps the run in ``save_dir``, from where ``wandb sync`` uploads it; False uploads it. None does
            as the environment variable ``WANDB_MODE`` says; without the variable the logger uploads if the machine is
            logged in, and else prints that it does not.
        entity: the team or user; None is the login's own.
        group: the group of the run.
        job_type: the type of the run within its group.
        notes: a description of the run.
        tags: the tags of the run.
        **options: the keyword arguments of Lightning's ``WandbLogger``.

    Raises:
        ConfigError: the package ``wandb`` is not installed, or checkpoints are to be uploaded from an offline run.
    """

    def __init__(
        self,
        *arguments: Any,
        offline: bool | None = None,
        entity: str | None = None,
        group: str | None = None,
        job_type: str | None = None,
        notes: str | None = None,
        tags: Sequence[str] | None = None,
        **options: Any,
    ) -> None:
        check_packages([type(self).__name__])
        said = {
            "entity": entity,
            "group": group,
            "job_type": job_type,
            "notes": notes,
            "tags": list(tags or ()) or None,
        }
        options |= {name: value for name, value in said.items() if value is not None}
        if offline is None and not os.environ.get("WANDB_MODE"):
            offline = not _is_logged_in()
            if offline:
                _say_offline(options.get("save_dir") or options.get("dir") or ".")
        if offline:
            if options.get("log_model"):
                raise ConfigError("log_model uploads checkpoints, and an offline run of wandb uploads nothing")
            # Lightning's own option would change the environment, and with it all later runs of the process.
            options["mode"] = "offline"
        elif offline is False:
            options["mode"] = "online"
        super().__init__(*arguments, **options)

    @rank_zero_only
    def finish(self, exit_code: int = 0) -> None:
        """Ends the run, so that a later logger of this process begins another one; wandb waits for the upload.

        Args:
            exit_code: 0 for a run that has succeeded.
        """
        if self._experiment is not None:
            self._experiment.finish(exit_code=exit_code)
            self._experiment = None


def _is_logged_in() -> bool:
    """Returns True if the environment or the file ``.netrc`` has a key for the server; asks no server."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    import wandb  # pyright: ignore[reportMissingImports]

    host = urlsplit(str(wandb.Settings().base_url)).hostname or ""
    files = [os.environ.get("NETRC"), *(os.path.expanduser(f"~/{name}") for name in (".netrc", "_netrc"))]
    for file in filter(None, files):
        with suppress(OSError, netrc.NetrcParseError):
            if netrc.netrc(file).authenticators(host) is not None:
                return True
    return False


@rank_zero_only
def _say_offline(directory: Any) -> None:
    place = os.path.join(os.path.relpath(directory), "wandb")
    print(f"wandb is not logged in: the run stays in {place}, and wandb sync uploads it", flush=True)
