"""Networks as people write them: the same layers as modules, functions and methods, and code of every kind around."""

from __future__ import annotations

import weakref

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint


class Layers(nn.Module):
    """Two convolutions and a linear layer; subclasses write ``forward``."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 16, 3)
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Linear(16 * 3 * 3, 5)


class Functions(Layers):
    """Layers as attributes, the rest as functions."""

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return self.head(torch.flatten(x, 1))


class Methods(Layers):
    """Methods of tensors, ``view`` with the batch size."""

    def forward(self, x):
        x = self.pool(self.conv1(x).relu())
        x = torch.max_pool2d(torch.relu(self.conv2(x)), (2, 2), stride=2)
        return self.head(x.view(x.size(0), -1))


class Reshaped(Layers):
    """A name for each value, and ``reshape`` to a fixed width."""

    def forward(self, x):
        first = self.pool(F.relu(input=self.conv1(x)))
        second = self.pool(F.relu(self.conv2(first)))
        flat = second.reshape(-1, 144)
        return F.linear(flat, self.head.weight, self.head.bias)


class InPlace(Layers):
    """ReLUs that overwrite their input, as functions and as a module."""

    def __init__(self):
        super().__init__()
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        x = self.conv1(x)
        F.relu(x, inplace=True)
        x = self.pool(x)
        x = self.act(self.conv2(x))
        return self.head(self.pool(x).flatten(1))


class Loop(nn.Module):
    """Layers in a ModuleList, a Sequential and a ModuleDict."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(1, 8, 3), nn.Conv2d(8, 16, 3)])
        self.after = nn.ModuleDict({"act": nn.ReLU(), "pool": nn.MaxPool2d(2)})
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(144, 5))

    def forward(self, x):
        for conv in self.convs:
            x = conv(x)
            for layer in self.after.values():
                x = layer(x)
        return self.head(x)


class Functional(nn.Module):
    """Parameters without modules."""

    def __init__(self):
        super().__init__()
        self.weights = nn.ParameterList([torch.randn(8, 1, 3, 3), torch.randn(16, 8, 3, 3) / 8])
        self.head = nn.Parameter(torch.randn(5, 144) / 12)

    def forward(self, x):
        for weight in self.weights:
            x = F.max_pool2d(F.conv2d(x, weight).relu_(), kernel_size=2)
        return F.linear(x.flatten(start_dim=1), self.head)


WAYS = [Functions, Methods, Reshaped, InPlace, Loop, Functional]


class Branching(Layers):
    """Control flow that depends on values."""

    def forward(self, x):
        x = self.pool(F.relu(self.conv1(x)))
        if x.mean() > 0.2:
            x = x * 2
        for _ in range(int(x.sum()) % 3):
            x = x + 1
        return self.head(self.pool(F.relu(self.conv2(x))).flatten(1))


class Keeps(Layers):
    """Values that outlive the call, as an attribute and in a dict."""

    def forward(self, x):
        self.features = F.relu(self.conv1(x))
        x = self.pool(self.features)
        return {"x": x, "all": [self.head(self.pool(F.relu(self.conv2(x))).flatten(1)), (x.shape, None)]}


class Skip(nn.Module):
    """Values that are used twice, in sums and concatenations."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.conv3 = (
            nn.Conv2d(1, 8, 3, padding=1),
            nn.Conv2d(8, 8, 3, padding="same"),
            nn.Conv2d(16, 4, 3),
        )

    def forward(self, x):
        first = F.relu(self.conv1(x))
        second = self.conv2(first)
        second += first
        return F.relu(self.conv3(torch.cat([first, second], 1))).mean((2, 3))


class Normalized(nn.Module):
    """Batch norms before ReLU, pool and sum; dropout; a mean over the image."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.short, self.bn3 = nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.act = nn.ReLU(inplace=True)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = F.max_pool2d(self.act(self.bn1(self.conv1(x))), 2)
        out = self.bn2(self.conv2(x))
        out += self.bn3(self.short(x))
        x = F.adaptive_avg_pool2d(self.act(out), 1).flatten(1)
        return F.log_softmax(self.head(x), dim=1)


class Activated(nn.Module):
    """An activation function behind a batch norm with a pool, behind a sum, and between a convolution and a pool."""

    def __init__(self, function):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv3, self.function = nn.Conv2d(8, 8, 3), function
        self.head = nn.Linear(8 * 3 * 3, 5)

    def forward(self, x):
        x = F.max_pool2d(self.function(self.bn1(self.conv1(x))), 2)
        x = self.function(self.bn2(self.conv2(x)) + x)
        return self.head(F.max_pool2d(self.function(self.conv3(x)), 2).flatten(1))


class Headed(nn.Module):
    """A residual block and the mean of each image, which ``mean`` computes of a batch of size 18 x 18."""

    def __init__(self, mean, function=F.relu):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.mean, self.function, self.head = mean, function, nn.Linear(8, 5)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        return self.head(self.mean(self.function(self.bn2(self.conv2(x)) + x)))


