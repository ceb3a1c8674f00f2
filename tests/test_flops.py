"""FlopCounter: counts against numbers by hand, unchanged results, and operations that cannot be counted."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from lightkit.compress import QUANTIZATION_KEY, QuantizationScheme, apply_quantization, calibrate
from lightkit.flops import _FORMULAS, FlopCounter, matmul_rate
from lightkit.models import CNN, RNN, Transformer
from lightkit.nn.int8_layers import find_int8_chain
from lightkit.ops import conv2d, conv_relu_pool, linear_cross_entropy
from lightkit.optim import Adam

# One image: three convolutions and two linear maps. The first convolution computes no gradient of the image.
CONVOLUTIONS = (2 * 26 * 26 * 32 * 9, 2 * 11 * 11 * 64 * 9 * 32, 2 * 3 * 3 * 64 * 9 * 64)
CNN_FORWARD = sum(CONVOLUTIONS) + 2 * 576 * 64 + 2 * 64 * 10
CNN_STEP = 3 * CNN_FORWARD - CONVOLUTIONS[0]

GATES = {"lstm": 4, "gru": 3, "elman": 1}


@pytest.fixture(autouse=True)
def nothing_compiled():
    """Resets what other tests gave to torch.compile."""
    torch._dynamo.reset()


def count(run) -> int | None:
    """Returns the operations of a function and of the backward of its result."""
    with FlopCounter() as counter:
        result = run()
        if result.requires_grad:
            result.sum().backward()
    return counter.total


@pytest.mark.parametrize("blocks", ["fused", "torch"])
def test_cnn(blocks):
    """Both kinds of blocks have the same count."""
    model, images = CNN(blocks=blocks), torch.randn(5, 1, 28, 28)
    with torch.no_grad():
        assert count(lambda: model(images)) == 5 * CNN_FORWARD
    assert count(lambda: model(images)) == 5 * CNN_STEP
    assert CNN_STEP == 16_376_064


def test_conv_relu_pool():
    """The whole convolution counts, with the row that the pool drops; each needed gradient takes as much."""
    images, weight = torch.randn(2, 3, 8, 9), torch.randn(4, 3, 2, 3)
    once = 2 * 2 * 4 * 9 * 9 * 3 * 2 * 3
    for of_images in (False, True):
        for of_weight in (False, True):
            images.requires_grad_(of_images), weight.requires_grad_(of_weight)
            run = lambda: conv_relu_pool(images, weight, padding=1)  # noqa: E731
            assert count(run) == (1 + of_images + of_weight) * once
    with torch.inference_mode():
        assert count(run) == once


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_conv2d(groups):
    """The kernel's convolution counts as torch's, forward and backward."""
    images, weight = torch.randn(2, 6, 10, 10, requires_grad=True), torch.randn(12, 6 // groups, 3, 3)
    runs = [
        lambda function=function: function(images, weight.requires_grad_(), None, 2, 1, 1, groups)
        for function in (conv2d, torch.nn.functional.conv2d)
    ]
    assert count(runs[0]) == count(runs[1])


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("transposed", [False, True])
def test_groups(groups, transposed):
    """Each input value is multiplied by the weights of its own group, in forward and backward."""
    layer = (nn.ConvTranspose2d if transposed else nn.Conv2d)(6, 12, 3, groups=groups)
    images = torch.randn(2, 6, 10, 10, requires_grad=True)
    places = 10 * 10 if transposed else 8 * 8
    assert count(lambda: layer(images)) == 3 * 2 * 2 * places * 6 * 12 * 9 // groups


@pytest.mark.parametrize("cell", GATES)
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_recurrent(cell, layers, bidirectional):
    """Each step is multiplied by two matrices, that of the input and that of the state."""
    inputs, size, batch, steps, outputs = 3, 5, 2, 7, 4
    model = RNN(inputs, size, outputs, num_layers=layers, cell=cell, bidirectional=bidirectional)
    directions = 1 + bidirectional
    rows = [directions * 2 * batch * GATES[cell] * size * width for width in (inputs, directions * size, size)]
    of_input, of_layers, of_state = rows[0], (layers - 1) * rows[1], layers * rows[2]
    head = 2 * batch * directions * size * outputs
    with torch.no_grad():
        assert count(lambda: model(torch.randn(batch, steps, inputs))) == (
            steps * (of_input + of_layers + of_state) + head
        )
    if cell == "lstm":
        # One kernel computes every gradient.
        expected = 3 * (steps * (of_input + of_layers + of_state) + head)
    else:
        # The products are counted singly; the input and the initial state have no gradients.
        expected = steps * (2 * of_input + 3 * of_layers + 3 * of_state) - of_state + 3 * head
    assert count(lambda: model(torch.randn(batch, steps, inputs))) == expected


@pytest.mark.parametrize("cell", [nn.LSTM, nn.GRU, nn.RNN])
def test_packed_sequences(cell):
    """Padding is not counted."""
    layer, lengths = cell(3, 5, batch_first=True), torch.tensor([7, 4, 1])
    packed = pack_padded_sequence(torch.randn(3, 7, 3), lengths, batch_first=True)
    with torch.no_grad():
        once = count(lambda: layer(packed)[0].data)
    assert once == 2 * 12 * sum(w.numel() for w in (layer.weight_ih_l0, layer.weight_hh_l0))


@pytest.mark.parametrize("dropout", [0.0, 0.1], ids=["one kernel", "product by product"])
def test_transformer(dropout):
    """Linear maps and attention count once, whichever kernel torch takes."""
    dim, layers, inner, vocabulary, batch, steps = 32, 2, 96, 50, 3, 11
    model = Transformer(vocabulary, dim, layers, num_heads=4, context=16, dropout=dropout)
    maps = layers * (4 * dim * dim + 3 * dim * inner) + dim * vocabulary
    attention = layers * 2 * steps * steps * dim
    tokens = torch.randint(vocabulary, (batch, steps))
    assert count(lambda: model(tokens)) == 3 * 2 * batch * (steps * maps + attention)


def test_kernels_of_a_gpu():
    """Kernels of cuDNN and flash attention are counted by the shapes of their arguments."""
    aten = torch.ops.aten

    def empty(*sizes, dtype=torch.float16):
        return torch.empty(sizes, dtype=dtype, device="meta")

    packed, state, buffer = empty(14, 3), empty(1, 2, 5), empty(200)
    weights, lengths = [empty(20, 3), empty(20, 5), empty(20), empty(20)], [2] * 7
    # LSTM, hidden size, no projection, layers, not batch first, dropout, train, one direction.
    options = (2, 5, 0, 1, False, 0.0, True, False, lengths, None)
    once = 2 * 14 * (20 * 3 + 20 * 5)
    assert count(lambda: aten._cudnn_rnn(packed, weights, 4, buffer, state, state, *options)[0]) == once
    outputs, reserve = empty(14, 5), empty(9, dtype=torch.uint8)
    known = (packed, weights, 4, buffer, state, state, outputs, outputs, state, state, *options, reserve)
    for of_weights in (False, True):
        # torch cannot run it without a GPU.
        formula = _FORMULAS["aten::_cudnn_rnn_backward"]
        assert formula(*known, [True, False, False, of_weights], out_val=None) == (1 + of_weights) * once

    query, scores, random = empty(2, 4, 16, 8), empty(2, 4, 16, dtype=torch.float32), empty(2, dtype=torch.uint64)
    products = 2 * 2 * (2 * 4) * 16 * 16 * 8
    assert count(lambda: aten._scaled_dot_product_flash_attention(query, query, query)[0]) == products
    backward = (query, query, query, query, query, scores, None, None, 16, 16, 0.0, True, random, random)
    assert count(lambda: aten._scaled_dot_product_flash_attention_backward(*backward)[0]) == 2 * products


@pytest.mark.parametrize("reduction", ["mean", "none"], ids=["gradients in forward", "in backward"])
def test_linear_cross_entropy(reduction):
    """The logits and each needed gradient count; recomputed logits count once."""
    hidden, weight, target = torch.randn(6, 8), torch.randn(20, 8), torch.randint(20, (6,))
    run = lambda: linear_cross_entropy(hidden, weight, target, reduction=reduction)  # noqa: E731
    once = 2 * 6 * 8 * 20
    assert count(run) == once
    hidden.requires_grad_()
    assert count(run) == 2 * once
    weight.requires_grad_()
    assert count(run) == 3 * once


def test_products():
    """All products of torch count: with an added term, batched, in place, with a vector."""
    a, b, v = torch.randn(2, 3, 4), torch.randn(2, 4, 5), torch.randn(4)
    assert count(lambda: a[0] @ b[0]) == 2 * 3 * 4 * 5
    assert count(lambda: F.linear(a, b[0].t(), torch.zeros(5))) == 2 * 2 * 3 * 4 * 5
    assert count(lambda: torch.zeros(3, 5).addmm_(a[0], b[0])) == 2 * 3 * 4 * 5
    assert count(lambda: a @ b) == count(lambda: torch.baddbmm(torch.zeros(1), a, b)) == 2 * 2 * 3 * 4 * 5
    assert count(lambda: torch.addbmm(torch.zeros(3, 5), a, b)) == 2 * 2 * 3 * 4 * 5
    assert count(lambda: torch.zeros(2, 3, 5).baddbmm_(a, b)) == 2 * 2 * 3 * 4 * 5
    assert count(lambda: a[0] @ v) == count(lambda: torch.addmv(torch.zeros(3), a[0], v)) == 2 * 3 * 4
    assert count(lambda: torch.einsum("bij,bjk->bik", a, b)) == 2 * 2 * 3 * 4 * 5
    assert count(lambda: (a * 2).relu().sum()) == 0


def test_unknown():
    """The total is None, with a reason, and not too small."""

    @torch.library.custom_op("lightkit_tests::square", mutates_args=())
    def square(x: torch.Tensor) -> torch.Tensor:
        return x @ x

    square_matrix = torch.eye(4)
    runs = {
        "_linalg_solve_ex": lambda: torch.linalg.solve(square_matrix, square_matrix),
        "_trilinear": lambda: F.bilinear(square_matrix, square_matrix, torch.randn(2, 4, 4)),
        "_fft": lambda: torch.fft.rfft(square_matrix).real,
        "lightkit_tests": lambda: square(square_matrix),
        "sparse": lambda: square_matrix.to_sparse() @ square_matrix,
        "linear": lambda: torch.inference_mode()(F.linear)(square_matrix, square_matrix),
        "cond": lambda: torch.ops.higher_order.cond(True, torch.mm, torch.mm, (square_matrix, square_matrix)),
    }
    for name, run in runs.items():
        with FlopCounter() as counter:
            square_matrix @ square_matrix
            run()
        assert counter.total is None and name in counter.unsupported_reason, name


def test_compiled_code():
    """Compiled code runs compiled, and its operations are unknown."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    matrix = torch.eye(3)
    with FlopCounter() as counter:
        compiled = torch.compile(lambda x: x @ x, backend=backend)
        compiled(matrix)
    assert len(graphs) == 1
    assert counter.total is None and "torch.compile" in counter.unsupported_reason
    with FlopCounter() as counter:
        compiled(matrix)
        assert torch._C._len_torch_dispatch_stack() == 0
    assert counter.total is None and len(graphs) == 1


