"""The importance of units: how much the loss would change without each.

The first-order Taylor criterion of Molchanov et al. [1]_: a factor of 1 on the output of a unit, of which the loss has
the derivative g, changes the loss by about g if it becomes 0, and the importance is the mean of g squared over batches.
Layers read linearly, so that g is the sum of weight times gradient over the weights that read the unit. No hook is
needed, and the importances of different layers can be compared: they are the measured sensitivity of each layer.

References:
    .. [1] Molchanov, Mallya, Tyree, Frosio and Kautz, Importance Estimation for Neural Network Pruning, CVPR 2019.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightkit.compress.units import FIXED, UnitGraph, named_tensors


@torch.no_grad()
def squared_derivatives(root: nn.Module, graph: UnitGraph) -> Tensor:
    """Returns the squared derivative of the loss by a factor on the output of each unit, float32 ``(graph.count)``.

    Args:
        root: the traced module, whose parameters have gradients; a parameter without a gradient counts as 0.
        graph: the units of the module.
    """
    tensors = named_tensors(root)
    device = next((tensor.device for tensor in tensors.values()), torch.device("cpu"))
    derivatives = torch.zeros(graph.count + 1, device=device)
    for axis in graph.axes:
        tensor = tensors[axis.name]
        if not axis.reads or tensor.grad is None:
            continue
        products = (tensor.detach() * tensor.grad).float()
        others = [d for d in range(products.dim()) if d != axis.axis]
        sums = products.sum(others) if others else products
        # The entries without a unit gather at the end, which is cut off.
        labels = torch.where(axis.labels == FIXED, graph.count, axis.labels).to(device)
        derivatives.index_add_(0, labels, sums)
    return derivatives[:-1].square()