class Sequences(nn.Module):
    """Convolutions of sequences with strides, padding, groups, dilation, batch norm, sums, pools and a mean."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv1d(18, 16, 3, padding=1, bias=False), nn.BatchNorm1d(16)
        self.conv2, self.bn2 = nn.Conv1d(16, 16, 5, padding="same", bias=False), nn.BatchNorm1d(16)
        self.conv3, self.pool = nn.Conv1d(16, 32, (3,), stride=2, padding=(1,)), nn.MaxPool1d(2)
        self.conv4 = nn.Conv1d(32, 8, 2, dilation=2, groups=2)
        self.act, self.drop, self.head = nn.SiLU(inplace=True), nn.Dropout1d(0.0), nn.Linear(8 * 3 + 32, 5)

    def forward(self, x):
        x = F.max_pool1d(F.relu(self.bn1(self.conv1(x.flatten(1, 2)))), 2, stride=1)
        x = self.act(self.bn2(self.conv2(x)) + x)
        x = self.drop(torch.relu(self.conv3(x)))
        self.stride = x.stride(), x.is_contiguous()
        last = F.pad(torch.conv1d(self.pool(x), self.conv4.weight, self.conv4.bias, 1, 0, 2, 2), (0, 1))
        return self.head(torch.cat([last.view(len(x), -1), F.adaptive_avg_pool1d(x, 1).flatten(1)], 1)), x.mean(-1)


class OwnFunction(Layers):
    """An autograd function of the program."""

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, gradient):
            return gradient * 2

    def forward(self, x):
        x = self.Double.apply(F.relu(self.conv1(x)))
        return self.head(self.pool(F.relu(self.conv2(self.pool(x)))).flatten(1))


class WritesWeights(Layers):
    """A weight and the input change between operations."""

    def forward(self, x):
        x = x.clone()
        first = F.relu(self.conv1(x))
        if not torch.is_grad_enabled():
            self.conv1.weight.mul_(1.01)
            x.add_(1)
        second = F.relu(self.conv1(x))
        self.conv2.weight.data = self.conv2.weight.data * 0.99
        return self.head(self.pool(F.relu(self.conv2(self.pool(first + second)))).flatten(1))


class Looks(Layers):
    """Values that leave torch: numpy, lists, weak references, ``data_ptr``, formats of memory."""

    def forward(self, x):
        x = F.relu(self.conv1(x))
        reference = weakref.ref(x)
        assert np.asarray(x.detach()).shape == tuple(x.shape) and len(x) == x.shape[0]
        assert x.data_ptr() and x.is_contiguous() and x.dtype == torch.float32 and isinstance(x, torch.Tensor)
        assert reference() is x and x.requires_grad == torch.is_grad_enabled()
        x = self.pool(F.relu(self.conv2(self.pool(x))))
        assert x.dim() == x.ndim == 4 and x.numel() == x.nelement() and x.device.type == "cpu"
        return self.head(x.flatten(1))


class Modes(Layers):
    """Parts without gradients, and checkpointed."""

    def forward(self, x):
        with torch.no_grad():
            frozen = self.pool(F.relu(self.conv1(x)))
        x = self.pool(F.relu(self.conv1(x))) + frozen
        x = checkpoint(lambda x: self.pool(F.relu(self.conv2(x))), x, use_reentrant=False)
        return self.head(x.flatten(1))


class Reentrant(Layers):
    """A part that is checkpointed by torch's older way."""

    def forward(self, x):
        x = self.pool(F.relu(self.conv1(x)))
        x = checkpoint(lambda x: self.pool(F.relu(self.conv2(x))), x, use_reentrant=True)
        return self.head(x.flatten(1))


class Checkpointed(nn.Module):
    """A module that is checkpointed behind layers that wait."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(1, 8, 3), nn.Linear(8, 5)
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU())

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.stem(x)), 2)
        return self.head(checkpoint(self.body, x, use_reentrant=False).mean((2, 3)))


class Packed(Layers):
    """Hooks of saved tensors around a part, which a program may count."""

    def __init__(self):
        super().__init__()
        self.packed = []

    def forward(self, x):
        def pack(tensor):
            self.packed.append(tuple(tensor.shape))
            return tensor

        x = self.pool(F.relu(self.conv1(x)))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            x = self.pool(F.relu(self.conv2(x)))
        return self.head(x.flatten(1))


class Shared(nn.Module):
    """One module that is called twice, and a weight under two names."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.again = nn.Conv2d(4, 4, 3, padding=1)
        self.again.weight = self.conv2.weight

    def forward(self, x):
        x = F.relu(self.conv1(x))
        return F.relu(self.again(F.relu(self.conv2(F.relu(self.conv2(x)))))).mean((2, 3))


class Parametrized(Layers):
    """A weight that a parametrization computes, and one with weight norm."""

    def __init__(self):
        super().__init__()
        parametrizations.weight_norm(self.conv1)
        parametrizations.orthogonal(self.conv2)

    def forward(self, x):
        x = self.pool(F.relu(self.conv1(x)))
        return self.head(self.pool(F.relu(self.conv2(x))).flatten(1))


class Counting(Layers):
    """Python state that decides what is computed, and a buffer that counts."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        self.count += 1
        x = self.pool(F.relu(self.conv1(x)))
        x = x * float(self.count) if self.calls % 2 else torch.tanh(x)
        return self.head(self.pool(F.relu(self.conv2(x))).flatten(1))


class ReadsStatistics(Layers):
    """Running statistics that the code reads after the batch norm, in the same call."""

    def __init__(self):
        super().__init__()
        # A bias before a batch norm has a gradient of rounding errors alone.
        self.conv1, self.norm = nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8)

    def forward(self, x):
        before = self.norm.running_mean[:4]
        x = self.norm(self.conv1(x))
        self.seen = [self.norm.running_mean.clone(), before + 0, torch.stack([self.norm.running_var])]
        x = self.pool(F.relu(x))
        return [self.head(self.pool(F.relu(self.conv2(x))).flatten(1)) * self.seen[0].sum(), x]


PROGRAMS = [
    Sequences,
    ReadsStatistics,
    *(Branching, Keeps, Skip, Normalized, OwnFunction, WritesWeights, Looks, Modes, Reentrant, Shared, Parametrized),
    Counting,
]
