"""The process of a worker, ``python -m lightkit.app.serving.worker SOCKET``: see `lightkit.app.serving.workers`.

The first frame says which model to restore; each later one has a batch of requests. The process ends when the server
closes the connection, also while it computes: a server that was killed leaves no worker behind.
"""

from __future__ import annotations

import os
import select
import socket
import sys
import threading
from pathlib import Path
from typing import Any

from lightkit.app.log_filters import filter_warnings
from lightkit.app.serving.answering import answer_frames
from lightkit.app.serving.frames import read_frame, write_frame
from lightkit.errors import ConfigError, LightkitError
from lightkit.targets import allow_targets


def _restore(spec: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """Returns the description of a model and its responder.

    Args:
        spec: the ``model``, a value of ``ckpt_path`` or a list of files and directories; ``trust``; the ``device``, or
            ``auto`` for the first GPU or, without any, the CPU; the number ``workers`` of processes that share this
            device; ``max_length``; and ``packages``, the names of the user's packages that a checkpoint may name.

    Raises:
        LightkitError: a checkpoint cannot be used, or the device cannot.
    """
    import torch

    from lightkit.app.ensembles import combine, find_members, members_of, restore_members
    from lightkit.app.log_filters import import_lightning_silently
    from lightkit.app.restore import model_errors_as_checkpoint_errors
    from lightkit.app.serving.kinds import find_kind
    from lightkit.app.serving.responder import Responder, describe
    from lightkit.data.image_decoder import ignore_warnings_of_pillow

    allow_targets(*spec["packages"])
    import_lightning_silently()
    # Clients would write them into the server's log.
    ignore_warnings_of_pillow()
    device = _find_device(spec["device"], torch.cuda.device_count())
    if device == "cpu" and spec["workers"] > 1:
        # One alone has torch's own number of threads, as lightkit.predict has.
        torch.set_num_threads(max(1, torch.get_num_threads() // spec["workers"]))
    model = spec["model"]
    parts = [members_of(Path(part)) for part in model] if isinstance(model, list) else [find_members(model)]
    restored = combine(restore_members([path for paths in parts for path in paths], trust=spec["trust"]))
    with model_errors_as_checkpoint_errors():
        task = restored.task.to(device).eval()
        data = restored.build_data()
        state = restored.checkpoint.get(type(data).__qualname__)
        kind = find_kind(task, data, state, max_length=spec["max_length"])
        description = {**describe(kind, task), "device": device, "gpus": torch.cuda.device_count()}
        return description, Responder(kind)


def _find_device(name: str, gpus: int) -> str:
    """Returns the device of a name in a specification, on a machine with a number of GPUs.

    Raises:
        ConfigError: there is no such GPU.
    """
    if name == "auto":
        return "cuda:0" if gpus else "cpu"
    if name != "cpu" and int(name.partition(":")[2]) >= gpus:
        found = "1 GPU" if gpus == 1 else f"{gpus} GPUs"
        raise ConfigError(f"there is no {name}: this machine has {found}; on a CPU workers=N starts N processes")
    return name


def _end_with(connection: socket.socket) -> None:
    """Ends the process as soon as the other side has closed the connection."""
    poller = select.poll()
    # An empty mask still reports the end of the connection, and no data, which the main thread reads.
    poller.register(connection, 0)
    poller.poll()
    os._exit(0)


def main(descriptor: int) -> int:
    """Runs a worker on a connected socket, and returns the exit status."""
    filter_warnings()
    with socket.socket(fileno=descriptor) as connection, connection.makefile("rwb") as stream:
        threading.Thread(target=_end_with, args=(connection,), daemon=True).start()
        if (frame := read_frame(stream)) is None:
            return 0
        try:
            description, responder = _restore(frame[0])
        except LightkitError as error:
            write_frame(stream, {"error": str(error)})
            return 1
        write_frame(stream, {"description": description})
        answer_frames(stream, responder)
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
