"""What a fused chain of layers and its block of one layer both promise to autograd, torch.compile and torch.func."""

from __future__ import annotations

import itertools

import pytest
import torch
from chains import LINEAR, PADDED, PLANS, Subject, block, leaves_of, results, tensors_of, upstream_of, with_tensors
from support.threads import assert_same_with_any_threads
from torch._dynamo.testing import AotEagerAndRecordGraphs

# One channel, few and many go different ways through the kernels; so do blocks with a pool and without.
BLOCKS = {
    "block": block(3, 17),
    "block of one channel": block(1, 7, bias=False),
    "block without pool": block(6, 5, padding=(1, 1), pool=False),
}
CHAINS = {name: Subject(*plan) for name, plan in PLANS.items()}
SUBJECTS = {**BLOCKS, **CHAINS}

every_subject = pytest.mark.parametrize("name", SUBJECTS)


@pytest.mark.sanitized
@every_subject
def test_gradients_of_some(name):
    """Each gradient is there if and only if it is wanted, and is the same whatever else is."""
    subject = SUBJECTS[name]
    if name == "cnn":
        subject = Subject((3, 19, 16), [*PADDED[:2], (6, True, True)])
    given = subject.make()
    everything = results(subject.native, *given)[1:]
    # The input, three weights and the last bias, in all combinations.
    chosen = sorted({0, 1, 2, 3, len(everything) - 1} & set(range(len(everything))))
    for wanted in itertools.product((False, True), repeat=len(chosen)):
        input, layers, tensors = leaves_of(*given)
        for tensor in tensors:
            tensor.requires_grad_(False)
        for place, is_wanted in zip(chosen, wanted, strict=True):
            tensors[place].requires_grad_(is_wanted)
        output = subject.native(input, layers)
        assert output.requires_grad == any(wanted)
        if any(wanted):
            output.backward(upstream_of(output))
        for tensor, gradient in zip(tensors, everything, strict=True):
            assert (tensor.grad is not None) == tensor.requires_grad
            assert tensor.grad is None or torch.equal(tensor.grad, gradient)


@every_subject
def test_no_grad_gives_the_same(name):
    """Inference keeps nothing and gives the same bits."""
    subject = SUBJECTS[name]
    given = subject.make(images=70)
    with torch.inference_mode():
        inferred = subject.native(*given)
    assert torch.equal(results(subject.native, *given)[0], inferred)


@pytest.mark.sanitized
@every_subject
def test_empty_batch(name):
    """No image: an empty output of the right shape, and gradients that are 0."""
    subject = SUBJECTS[name]
    given = subject.make(images=0)
    torch.testing.assert_close(results(subject.native, *given), results(subject.reference, *given))


def layouts(tensor):
    """The same values: transposed in memory, with gaps, and for images as channels-last."""
    yield tensor.transpose(0, 1).contiguous().transpose(0, 1)
    yield tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
    yield torch.stack([tensor] * 2, -1)[..., 0]
    if tensor.dim() == 4:
        yield tensor.contiguous(memory_format=torch.channels_last)


@pytest.mark.sanitized
@every_subject
def test_memory_formats(name):
    """Contiguous, channels-last, strided and expanded tensors are read right; images come out as channels-last."""
    subject = SUBJECTS[name]
    input, layers = subject.make()
    expected = results(subject.native, input, layers)
    for other in layouts(input):
        torch.testing.assert_close(results(subject.native, other, layers), expected, rtol=0, atol=0)
    for others in zip(*(layouts(tensor) for tensor in tensors_of(layers) if tensor.dim() > 1), strict=False):
        tensors = [*others, *(tensor for tensor in tensors_of(layers) if tensor.dim() == 1)]
        actual = results(subject.native, input, with_tensors(layers, tensors))
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    output = subject.native(input, layers)
    assert output.is_contiguous(memory_format=torch.channels_last if output.dim() == 4 else torch.contiguous_format)
    expanded = input[:1].expand(3, *input.shape[1:])
    torch.testing.assert_close(subject.native(expanded, layers), subject.native(expanded.contiguous(), layers))


SMALL = {
    **{
        f"block of {channels}, pool {pool}, bias {bias}": block(channels, 3, (6, 5), (1, 1), pool, bias)
        for channels, pool, bias in [(1, True, True), (1, False, False), (2, True, False), (2, False, True)]
    },
    "padded": Subject(
        (2, 7, 6), [(3, (3, 3), (1, 1), True, True, True), (2, (2, 2), (0, 1), False, True, False), (3, True, True)]
    ),
    "linear": Subject((4,), LINEAR[:2]),
}


