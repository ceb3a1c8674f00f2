"""Quantized networks and weights have the same bits with the instructions of every processor."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightkit.native import target, toolchain
from lightkit.ops import Int8Chain, Int8Layer, fake_quantize_weights_reference

sys.path.insert(0, str(Path(__file__).parents[1] / "ops"))
import int8_chains

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not target._is_x86(), reason="the instructions are x86's")]

# The flags of each way of the kernel, and the instructions that a processor needs for it.
WAYS = {
    "no vectors": (["-march=x86-64", "-DCPU_CAPABILITY=DEFAULT"], []),
    "AVX2": (["-march=x86-64-v3", "-DCPU_CAPABILITY=AVX2", "-DCPU_CAPABILITY_AVX2"], ["avx2", "fma"]),
    "AVX2 and VNNI": (
        ["-march=x86-64-v3", "-mavxvnni", "-DCPU_CAPABILITY=AVX2", "-DCPU_CAPABILITY_AVX2"],
        ["avx2", "fma", "avx_vnni"],
    ),
    "AVX-512": (["-march=x86-64-v4", "-DCPU_CAPABILITY=AVX512", "-DCPU_CAPABILITY_AVX512"], ["avx512bw", "avx512vl"]),
    "AVX-512 and VNNI": (
        ["-march=x86-64-v4", "-mavx512vnni", "-DCPU_CAPABILITY=AVX512", "-DCPU_CAPABILITY_AVX512"],
        ["avx512bw", "avx512vl", "avx512_vnni"],
    ),
}


@pytest.fixture(scope="module", params=WAYS)
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The kernels, compiled with the flags of one way; skips where the processor cannot run them."""
    flags, instructions = WAYS[request.param]
    if missing := target.missing_instructions(instructions):
        pytest.skip(f"this processor has no {', '.join(missing)}")
    kernels = toolchain.SOURCE_DIR / "kernels" / "cpu"
    families = (kernels / "int8_chain", kernels / "fake_quantize")
    sources = [
        *(path for family in families for path in sorted(family.glob("*.cpp"))),
        kernels / "common" / "parallel.cpp",
    ]
    unit = tmp_path_factory.mktemp("int8") / "unit.cpp"
    sources.append(Path(__file__).with_name("int8_driver.cpp"))
    unit.write_text("".join(f'#include "{source.resolve()}"\n' for source in sources))
    command = [
        *toolchain.require_compiler(),
        *toolchain.common_flags(cuda=False),
        *toolchain.include_flags(None),
        *flags,
    ]
    made = unit.with_suffix(".so")
    options = ["-Wno-psabi", str(unit), *toolchain.link_flags(None), "-o", str(made)]
    result = subprocess.run([*command, *options], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return ctypes.CDLL(str(made))


def run(library: ctypes.CDLL, layers: list[Int8Layer], input: Tensor, scale: float, zero_point: int) -> Tensor:
    """Runs a chain in a library; the expected output has the shape."""
    shape = int8_chains.exact(input, layers, scale, zero_point).shape
    (images, channels, height, width), numbers = input.shape, []
    for layer in layers:
        out, per_group, *kernel = layer.weight.shape
        before = channels
        if layer.is_linear:
            channels, height, width, kernel = per_group, 1, 1, [1, 1]
        rows, columns = (
            (size + 2 * p - d * (k - 1) - 1) // stride + 1
            for size, p, d, k, stride in zip(
                (height, width), layer.padding, layer.dilation, kernel, layer.stride, strict=True
            )
        )
        numbers += [channels, height, width, out, rows, columns, *kernel, *layer.stride, *layer.padding]
        numbers += [*layer.dilation, layer.groups, layer.relu, layer.pool, zero_point]
        numbers += [before if layer.is_linear else channels]
        window = 2 if layer.pool else 1
        channels, height, width, zero_point = out, rows // window, columns // window, layer.output_zero_point

    def pointers(name: str) -> ctypes.Array[ctypes.c_void_p]:
        return (ctypes.c_void_p * len(layers))(*(getattr(layer, name).data_ptr() for layer in layers))

    # The kernel returns [images, rows, columns, channels].
    last = torch.full((shape[0], *shape[2:], shape[1]), float("nan"))
    library.run_chain(
        ctypes.c_int64(len(layers)),
        (ctypes.c_int64 * len(numbers))(*map(int, numbers)),
        *map(pointers, ("weight", "bias", "multiplier")),
        ctypes.c_void_p(input.data_ptr()),
        ctypes.c_int64(images),
        ctypes.c_float(1 / torch.tensor(scale).item()),
        ctypes.c_void_p(last.data_ptr()),
    )
    return last.movedim(-1, 1)


def test_chains(library: ctypes.CDLL) -> None:
    """Networks of all kinds of layers, and the largest products of either sign, which 16 bits do not hold."""
    generator = torch.Generator().manual_seed(0)

    def layer(*shape: int, **settings: object) -> Int8Layer:
        return int8_chains.layer(generator, *shape, output_zero_point=50, **settings)

    largest = [
        Int8Layer(torch.full((17, 9, 3, 3), sign * 127).to(torch.int8), torch.zeros(17).int(), torch.rand(17) + 1e-4)
        for sign in (1, -1)
    ]
    chains = [
        (int8_chains.cnn(), (5, 1, 28, 28)),
        ([layer(70, 3, 5, 4, padding=(2, 1), stride=(2, 1), pool=True, relu=True), layer(9, 70, 1, 1)], (3, 3, 17, 13)),
        ([layer(6, 2, 3, 3, groups=3, dilation=(2, 1)), layer(6, 1, 2, 2, groups=6), layer(33, 216)], (2, 6, 11, 9)),
        *(([item], (1, 9, 4, 4)) for item in largest),
    ]
    for layers, shape in chains:
        input = torch.randn(shape, generator=generator) * 2
        for zero_point in (0, 130, 255):
            expected = int8_chains.exact(input, layers, 0.0125, zero_point)
            assert torch.equal(run(library, layers, input, 0.0125, zero_point), expected)
            assert torch.equal(Int8Chain(layers, 0.0125, zero_point)(input), expected)


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_rounded_weights(library: ctypes.CDLL, bits: int) -> None:
    """Rows of any length, zeros, and values that are not finite, as torch's operations round them."""
    for columns in (1, 9, 16, 37, 576):
        weight = torch.randn(40, columns, generator=torch.Generator().manual_seed(columns))
        weight[5:8, columns // 2] = torch.tensor([float("nan"), float("inf"), -0.0])
        weight[9] = 0
        expected, output, scale = torch.empty_like(weight), torch.empty_like(weight), torch.empty(40)
        (scales,) = fake_quantize_weights_reference([weight], [expected], bits)
        pointers = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (weight, output, scale))
        library.round_rows(*pointers, *map(ctypes.c_int64, (40, columns, bits)))
        for found, other in ((output, expected), (scale, scales)):
            torch.testing.assert_close(found, other, rtol=0, atol=0, equal_nan=True)