@pytest.mark.parametrize("make", [CNN, lambda: Transformer(20, 32, 2, 2, 16, dropout=0.2)], ids=["cnn", "transformer"])
def test_changes_nothing(make):
    """Weights after a step and random numbers are the same to the bit."""
    outcomes = []
    for counted in (False, True):
        torch.manual_seed(0)
        model = make()
        inputs = torch.randn(8, 1, 28, 28) if isinstance(model, CNN) else torch.randint(20, (8, 16))
        optimizer = Adam(model.parameters())
        counter = FlopCounter()
        if counted:
            counter.__enter__()
        try:
            model(inputs).square().mean().backward()
        finally:
            counter.__exit__()
        optimizer.step()
        outcomes.append([*model.parameters(), torch.rand(3)])
    assert counter.total > 0
    assert all(map(torch.equal, *outcomes))


def test_dtype():
    """The dtype is that of most operations."""
    with FlopCounter() as counter, torch.autocast("cpu", torch.bfloat16):
        F.linear(torch.randn(8, 8), torch.randn(8, 8))
    torch.randn(2, 2).double() @ torch.randn(2, 2).double()
    assert counter.dtype == torch.bfloat16
    assert FlopCounter().dtype is None


def test_matmul_rate():
    """The rate is plausible, and no random number is drawn."""
    state = torch.get_rng_state()
    assert 1e8 < matmul_rate("cpu", torch.float32) < 1e15
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("seconds_of_256", "size"),
    [(70e-3, 256), (1e-5, 1024)],
    ids=["fallback", "kernel"],
)
def test_matmul_rate_of_a_slow_dtype(monkeypatch, seconds_of_256, size):
    """A product that takes long when it is small is not made larger; one that is fast is measured at full size."""
    sizes = []

    def time_of(matrix, result):
        sizes.append(len(matrix))
        return seconds_of_256 * (len(matrix) / 256) ** 3 * (10 if len(matrix) >= 1024 else 1)

    monkeypatch.setattr("lightkit.flops._time", time_of)
    rate = matmul_rate("cpu", torch.float32)
    assert max(sizes) == size
    assert rate == pytest.approx(2 * 256**3 / seconds_of_256 / (10 if size >= 1024 else 1))


def test_integers_count_like_floats():
    """A quantized model in evaluation has the operations of the layers that its integers compute."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(6 * 2 * 2, 5)),
    ).eval()
    x = torch.rand(3, 4, 12, 12)
    with torch.no_grad(), FlopCounter() as floats:
        model(x)
    spec = calibrate(model, QuantizationScheme(8), lambda: model(x))
    apply_quantization(model, {QUANTIZATION_KEY: spec})
    chain = find_int8_chain((model,))
    with FlopCounter() as integers:
        chain(x)
    assert integers.total == floats.total > 0
