"""Checkpoints: written so that a failure leaves the previous one, read without running what is in them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, BinaryIO

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO, XLACheckpointIO
from torch.utils._pytree import tree_map_only

from lightkit._util.atomic_write import write_atomically
from lightkit._util.printable import printable
from lightkit._util.regular_files import open_regular
from lightkit.checkpoints.archives import find_trick
from lightkit.checkpoints.checksums import find_damage_in, write_with_checksum
from lightkit.errors import CheckpointError, DataError

# Where a checkpoint of lightkit.train keeps the configuration that it was made with.
CONFIG_KEY = "lightkit_config"


class AtomicCheckpointIO(TorchCheckpointIO):
    """A Lightning plug-in: ``Trainer(plugins=[AtomicCheckpointIO()])``.

    A checkpoint replaces the one of the same name only when all of it is on the disk; if the disk is full or
    the process dies, the previous one is intact. It carries a checksum, which is compared when it is loaded: see
    `lightkit.checkpoints.checksums`. Loading is ``weights_only`` unless asked otherwise: a checkpoint cannot run code.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Writes a checkpoint; remote paths go the way of Lightning's own plug-in."""
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        # Serialised first: what cannot be pickled fails before anything is written.
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        try:
            write_atomically(path, lambda file: write_with_checksum(file, buffer.getbuffer()))
        except OSError as error:
            raise CheckpointError(
                f"the checkpoint {path} could not be written: {error.strerror or error}; the one before it is intact"
            ) from error

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Reads a checkpoint: see `load_checkpoint`."""
        if "://" in str(path):
            # Lightning's default for a path on the network runs what is in the file.
            return super().load_checkpoint(path, map_location, weights_only is not False)
        if weights_only is False:
            check_intact(path)
            return super().load_checkpoint(path, map_location, weights_only)
        return load_checkpoint(path, map_location)


class AtomicXLACheckpointIO(AtomicCheckpointIO, XLACheckpointIO):
    """`AtomicCheckpointIO` as Lightning's strategies for torch_xla demand it; only where that is installed."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Writes a checkpoint that needs no TPU to be read."""
        super().save_checkpoint(on_cpu(checkpoint), path, storage_options)


def on_cpu(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint with its tensors on the CPU: those of a TPU would load on machines with one only."""
    return tree_map_only(torch.Tensor, lambda tensor: tensor.cpu(), checkpoint)


def load_checkpoint(path: str | Path, map_location: Any = "cpu", is_strangers: bool = False) -> dict[str, Any]:
    """Reads a checkpoint with ``weights_only=True``.

    Args:
        path: the file.
        map_location: where its tensors go.
        is_strangers: refuse what `torch.save` does not write of plain data and tensors: see
            `lightkit.checkpoints.archives`.

    Raises:
        CheckpointError: there is no such file, it is damaged, or it is not a Lightning checkpoint.
    """
    with _open_intact(path, is_strangers) as file:
        try:
            checkpoint = torch.load(file, map_location=map_location, weights_only=True)
        except Exception as error:
            # torch raises half a dozen types here, from EOFError to pickle's own, all of which mean this. What it
            # advises, to load with weights_only=False, is not for here.
            reason = printable(str(error).partition("\n")[0].partition(". ")[0])
            raise CheckpointError(f"{path} is damaged or not a checkpoint: {reason}") from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise CheckpointError(f"{path} is not a Lightning checkpoint: it has no state_dict")
    return checkpoint


def check_intact(path: str | Path) -> None:
    """Raises a `CheckpointError` if there is no such file, or its content is not the one that was written."""
    _open_intact(path).close()


def _open_intact(path: str | Path, is_strangers: bool = False) -> BinaryIO:
    """Opens a checkpoint whose content is the one that was written.

    It is opened once: what is checked is what is read.
    """
    if not Path(path).is_file():
        raise CheckpointError(f"there is no checkpoint {path}")
    try:
        file = open_regular(path)
    except DataError as error:
        raise CheckpointError(f"the checkpoint {error}") from error
    try:
        damage = find_damage_in(file) or (find_trick(file) if is_strangers else None)
        if damage is not None:
            raise CheckpointError(f"{path} is damaged or not a checkpoint: {printable(damage)}")
        file.seek(0)
    except OSError as error:
        file.close()
        raise CheckpointError(f"the checkpoint {path} cannot be read: {error.strerror or error}") from error
    except BaseException:
        file.close()
        raise
    return file


def load_weights(module: torch.nn.Module, checkpoint: dict[str, Any], path: str | Path) -> None:
    """Puts the weights of a checkpoint into a module.

    Raises:
        CheckpointError: they are of another model; says what differs.
    """
    check_weights(module, checkpoint, path)
    module.load_state_dict(checkpoint["state_dict"])


def check_weights(module: torch.nn.Module, checkpoint: dict[str, Any], path: str | Path) -> None:
    """Raises a `CheckpointError` that says what differs if the weights are not this module's."""
    want = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    have = {name: tuple(getattr(value, "shape", ())) for name, value in checkpoint["state_dict"].items()}
    differences = [f"{name} is missing" for name in want.keys() - have.keys()]
    differences += [f"{name} is unknown here" for name in have.keys() - want.keys()]
    differences += [
        f"{name} is {have[name]}, expected {want[name]}"
        for name in want.keys() & have.keys()
        if want[name] != have[name]
    ]
    if differences:
        shown = printable("; ".join(sorted(differences)[:3]))
        more = f"; and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise CheckpointError(f"{path} is a checkpoint of another model: {shown}{more}")
