"""Calls that are recorded again without a translation: when they are, and that nothing else ever is."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from captured import IMAGES, Captured
from programs import Functions, InPlace
from torch import nn

from lightkit.capture import calls, mode
from lightkit.capture.recorders import RECORDERS


def count_translations(monkeypatch) -> list[str]:
    """Returns a list that gets the name of each function whose call is translated."""
    translated: list[str] = []

    def counting(recorder, name):
        def record(*args, **kwargs):
            translated.append(name)
            return recorder.record(*args, **kwargs)

        return recorder._replace(record=record)

    counted = {function: counting(recorder, function.__name__) for function, recorder in RECORDERS.items()}
    monkeypatch.setattr(mode, "RECORDERS", counted)
    return translated


class Layers(nn.Module):
    """Layers whose settings a test changes between two calls."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 5)
        self.window = 2

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.norm(self.conv(x))), self.window)
        return self.head(F.relu(x).mean((2, 3)))


IMAGE = torch.randn(6, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def freeze(network):
    network.conv.weight.requires_grad_(False)


def widen_stride(network):
    network.conv.stride = (2, 2)


def pad_nothing(network):
    network.conv.padding = (0, 0)


def pool_more(network):
    network.window = 3


def forget_bias(network):
    network.conv.bias = None


def take_new_weights(network):
    network.conv.weight.data = torch.randn(16, 3, 5, 5, generator=torch.Generator().manual_seed(2))


def lay_out_channels_last(network):
    network.to(memory_format=torch.channels_last)


def validate(network):
    network.eval()


def forget_statistics(network):
    network.norm.momentum = 0.5


CHANGES = (
    *(freeze, widen_stride, pad_nothing, pool_more, forget_bias),
    *(take_new_weights, lay_out_channels_last, validate, forget_statistics),
)


def test_a_call_is_translated_once(monkeypatch):
    """The second step translates no call; a larger batch, other images and a step without gradients are new calls."""
    translated = count_translations(monkeypatch)
    both = Captured(Functions())
    both.check(IMAGES)
    assert sorted(translated) == sorted(["conv2d", "relu", "max_pool2d"] * 2 + ["flatten", "linear"])
    for images, count in ((IMAGES + 1, 0), (IMAGES[:3], 8), (IMAGES[:3] * 2, 0), (IMAGES, 8)):
        translated.clear()
        both.check(images)
        assert len(translated) == count
    translated.clear()
    with torch.no_grad():
        both.ours(IMAGES)
        both.ours(IMAGES)
    assert len(translated) == 8
    both.undo()


def test_a_change_between_two_calls_is_seen():
    """Whatever a program changes in a layer, the next calls compute with it, as torch's do."""
    for change in CHANGES:
        torch.manual_seed(0)
        both = Captured(Layers())
        both.check(IMAGE)
        both.check(IMAGE)
        assert both.replaced(), change.__name__
        for network in (both.torchs, both.ours):
            change(network)
        both.check(IMAGE)
        both.check(IMAGE * 2)
        both.undo()


def test_a_repeated_dropout_draws_new_masks():
    """Each call has the mask of torch's random state at that call, and drops what its probability says."""
    dropout = nn.Dropout(0.5)
    network = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), dropout)
    both = Captured(network)

    def kept(seed, p):
        dropout.p = p
        torch.manual_seed(seed)
        return both.ours(IMAGES) != 0

    first, second, again = kept(1, 0.5), kept(2, 0.5), kept(1, 0.5)
    assert not torch.equal(first, second)
    assert torch.equal(first, again)
    assert abs(kept(3, 0.9).float().mean() - 0.1) < 0.02
    both.undo()


def test_branches_take_turns():
    """A program that takes one of two ways through its layers gets the values of the way that it takes."""

    class Branches(Functions):
        way = 0

        def forward(self, x):
            x = F.relu(self.conv1(x)) if self.way == 0 else torch.tanh(self.conv1(x))
            x = F.max_pool2d(x, 2) if self.way == 0 else F.avg_pool2d(x, 2)
            x = F.relu(self.conv2(x))
            return self.head(F.max_pool2d(x + x if self.way == 1 else x, 2).flatten(1))

    both = Captured(Branches())
    for way in (0, 1, 0, 0, 1, 1, 0):
        both.torchs.way = both.ours.way = way
        both.check(IMAGES)
    both.undo()


def test_an_operand_from_another_place_is_seen():
    """The same function on the value of another layer is another call."""

    class Skips(nn.Module):
        source = 0

        def __init__(self):
            super().__init__()
            self.convs = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))

        def forward(self, x):
            first = F.relu(self.convs[0](x))
            second = F.relu(self.convs[1](first))
            return F.relu(self.convs[2]((first, second)[self.source])) + first + second

    both = Captured(Skips())
    images = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for source in (0, 0, 1, 1, 0):
        both.torchs.source = both.ours.source = source
        both.check(images)
    both.undo()


