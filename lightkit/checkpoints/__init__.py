"""Checkpoints: an atomic writer, and readers that run no code from the file."""

from __future__ import annotations

import io
import pickle
import re
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO, XLACheckpointIO
from torch.utils._pytree import tree_map_only

from lightkit._util.atomic_write import write_atomically
from lightkit._util.checksums import find_damage_in, write_with_checksum
from lightkit._util.deprecated import renamed, renamed_parameters
from lightkit._util.printable import printable
from lightkit._util.regular_files import open_regular
from lightkit.checkpoints.archives import find_unsafe_content
from lightkit.checkpoints.foreign_objects import find_foreign_object
from lightkit.errors import CheckpointError, DataError

# The key of the configuration in a checkpoint of lightkit.train.
CONFIG_KEY = "lightkit_config"

# The name of the global for which torch rejects a file, in its error.
_REFUSED_GLOBAL = re.compile(r"GLOBAL ([\w.]+)")

# The keys of the hyperparameters of a module and of a data module.
_HYPERPARAMETERS = ("hyper_parameters", "datamodule_hyper_parameters")

_Tree = TypeVar("_Tree")


class AtomicCheckpointIO(TorchCheckpointIO):
    """A Lightning plug-in that replaces checkpoints atomically: ``Trainer(plugins=[AtomicCheckpointIO()])``.

    A checkpoint replaces another of the same name only when it is complete on the disk; if the disk is full or the
    process dies, the previous checkpoint is intact. Each checkpoint has a checksum, which the loader compares: see
    `lightkit._util.checksums`. Loading is ``weights_only`` by default: a checkpoint cannot run code.

    Args:
        plain_hyperparameters: True leaves out of a checkpoint the entries of ``hyper_parameters`` that are not plain
            values, such as a model that a module has passed to ``save_hyperparameters``. With such an entry a
            checkpoint does not load with ``weights_only``.
    """

    def __init__(self, plain_hyperparameters: bool = False) -> None:
        super().__init__()
        self.plain_hyperparameters = plain_hyperparameters

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Writes a checkpoint to a file; for a remote path (with ``://``) the base class of Lightning writes it.

        Args:
            checkpoint: the content of the checkpoint.
            path: the file.
            storage_options: passed to the base class for a remote path.

        Raises:
            CheckpointError: the file cannot be written; a previous checkpoint at ``path`` is intact.
        """
        if self.plain_hyperparameters:
            checkpoint = _with_plain_hyperparameters(checkpoint)
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        # An object that cannot be pickled fails here, before anything is written.
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
        """Returns the content of a checkpoint, as the function `load_checkpoint` reads it.

        Args:
            path: the file, or a remote path (with ``://``).
            map_location: the device of the tensors, as in `torch.load`.
            weights_only: None and True load data only. False lets the file run code, after a check of its checksum.

        Raises:
            CheckpointError: the file is missing, damaged or not a Lightning checkpoint.
        """
        if "://" in str(path):
            # Lightning's default for a remote path is weights_only=False, which runs code from the file.
            return super().load_checkpoint(path, map_location, weights_only is not False)
        if weights_only is False:
            check_intact(path)
            return super().load_checkpoint(path, map_location, weights_only)
        return load_checkpoint(path, map_location)


class AtomicXLACheckpointIO(AtomicCheckpointIO, XLACheckpointIO):
    """`AtomicCheckpointIO` for Lightning's strategies on torch_xla, which must be installed."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Writes a checkpoint with all tensors on the CPU, which loads on machines without a TPU."""
        super().save_checkpoint(to_cpu(checkpoint), path, storage_options)


def _with_plain_hyperparameters(checkpoint: dict[str, Any]) -> dict[str, Any]:
    found = {key: checkpoint[key] for key in _HYPERPARAMETERS if isinstance(checkpoint.get(key), dict)}
    plain = {
        key: {name: value for name, value in values.items() if _is_plain_value(value)} for key, values in found.items()
    }
    return {**checkpoint, **plain}


def _is_plain_value(value: Any) -> bool:
    """Returns True for numbers, texts, None and tensors, and for lists, tuples and dicts of them."""
    if type(value) is dict:
        return all(_is_plain_value(part) for pair in value.items() for part in pair)
    if type(value) in (list, tuple):
        return all(map(_is_plain_value, value))
    return value is None or type(value) in (bool, int, float, str, bytes, torch.Tensor)


def to_cpu(checkpoint: _Tree) -> _Tree:
    """Returns the same nested content as ``checkpoint`` with all tensors on the CPU.

    A file with tensors of a TPU loads on machines with a TPU only.
    """
    return tree_map_only(torch.Tensor, lambda tensor: tensor.cpu(), checkpoint)


@renamed_parameters(is_strangers="untrusted")
def load_checkpoint(path: str | Path, map_location: Any = "cpu", untrusted: bool = False) -> dict[str, Any]:
    """Returns the content of a checkpoint, read with ``weights_only=True`` after a check of its checksum.

    Args:
        path: the file.
        map_location: the device of the tensors, as in `torch.load`.
        untrusted: reject content that `torch.save` does not write for plain data and tensors: see
            `lightkit.checkpoints.archives`.

    Raises:
        CheckpointError: the file is missing, damaged, or not a Lightning checkpoint; or it holds an object that is no
            plain data, whose key and type the message has.
    """
    checkpoint = load_file(path, map_location, untrusted)
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise CheckpointError(f"{path} is not a Lightning checkpoint: it has no state_dict")
    return checkpoint


def load_file(path: str | Path, map_location: Any = "cpu", untrusted: bool = False) -> Any:
    """Returns the content of a file of `torch.save`, read with ``weights_only=True`` after a check of its checksum.

    Args:
        path: the file.
        map_location: the device of the tensors, as in `torch.load`.
        untrusted: see `load_checkpoint`.

    Raises:
        CheckpointError: the file is missing or damaged, or it holds other objects than plain values and tensors.
    """
    with _open_intact(path, untrusted) as file:
        try:
            return torch.load(file, map_location=map_location, weights_only=True)
        except Exception as error:
            if (found := _find_refused(file, error)) is not None:
                raise CheckpointError(
                    f"{path}: {found}, which loads only by running code: weights_only=True reads tensors and plain "
                    "values, such as a path as a str. If you trust the file, call the Trainer with weights_only=False"
                ) from error
            # torch raises half a dozen types here, from EOFError to pickle's own. Its advice to load with
            # weights_only=False, after the first sentence, would run code from the file.
            reason = printable(str(error).partition("\n")[0].partition(". ")[0])
            raise CheckpointError(f"{path} is damaged or not a checkpoint: {reason}") from error


def _find_refused(file: BinaryIO, error: Exception) -> str | None:
    """Returns the key and the type of the object for which torch has rejected a checkpoint; None for another error."""
    refused = _REFUSED_GLOBAL.search(str(error))
    found = None if refused is None else find_foreign_object(file, refused[1])
    # Newer protocols of pickle have operations that torch rejects before it comes to the object.
    return found or (find_foreign_object(file) if isinstance(error, pickle.UnpicklingError) else None)


def check_intact(path: str | Path) -> None:
    """Rejects a checkpoint file that is missing, unreadable or damaged.

    Raises:
        CheckpointError: the file is one of these; the message says which.
    """
    _open_intact(path).close()


def _open_intact(path: str | Path, untrusted: bool = False) -> BinaryIO:
    """Returns a checkpoint file, open for reading at its start, after a check of its content.

    The caller reads from the same open file, so that nobody can exchange the file after the check.
    """
    if not Path(path).is_file():
        raise CheckpointError(f"there is no checkpoint {path}")
    try:
        file = open_regular(path)
    except DataError as error:
        raise CheckpointError(f"the checkpoint {error}") from error
    try:
        damage = find_damage_in(file)
        if damage is None and untrusted and (damage := find_unsafe_content(file)) is not None:
            if (found := find_foreign_object(file)) is not None:
                raise CheckpointError(
                    f"{path}: {found}, which loads only by running code, and lightkit runs none of a checkpoint: it "
                    "reads tensors and plain values, such as a path as a str"
                )
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
    """Loads the weights of a checkpoint into a module, in place.

    Args:
        module: the module.
        checkpoint: the content of the checkpoint, as `load_checkpoint` returns it; the weights are its ``state_dict``.
        path: the path of the checkpoint, for the message of an error only.

    Raises:
        CheckpointError: names or shapes of the weights differ from the module's; the message has the differences.
    """
    check_weights(module, checkpoint, path)
    module.load_state_dict(checkpoint["state_dict"])


def check_weights(module: torch.nn.Module, checkpoint: dict[str, Any], path: str | Path) -> None:
    """Rejects a checkpoint whose weights have other names or shapes than those of ``module``.

    Args:
        module: the module.
        checkpoint: the content of the checkpoint.
        path: the path of the checkpoint, for the message.

    Raises:
        CheckpointError: names or shapes differ; the message has the first three differences.
    """
    want = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    have = {name: tuple(getattr(value, "shape", ())) for name, value in checkpoint["state_dict"].items()}
    for name in _late_buffers(module) & have.keys():
        # A vector of any length: it is set by the data.
        want[name] = have[name] if len(have[name]) == 1 else ("C",)
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


def _late_buffers(module: torch.nn.Module) -> set[str]:
    """Returns the names of buffers that are still None, as those of `lightkit.nn.CrossEntropyLoss.late_buffers`."""
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, part in module.named_modules()
        for name in getattr(part, "late_buffers", tuple)()
    }


__getattr__ = renamed(__name__, {"on_cpu": "lightkit.checkpoints.to_cpu"})
