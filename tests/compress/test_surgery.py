"""Removed units: the model computes what the whole one computes if nothing reads them, however it is written."""

from __future__ import annotations

import copy

import pytest
import torch
from pruned_models import NAMES, cases
from torch import nn

from lightkit.compress.surgery import provable_graph, remove_units
from lightkit.compress.tracing import trace
from lightkit.compress.units import is_removed, mask_of, named_tensors
from lightkit.compress.widths import changed_shapes, set_widths, shapes_of, take_widths
from lightkit.models import RNNLanguageModel
from lightkit.optim import SGD, Adam


@pytest.fixture(params=NAMES)
def case(request):
    torch.manual_seed(0)
    model, inputs, layers = cases()[request.param]
    for parameter in model.parameters():
        # Biases and scales that differ show a wrong index.
        if parameter.dim() == 1:
            nn.init.normal_(parameter)
    return model, inputs, layers


def without_reads(model, graph, removed):
    """Returns the outputs' model in which nothing reads the removed units."""
    model = copy.deepcopy(model)
    tensors = named_tensors(model)
    for axis in graph.axes:
        if axis.reads:
            gone = is_removed(axis.labels, removed).nonzero().flatten()
            tensors[axis.name].data.index_fill_(axis.axis, gone, 0)
    return model


def test_units_found(case):
    """Each layer whose output only layers and known functions read is found, and no other."""
    model, inputs, layers = case
    before = copy.deepcopy(model.state_dict())
    graph = provable_graph(model, inputs)
    assert {group.name for group in graph.groups} == layers
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training


def test_keyword_arguments_count_for_one_sample():
    """A model whose call has keyword arguments alone takes the multiply-adds of one sample, not of the batch."""
    tokens = torch.randint(20, (4, 6))
    model = RNNLanguageModel(20, 8)
    assert trace(model, [], {"tokens": tokens}).macs() == trace(model, [tokens]).macs() > 0


def test_output(case, request):
    """The outputs are those of the whole model without the weights that read the units; a layer norm changes them."""
    model, inputs, layers = case
    if not layers:
        return
    graph = provable_graph(model, inputs)
    removed = mask_of((unit for group in graph.groups for unit in group.units[::3]), graph.count)
    model.eval()
    expected = without_reads(model, graph, removed)(*inputs)
    macs = graph.macs(removed)
    remove_units(model, graph, removed)
    found = model(*inputs)
    assert found.shape == expected.shape
    if not any(isinstance(module, nn.LayerNorm) for module in model.modules()):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    # The counts are those of the model that is left.
    assert trace(model, inputs).macs() == pytest.approx(macs)
    assert macs < graph.macs() and graph.without(removed).macs() == pytest.approx(macs)


def test_training_after(case):
    """The pruned model trains: autograd and the optimizers know the new shapes."""
    model, inputs, layers = case
    if not layers:
        return
    optimizer = torch.optim.Adam(model.parameters())
    model.train()
    model(*inputs).square().sum().backward()
    optimizer.step()
    graph = provable_graph(model, inputs)
    removed = mask_of((unit for group in graph.groups for unit in group.units[::3]), graph.count)
    remove_units(model, graph, removed, [optimizer])
    model(*inputs).square().sum().backward()
    optimizer.step()
    assert all(p.grad is None or p.grad.shape == p.shape for p in model.parameters())


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, amsgrad=True),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: Adam(p, lr=0.01, ema_decay=0.9),
        lambda p: SGD(p, lr=0.1, momentum=0.9, nesterov=True),
        lambda p: torch.optim.Adafactor(p, lr=0.01),
        lambda p: torch.optim.Rprop(p),
    ],
)
def test_optimizer_state(make):
    """States of the remaining units stay as they are; a state of another shape begins anew."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    x = torch.randn(8, 4)
    optimizer = make(model.parameters())
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    state = optimizer.state[model[0].weight]
    whole = copy.deepcopy({name: value for name, value in state.items() if isinstance(value, torch.Tensor)})
    graph = provable_graph(model, [x])
    remove_units(model, graph, mask_of([0, 5], graph.count), [optimizer])
    after = optimizer.state[model[0].weight]
    for name, value in whole.items():
        if value.shape == (6, 4):
            assert torch.equal(after[name], value[1:5]), name
    optimizer.zero_grad()
    model(x).square().sum().backward()
    optimizer.step()
    assert model[0].weight.shape == (4, 4) and not model(x).isnan().any()


def test_bfloat16_master_weights():
    """The float32 copies of bfloat16 weights lose the same units."""
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).bfloat16()
    x = torch.randn(8, 4).bfloat16()
    optimizer = Adam(model.parameters(), lr=0.01, master_weights=True)
    model(x).float().square().sum().backward()
    optimizer.step()
    graph = provable_graph(model, [x])
    master = optimizer.state[model[0].weight]["master_weight"].clone()
    remove_units(model, graph, mask_of([2], graph.count), [optimizer])
    kept = [0, 1, 3, 4, 5]
    assert torch.equal(optimizer.state[model[0].weight]["master_weight"], master[kept])
    model(x).float().square().sum().backward()
    optimizer.step()
    assert torch.equal(optimizer.state[model[0].weight]["master_weight"].bfloat16(), model[0].weight)


def test_widths(case):
    """A dense model takes the widths as plain lists, or from the shapes of a state dict, and computes the same."""
    model, inputs, layers = case
    dense, other, shapes = copy.deepcopy(model), copy.deepcopy(model), shapes_of(model)
    graph = provable_graph(model, inputs)
    remove_units(model, graph, mask_of((u for g in graph.groups for u in g.units[::3]), graph.count))
    widths = changed_shapes(model, shapes)
    assert bool(widths) == bool(layers)
    set_widths(dense, widths)
    take_widths(other, model.state_dict())
    for copied in (dense, other):
        copied.load_state_dict(model.state_dict())
        torch.testing.assert_close(copied.eval()(*inputs), model.eval()(*inputs))
    # The other way: a checkpoint from before.
    take_widths(model, {name: torch.empty(shape) for name, shape in shapes.items()})
    assert shapes_of(model) == shapes
