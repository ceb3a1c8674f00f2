"""Flat tensors, one for each dtype, with views in the shapes of parameters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from lightkit.parameter_server.encoding import dtype_named
from lightkit.parameter_server.training_spec import ParameterSpec


def allocate_flat(parameters: Sequence[ParameterSpec]) -> tuple[list[Tensor], list[Tensor]]:
    """Allocates flat tensors of zeros for parameters.

    Returns:
        A one-dimensional tensor for each dtype, in the order in which the parameters use the dtypes first; and for each
        parameter a view of these tensors in the shape of the parameter.
    """
    counts: dict[str, int] = {}
    for parameter in parameters:
        counts[parameter.dtype] = counts.get(parameter.dtype, 0) + parameter.count
    flats = [torch.zeros(count, dtype=dtype_named(name)) for name, count in counts.items()]
    return flats, view_flat(flats, parameters)


def view_flat(flats: Iterable[Tensor], parameters: Sequence[ParameterSpec]) -> list[Tensor]:
    """Returns, for each parameter, a view in its shape of flat tensors that have the layout of `allocate_flat`."""
    rests = {str(flat.dtype).partition(".")[2]: flat for flat in flats}
    views = []
    for parameter in parameters:
        part, rests[parameter.dtype] = rests[parameter.dtype].tensor_split([parameter.count])
        views.append(part.view(parameter.shape))
    return views