def test_a_call_behind_one_that_cannot_be_compared():
    """A list among the arguments may change in place: what follows is no repetition if the list has."""

    class Lists(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3)
            self.stride = [1, 1]

        def forward(self, x):
            x = F.relu(self.first(x))
            x = F.relu(F.conv2d(x, self.second.weight, self.second.bias, self.stride))
            return F.max_pool2d(x, 2) / x.shape[2]

    both = Captured(Lists())
    for stride in (1, 1, 2, 2, 1):
        for network in (both.torchs, both.ours):
            network.stride[:] = stride, stride
        both.check(IMAGES)
    both.undo()


def test_a_sparse_operand_is_torchs():
    """A tensor without strides in the place of a dense one is no repetition."""

    class Sums(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.other = nn.Conv2d(1, 5, 18), torch.eye(6, 5)

        def forward(self, x):
            return F.relu(torch.add(F.relu(self.conv(x)).flatten(1), self.other))

    both = Captured(Sums())
    with torch.no_grad():
        for _ in range(2):
            both.check(IMAGES, backward=False)
        for sparse in (torch.eye(6, 5).to_sparse(), torch.eye(6, 5).to_sparse_csr()):
            both.torchs.other = both.ours.other = sparse
            both.check(IMAGES, backward=False)
    both.undo()


def test_repeated_calls_in_place():
    """A ReLU that overwrites its input gives torch's values in every step."""
    both = Captured(InPlace())
    for _ in range(3):
        both.check(IMAGES)
    both.undo()


def test_a_tensor_as_a_number_is_read_in_every_call():
    """Torch takes a tensor of one number for a setting; its value may change in place."""

    class Warming(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 4, 3)
            self.register_buffer("share", torch.tensor(1.0))

        def forward(self, x):
            x = self.conv(x)
            return F.relu(torch.add(F.relu(x), torch.tanh(x), alpha=self.share))

    both = Captured(Warming())
    for share in (1.0, 1.0, 0.25, 1.0):
        for network in (both.torchs, both.ours):
            network.share.fill_(share)
        both.check(IMAGES)
    both.undo()


def test_one_tensor_in_two_places_becomes_two():
    """The weight and the bias of a norm are tied, and then they are not."""
    both = Captured(Layers())
    for network in (both.torchs, both.ours):
        network.norm.bias = network.norm.weight
    for untied in (False, False, True, True):
        for network in (both.torchs, both.ours):
            if untied:
                network.norm.bias = nn.Parameter(torch.arange(16.0))
        both.check(IMAGE)
    both.undo()


def test_a_chain_behind_a_value_of_autocast():
    """Its input is bfloat16 and its weights are not; the first layer alone is torch's."""

    class Stem(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 16, 3, stride=2), nn.Conv2d(16, 16, 3, padding=1)

        def forward(self, x):
            return F.max_pool2d(F.relu(self.second(F.relu(self.first(x)))), 2)

    images = torch.randn(4, 3, 36, 36, generator=torch.Generator().manual_seed(0))
    both = Captured(Stem())
    both.check(images)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            ours, torchs = both.ours(images), both.torchs(images)
            assert ours.dtype == torch.bfloat16
            torch.testing.assert_close(ours, torchs, rtol=0.05, atol=0.02)
    assert {"first", "second"} <= set(both.replaced())
    both.undo()


def test_calls_that_never_repeat_take_bounded_memory(monkeypatch):
    """The known calls of a program whose sizes always differ stay few, and so do those of a long loop in one call."""

    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 1, 3, padding=1)

        def forward(self, x):
            for _ in range(100):
                x = F.relu(self.conv(x)).abs()
            return x

    monkeypatch.setattr(calls, "_MAX_CALLS", 20)
    both = Captured(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()))
    known = both.capture.calls
    for width in range(3, 60):
        both.ours(torch.randn(1, 1, 3, width))
    assert _length(known) <= 20
    known._keys = {("filled", i): i for i in range(4096)}
    both.ours(torch.randn(1, 1, 3, 70))
    assert len(known._keys) == 2
    both.undo()
    both = Captured(Loop())
    for _ in range(2):
        both.check(IMAGES)
        assert _length(both.capture.calls) <= 20
    both.undo()


def _length(known: calls.Calls) -> int:
    """Returns the number of calls that a capture keeps."""
    count = 0
    for call in known._first.values():
        while call is not None:
            count, call = count + 1, call.next
    return count
