"""Tables of compressed models."""

from __future__ import annotations

from markdown_tables import fixed, layout, table
from recorded import Row, index, latest


@table("compression")
def compression() -> list[str]:
    """Returns the table of compressed models of 5,000 digits beside the dense one."""
    return _compression("mnist_5k", "compression")


@table("compression-fashion")
def compression_of_fashion() -> list[str]:
    """Returns the table of compressed models of Fashion-MNIST beside the dense one."""
    return _compression("fashion_mnist", "compression")


def _compression(data: str, name: str) -> list[str]:
    """Returns a table of compressed models: means over the seeds, and ranges of the ratios."""
    rows = [row for row in latest(name, "data", "variant", "model", "seed") if row["data"] == data]
    found = index(rows, "variant", "model", "seed")
    seeds = list(dict.fromkeys(row["seed"] for row in rows))
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    # The dense model is trained on beside one variant alone.
    compared = next(row["variant"] for row in rows if row["model"] == "dense, trained on")
    kinds = [(compared, "dense"), (compared, "dense, trained on"), *((v, "compressed") for v in variants)]
    body, used = [], []
    for variant, model in kinds:
        own = [found[(variant, model, seed)] for seed in seeds]
        dense = [found[(variant, "dense", seed)] for seed in seeds]
        used += [*own, *dense]

        def mean(column: str, own: list[Row] = own) -> float:
            return sum(float(row[column]) for row in own) / len(own)

        def times(column: str, own: list[Row] = own, dense: list[Row] = dense) -> str:
            ratios = [float(d[column]) / float(o[column]) for d, o in zip(dense, own, strict=True)]
            return f"{min(ratios):.1f} to {max(ratios):.1f}"

        left = mean("multiply_adds") / mean("multiply_adds", dense)
        cells = [f"{mean('accuracy'):.4f}", f"{left:.1%}", f"{mean('bytes_zipped') / 1000:.0f} kB"]
        ratios = ["1"] * 3 if model == "dense" else [times(c) for c in ("bytes_zipped", "ms_1", "ms_32")]
        body.append((model if model != "compressed" else variant, *cells, *ratios))
    header = ("model", "accuracy", "multiply-adds left", "zipped weights", "times smaller", "times as fast, batch 1")
    lines = layout((*header, "times as fast, batch 32"), body, name, used)
    return [*lines[:-1], f"{lines[-1]} {used[0]['epochs']} epochs, {len(seeds)} seeds."]


@table("quantized-step")
def quantized_step() -> list[str]:
    """Returns the table of a training step with rounded weights beside one in float."""
    rows = latest("quantized_step", "what")
    names = {"float": "float", "torch.ao": "`torch.ao`'s fake quantization, 8 bits"}
    body = [
        (names.get(row["what"], f"`Quantize`, {row['what']}"), fixed(row["ms"], 2), fixed(row["times_float"], 2))
        for row in rows
    ]
    return layout(("step of the documented CNN, batch 32", "ms", "times float"), body, "quantized_step", rows)


@table("masked-step")
def masked_step() -> list[str]:
    """Returns the table of a step of Adam with masks beside one without."""
    rows = latest("masked_step", "parameters", "what")
    names = {
        "no masks": "without masks",
        "set_masks": "`set_masks`",
        "product": "a product with the masks after the step",
        "torch's pruning": "`torch.nn.utils.prune`: product, its gradient and the step",
    }
    body = [(row["parameters"], names[row["what"]], fixed(row["ms"], 2), fixed(row["times"], 2)) for row in rows]
    return layout(("parameters", "step of Adam", "ms", "times a step without masks"), body, "masked_step", rows)


@table("quantized-labels")
def quantized_labels() -> list[str]:
    """Returns the table of the labels of other runtimes that differ from the validated ones."""
    rows = latest("quantized_labels", "data", "bits", "runtime")
    names = {
        "lightkit": "the rounded layers in float",
        "onnxruntime": "ONNX Runtime",
        "openvino": "OpenVINO",
        "executorch": "ExecuTorch",
    }
    body = [
        (row["data"], row["bits"], names[row["runtime"]], f"{row['differing']} of {int(row['samples']):,}")
        for row in rows
    ]
    return layout(
        ("data", "bits", "runtime", "labels that differ from the validated ones"), body, "quantized_labels", rows
    )