@pytest.mark.parametrize("name", SMALL)
def test_gradcheck_and_gradgradcheck(name):
    """First and second derivatives against finite differences."""
    subject = SMALL[name]
    _, layers, tensors = leaves_of(*subject.make(torch.float64, images=2))

    def function(input, *others):
        return subject.native(input, with_tensors(layers, others))

    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_subject
def test_opcheck(name, dtype):
    """Schema, fake tensors and autograd registration are consistent, for the inner ops as well."""
    subject = SUBJECTS[name]
    input, layers, _ = leaves_of(*subject.make(dtype))
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(subject.op.default, subject.arguments(input, layers), test_utils=checks)
    with torch.no_grad():
        detached = CHAINS["cnn"].arguments(
            input.detach(), with_tensors(layers, [t.detach() for t in tensors_of(layers)])
        )
        input, weights, biases, settings, scales = detached
        inner = ("test_schema", "test_faketensor")
        forward = torch.ops.lightkit._layer_chain_forward.default
        for keep in (True, False):
            torch.library.opcheck(forward, (input, weights, biases, settings, keep, scales), test_utils=inner)
        output, activations, index = forward(input, weights, biases, settings, True, scales)
        backward = torch.ops.lightkit._layer_chain_backward.default
        for wanted in ([1] * (1 + 2 * len(layers)), [0, 1] * len(layers) + [0]):
            arguments = (output, input, weights, activations, index, settings, wanted)
            torch.library.opcheck(backward, arguments, test_utils=inner)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", ["block", "cnn"])
def test_compile_fullgraph(name, dynamic):
    """The op is no break in a compiled graph, forward or backward, with sizes fixed or not, and is in it."""
    subject = SUBJECTS[name]
    torch._dynamo.reset()
    recorder = AotEagerAndRecordGraphs()
    compiled = torch.compile(subject.public, fullgraph=True, dynamic=dynamic, backend=recorder)
    for images in (4, 5):
        given = subject.make(images=images)
        actual, expected = results(compiled, *given), results(subject.native, *given)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    assert "lightkit._layer_chain_forward" in recorder.fw_graphs[0].code
    assert "lightkit._layer_chain_backward" in recorder.bw_graphs[0].code


@pytest.mark.parametrize("name", ["block", "padded", "linear"])
def test_functional_transforms_and_forward_mode(name):
    """torch.func and forward-mode AD go through the reference."""
    subject = SUBJECTS[name]
    input, layers = subject.make()
    per_image = torch.func.vmap(lambda x: subject.public(x.unsqueeze(0), layers)[0])(input)
    torch.testing.assert_close(per_image, subject.reference(input, layers))

    def loss(function):
        return lambda weight: function(input, [layers[0]._replace(weight=weight), *layers[1:]]).sum()

    weight = layers[0].weight
    gradient, expected = (torch.func.grad(loss(f))(weight) for f in (subject.public, subject.reference))
    torch.testing.assert_close(gradient, expected)
    _, tangent = torch.func.jvp(loss(subject.public), (weight,), (weight,))
    _, expected = torch.func.jvp(loss(subject.reference), (weight,), (weight,))
    torch.testing.assert_close(tangent, expected)


THREADED = {
    **{
        f"block {channels}x{out_channels}, pool {pool}": block(channels, out_channels, (14, 15), pool=pool)
        for channels, out_channels in [(1, 32), (32, 64), (5, 7)]
        for pool in (True, False)
    },
    **{
        f"chain of {channels} channels": Subject(
            (channels, 28, 27),
            [
                (first, (3, 3), (0, 0), True, True, True),
                (80, (3, 3), (0, 0), True, True, True),
                (70, (2, 3), (0, 0), False, True, True),
                (11, True, True),
                (7, False, True),
            ],
        )
        for channels, first in [(1, 32), (3, 20)]
    },
}


@pytest.mark.parametrize("name", THREADED)
def test_bit_identical_across_threads(name):
    """Output and gradients do not depend on the number of threads, on the run, nor on who took which images."""
    subject = THREADED[name]
    given = subject.make(images=53)
    assert_same_with_any_threads(lambda: results(subject.native, *given))
