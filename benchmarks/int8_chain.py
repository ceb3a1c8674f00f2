"""How fast is the documented CNN on 8-bit integers, next to ONNX Runtime's and to float32?

    python benchmarks/int8_chain.py --threads 1 [--seconds 10]

All contenders run the same random weights on the same images of 28x28, batch by batch. The 8-bit ones have per-channel
weights, with ranges from 256 images. Peers: ONNX Runtime on the float32 network and on the network that its
quantize_static makes of it (QDQ, which its kernels fuse), torch eager, lightkit's own float32 operation, and, where the
packages executorch and torchao are installed, XNNPACK on the network as ExecuTorch's own quantizer prepares it. XNNPACK
has a thread for each core that the process may use, so that `--threads 1` keeps the process on one core. A second table
has `fake_quantize_weights` for the weights of the CNN, beside torch's operations.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import layers
import numpy as np
import torch
from torch import Tensor, nn

from lightkit.models import CNN
from lightkit.ops import Int8Chain, Int8Layer, fake_quantize_weights, fake_quantize_weights_reference

BATCHES = [1, 8, 32, 128]


@cache
def calibration() -> Tensor:
    """Returns the images from which the ranges of the activations come."""
    return torch.rand(256, 1, 28, 28, generator=torch.Generator().manual_seed(0))


@cache
def network(blocks: str) -> nn.Module:
    """Returns the CNN, with the same weights for torch's layers and for lightkit's operation."""
    torch.manual_seed(0)
    return CNN(blocks=blocks).eval()


def modules() -> list[nn.Module]:
    """Returns the layers of the CNN in order."""
    model = network("torch")
    return [*model.features, *model.classifier]


@cache
@torch.no_grad()
def int8_chain() -> Int8Chain:
    """Returns the CNN on 8-bit integers, with ranges of the calibration."""
    x, scale = calibration(), 1 / 255
    made: list[Int8Layer] = []
    weighted = [module for module in modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    input_scale = scale
    for module in modules():
        x = module(x)
        if isinstance(module, nn.MaxPool2d):
            made[-1] = Int8Layer(made[-1].weight, made[-1].bias, made[-1].multiplier, relu=True, pool=True)
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            weight = module.weight.flatten(1)
            steps = weight.abs().amax(1) / 127
            integers = (weight / steps[:, None]).round().to(torch.int8).view_as(module.weight)
            bias = (module.bias / (scale * steps)).round().to(torch.int32)
            last = module is weighted[-1]
            output_scale = 1.0 if last else float(x.relu().max()) / 255
            made.append(Int8Layer(integers, bias, scale * steps / output_scale, relu=not last))
            scale = output_scale
    return Int8Chain(made, input_scale, 0)


@cache
def session(quantized: bool) -> object:
    """Returns an ONNX Runtime session of the CNN, in float32 or 8 bits, with torch's number of threads."""
    import onnxruntime
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Images(CalibrationDataReader):
        def __init__(self) -> None:
            self._batches = iter(calibration().split(32))

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self._batches, None)
            return None if batch is None else {"images": batch.numpy()}

    with tempfile.TemporaryDirectory() as folder:
        path, inferred, smaller = (Path(folder, name) for name in ("model.onnx", "inferred.onnx", "int8.onnx"))
        batch = {"images": {0: torch.export.Dim("batch")}}
        torch.onnx.export(
            network("torch"),
            (calibration()[:2],),
            path,
            input_names=["images"],
            dynamic_shapes=batch,
            dynamo=True,
            external_data=False,
            verbose=False,
        )
        if quantized:
            formats = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
            quant_pre_process(path, inferred)
            quantize_static(inferred, smaller, Images(), quant_format=QuantFormat.QDQ, per_channel=True, **formats)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        return onnxruntime.InferenceSession((smaller if quantized else path).read_bytes(), options)


def xnnpack(batch: int) -> Callable[[Tensor], object]:
    """Returns ExecuTorch's program of the CNN in 8 bits for a batch, all of it computed by XNNPACK."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    if torch.get_num_threads() == 1:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    images = calibration()
    network = nn.Sequential(*modules()).eval()
    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    prepared = prepare_pt2e(torch.export.export(network, (images[:batch],)).module(), quantizer)
    for part in images.split(batch):
        prepared(part)
    exported = torch.export.export(convert_pt2e(prepared), (images[:batch],))
    program = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()]).to_executorch()
    # A method reads the memory of its program, which a plain method object does not keep.
    buffer = program.buffer
    loaded = Runtime.get().load_program(buffer)
    method = loaded.load_method("forward")
    return lambda x: (buffer, loaded, method.execute([x]))[-1]


@torch.no_grad()
def run(model: Callable[[Tensor], Tensor], input: Tensor) -> Tensor:
    return model(input)


def predictions(batch: int) -> dict[str, Callable[[], object]]:
    """Returns the ways to compute the logits of a batch."""
    input = torch.rand(batch, 1, 28, 28, generator=torch.Generator().manual_seed(batch))
    feed = {"images": input.numpy()}
    own, float32, int8 = int8_chain(), session(False), session(True)
    agreement = (own(input).argmax(1) == run(network("torch"), input).argmax(1)).double().mean()
    print(f"batch {batch}: {agreement:.1%} of the classes are those of float32")
    peers: dict[str, Callable[[], object]] = {}
    if all(importlib.util.find_spec(name) for name in ("executorch", "torchao")):
        program = xnnpack(batch)
        peers["xnnpack int8"] = lambda: program(input)
    return {
        **peers,
        "eager": lambda: run(network("torch"), input),
        "float32": lambda: run(network("fused"), input),
        "onnxruntime float32": lambda: float32.run(None, feed),
        "onnxruntime int8": lambda: int8.run(None, feed),
        "int8": lambda: own(input),
    }


def rounding(bits: int) -> dict[str, Callable[[], object]]:
    """Returns the ways to round the weights of the CNN to a few bits."""
    weights = [p.detach() for p in network("torch").parameters() if p.dim() > 1]
    outputs = [torch.empty_like(weight) for weight in weights]
    return {
        "eager": lambda: fake_quantize_weights_reference(weights, outputs, bits),
        "kernel": lambda: fake_quantize_weights(weights, outputs, bits),
        "copy": lambda: torch._foreach_copy_(outputs, weights),
    }


def main() -> None:
    cases = {f"CNN, batch {batch}": lambda batch=batch: predictions(batch) for batch in BATCHES}
    cases |= {f"weights, {bits} bits": lambda bits=bits: rounding(bits) for bits in (8, 4, 3, 2)}
    layers.run("int8_chain", __doc__.splitlines()[0], cases, seconds=10.0)


if __name__ == "__main__":
    main()
