"""Initial weights of a module, from a checkpoint of another training."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightkit._util.printable import printable
from lightkit.errors import CheckpointError
from lightkit.finetune.name_mapping import is_last_block, map_names
from lightkit.finetune.patterns import common_prefix, match, to_patterns
from lightkit.finetune.weight_files import read_weights

# The number of names and of differences that a message lists.
_MAX_SHOWN = 6

# Buffers that checkpoints of early releases of torch lack, and that only count batches.
_OPTIONAL = "num_batches_tracked"


@dataclass(frozen=True)
class InitialWeights:
    """The result of `load_initial_weights`: the names of tensors.

    Args:
        loaded: the tensors of the module that have the values of the file.
        new: the tensors of the module that keep their own values.
        left_out: the tensors of the file that the module does not have.
    """

    loaded: tuple[str, ...]
    new: tuple[str, ...]
    left_out: tuple[str, ...]

    def __str__(self) -> str:
        parts = [f"{len(self.loaded)} tensors loaded"]
        parts += [f"new: {_listed(self.new)}"] if self.new else []
        parts += [f"not of the model: {_listed(self.left_out)}"] if self.left_out else []
        return printable("; ".join(parts))


def load_initial_weights(module: nn.Module, path: str | Path, skip: Sequence[str] | str = ()) -> InitialWeights:
    """Loads the weights of another training into a module, in place, as the start of a fine-tuning.

    Names and shapes must agree, except that

    - the names may differ by a prefix of a wrapper, such as ``model.`` of a LightningModule;
    - the last layers may differ in their number of outputs, or the last module may be missing or another one: it
      keeps its own values. A layer is a last one if nothing that follows it has another shape;
    - tensors that ``skip`` names keep their own values.

    Args:
        module: the module.
        path: a checkpoint of lightkit or of another program with Lightning, a state dict, or a file of safetensors: see
            `lightkit.finetune.weight_files.read_weights`.
        skip: patterns of the tensors to leave out, such as ``head.*``: see `lightkit.finetune.patterns.match`.

    Returns:
        The names of the tensors that were loaded, are new, and were left out.

    Raises:
        CheckpointError: the file cannot be read, or names or shapes differ in any other way; the module is unchanged.
        ConfigError: a pattern of ``skip`` matches nothing.
    """
    have = read_weights(path)
    own = {name: value for name, value in module.state_dict().items() if isinstance(value, Tensor)}
    skip = to_patterns(skip, "init_skip")
    prefix = common_prefix(own)
    names = map_names(have, own)
    counterparts = {name: names[name] for name in have if name in names}
    # A pattern may name a tensor as the module does or as the file does.
    skipped = match(skip, {*own, *have, *counterparts.values()}, "init_skip", prefix)
    values = {target: have[name] for name, target in counterparts.items() if not {name, target} & skipped}
    want = [name for name in own if name not in skipped]
    found = _compare(module, path, {name: own[name] for name in want}, values)
    module.load_state_dict({**module.state_dict(), **{name: values[name] for name in found.loaded}})
    outside = [name for name in have if name not in names and name not in skipped]
    new = [name for name in own if name not in set(found.loaded) and not name.endswith(_OPTIONAL)]
    return InitialWeights(found.loaded, tuple(new), (*found.left_out, *outside))


def _compare(module: nn.Module, path: str | Path, own: dict[str, Tensor], values: dict[str, Tensor]) -> InitialWeights:
    """Returns the tensors to load, those of a new head, and those of a head that the module does not have.

    Args:
        module: the module.
        path: the file, for the message.
        own: the tensors of the module, in its order.
        values: the tensors of the file under the names of the module, in the order of the file.

    Raises:
        CheckpointError: something else than a head differs.
    """
    missing = {name for name in own if name not in values and not name.endswith(_OPTIONAL)}
    unknown = {name for name in values if name not in own}
    differing = {name for name in own if name in values and not _has_shape(own[name], values[name])}
    if not missing and not unknown and _are_heads(module, differing, own, values):
        # A layer begins anew as a whole.
        new = {name for name in own if any(_module_of(name) == _module_of(other) for other in differing)}
    elif not differing and is_last_block(missing, list(own)) and (not unknown or is_last_block(unknown, list(values))):
        new = missing
    elif not missing and not unknown and not differing:
        new = set()
    else:
        raise _error(path, own, values, (missing, unknown, differing))
    loaded = tuple(name for name in own if name in values and name not in new)
    if not loaded and own:
        raise CheckpointError(f"{path} has no tensor that the model takes")
    return InitialWeights(loaded, tuple(sorted(new)), tuple(name for name in values if name in unknown))


def _has_shape(own: Tensor, value: Tensor) -> bool:
    # A lazy parameter takes the shape of the first value.
    return is_lazy(own) or own.shape == value.shape


def _are_heads(module: nn.Module, differing: set[str], own: dict[str, Tensor], values: dict[str, Tensor]) -> bool:
    """Returns True if the tensors differ in the number of outputs of their layers alone, and none is an embedding."""
    embedded = {
        id(p) for m in module.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag) for p in m.parameters()
    }
    parameters = dict(module.named_parameters(remove_duplicate=False))
    for name in differing:
        mine, theirs = own[name].shape, values[name].shape
        is_alike = 0 < len(mine) == len(theirs) and mine[1:] == theirs[1:]
        if not is_alike or name not in parameters or id(parameters[name]) in embedded:
            return False
        layer = [other for other in differing if _module_of(other) == _module_of(name)]
        if len({(own[other].shape[:1], values[other].shape[:1]) for other in layer}) > 1:
            return False
    return bool(differing)


def _module_of(name: str) -> str:
    return name.rpartition(".")[0]


def _error(
    path: str | Path, own: dict[str, Tensor], values: dict[str, Tensor], found: tuple[set[str], set[str], set[str]]
) -> CheckpointError:
    missing, unknown, differing = found
    differences = [
        f"{name} is {tuple(values[name].shape)}, expected {tuple(own[name].shape)}" for name in own if name in differing
    ]
    differences += [f"{name} is missing" for name in own if name in missing]
    differences += [f"{name} is unknown here" for name in values if name in unknown]
    return CheckpointError(
        f"{path} has the weights of another model: {printable(_listed(differences, '; '))}; init_skip=[PATTERN] leaves "
        "tensors out"
    )


def _listed(names: Iterable[str], separator: str = ", ") -> str:
    names = list(names)
    more = f" and {len(names) - _MAX_SHOWN} more" if len(names) > _MAX_SHOWN else ""
    return separator.join(names[:_MAX_SHOWN]) + more
