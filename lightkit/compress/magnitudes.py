"""The choice of the smallest weights of all layers, also of weights that are sharded over processes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from lightkit._util.imported import is_instance
from lightkit.errors import ConfigError
from lightkit.optim.masked_entries import local_part

# A tensor keeps this share of its weights at least: with fewer its layer lets nothing through.
MIN_SHARE = 0.01

# The largest magnitude: that of a NaN, as the integer of its bits.
_LARGEST = (1 << 31) - 1


@torch.no_grad()
def smallest_masked(parameters: Sequence[Tensor], share: float) -> dict[Tensor, Tensor]:
    """Returns masks that are False for a share of the weights: the smallest ones of all tensors by magnitude.

    Each tensor keeps a hundredth of its weights. Of equal magnitudes the first weights are masked. All processes must
    call the function if the parameters are sharded: the share is that of all shards.

    Args:
        parameters: floating-point tensors, all of them whole or all of them DTensors that are sharded over all
            processes.
        share: the share of the weights, from 0 to below 1.

    Returns:
        A mask for each parameter: bool, of its shape; a DTensor for a DTensor.
    """
    sharded = any(is_sharded(p) for p in parameters)
    # The bits of floats that are not negative have the order of the floats.
    sizes = [local_part(p).detach().float().abs().flatten().view(torch.int32) for p in parameters]
    masked = _smallest(
        [[x] for x in sizes], [p.numel() - max(1, int(MIN_SHARE * p.numel())) for p in parameters], sharded
    )
    # The largest weights of a tensor stay in any case.
    sizes = [torch.where(candidate, x, _LARGEST) for x, (candidate,) in zip(sizes, masked, strict=True)]
    free = sum(p.numel() - max(1, int(MIN_SHARE * p.numel())) for p in parameters)
    count = min(int(share * sum(p.numel() for p in parameters)), free)
    (parts,) = _smallest([sizes], [count], sharded)
    return {p: like(p, ~part.view(local_part(p).shape)) for p, part in zip(parameters, parts, strict=True)}


def _smallest(groups: Sequence[Sequence[Tensor]], counts: Sequence[int], sharded: bool) -> list[list[Tensor]]:
    """Returns for each group of tensors masks that are True for the smallest numbers, exactly as many as asked for.

    Args:
        groups: one-dimensional int32 tensors of numbers from 0; with ``sharded`` this process's parts of them.
        counts: for each group the number of numbers.
        sharded: True if other processes have further parts.
    """
    device = groups[0][0].device
    wanted = torch.tensor(counts, dtype=torch.int64, device=device)

    def count(limits: Tensor) -> Tensor:
        found = [
            sum(((x <= limit).sum() for x in group), torch.zeros((), dtype=torch.int64, device=device))
            for group, limit in zip(groups, limits, strict=True)
        ]
        total = torch.stack(found)
        if sharded:
            dist.all_reduce(total)
        return total

    # The smallest limits below which there are enough numbers, by bisection: no process gathers the weights.
    low, high = torch.full_like(wanted, -1), torch.full_like(wanted, _LARGEST)
    while bool((high - low > 1).any()):
        middle = (low + high) // 2
        enough = count(middle) >= wanted
        low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
    # Numbers at the limit are masked in the order of the processes and tensors, until there are enough.
    missing = wanted - count(high - 1)
    ties = torch.stack(
        [
            sum(((x == limit).sum() for x in group), torch.zeros((), dtype=torch.int64, device=device))
            for group, limit in zip(groups, high, strict=True)
        ]
    )
    if sharded:
        gathered = [torch.empty_like(ties) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, ties)
        missing = missing - sum(gathered[: dist.get_rank()], torch.zeros_like(ties))
    masks: list[list[Tensor]] = []
    for group, limit, left in zip(groups, high.tolist(), missing.tolist(), strict=True):
        masks.append([])
        for x in group:
            mask = x < limit
            at_limit = (x == limit).nonzero().flatten()[: max(left, 0)]
            mask[at_limit] = True
            left -= len(at_limit)
            masks[-1].append(mask)
    return masks


def is_sharded(tensor: Tensor) -> bool:
    """Returns True for a DTensor."""
    return is_instance(tensor, "torch.distributed.tensor", "DTensor")


def check_sharded(name: str, parameters: dict[str, Tensor]) -> None:
    """Rejects parameters of which some processes have the same part, or not the same dimensions.

    Args:
        name: the name of the callback, for the message.
        parameters: the parameters by name.

    Raises:
        ConfigError: some parameters are sharded over all processes, and one of the others is not.
    """
    if not any(map(is_sharded, parameters.values())):
        return
    for path, parameter in parameters.items():
        placements = getattr(parameter, "placements", ())
        mesh = getattr(parameter, "device_mesh", None)
        if mesh is None or mesh.size() != dist.get_world_size() or not all(p.is_shard() for p in placements):
            raise ConfigError(f"{name} needs weights that are sharded over all processes, and {path} is not")


def like(parameter: Tensor, local: Tensor) -> Tensor:
    """Returns ``local``, this process's part of a tensor, as a DTensor with the placements of a sharded parameter."""
    if not is_sharded(parameter):
        return local
    from torch.distributed.tensor import DTensor

    assert isinstance(parameter, DTensor)
    return DTensor.from_local(
        local,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def sharded_like(parameter: Tensor, whole: Tensor) -> Tensor:
    """Returns a whole tensor, which all processes have, as a parameter is: on its device, and sharded if it is."""
    whole = whole.to(parameter.device)
    if not is_sharded(parameter):
        return whole
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(parameter, DTensor)
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)


def whole(tensor: Tensor) -> Tensor:
    """Returns all entries of a tensor; all processes must call the function for a DTensor."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # pyright: ignore[reportAttributeAccessIssue]
