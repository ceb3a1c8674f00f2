"""Tables of single kernels, optimizers and steps."""

from __future__ import annotations

from markdown_tables import figures, fixed, layout, ratio, table
from recorded import index, latest


@table("conv-relu-pool")
def conv_relu_pool() -> list[str]:
    """Returns the table of layers of a convolution, microseconds an image at batch 128."""
    key = ("job", "dtype", "batch", "what")
    found = index(latest("conv_relu_pool", *key), *key)
    names = ("eager", "eager channels-last", "kernel", "lightkit")
    layers = dict.fromkeys(job for job, dtype, batch, what in found if batch == "128" and what == "kernel")
    body, used = [], []
    for layer in layers:
        if not all((layer, dtype, "128", what) in found for dtype in ("float32", "bfloat16") for what in names):
            continue
        rows = [found[(layer, dtype, "128", what)] for dtype in ("float32", "bfloat16") for what in names]
        used += rows
        body.append((layer, *(figures(row["microseconds_per_image"]) for row in rows)))
    columns = ["torch", "channels-last", "kernel", "lightkit"]
    header = ["layer, 3x3", *(f"float32: {name}" for name in columns), *(f"bfloat16: {name}" for name in columns)]
    return layout(header, body, "conv_relu_pool", used)


@table("convolution")
def conv2d() -> list[str]:
    """Returns the table of single convolutions, milliseconds of forward and backward."""
    key = ("job", "dtype", "batch", "what")
    rows = latest("conv2d", *key)
    found = index(rows, *key)
    body = []
    for job, dtype, batch in dict.fromkeys(tuple(row[k] for k in key[:3]) for row in rows):
        way = {what: found[(job, dtype, batch, what)] for what in ("eager", "eager channels-last", "kernel")}
        times = [figures(row["milliseconds"]) for row in way.values()]
        kernel = way["kernel"]
        body.append((job, dtype, batch, *times, kernel["times_faster_eager"], kernel["share_of_matmul"]))
    header = [
        *("layer", "dtype", "batch", "torch", "channels-last", "kernel"),
        *("times the faster of torch's", "share of a matrix product's rate"),
    ]
    return layout(header, body, "conv2d", rows)


@table("linear-cross-entropy")
def linear_cross_entropy() -> list[str]:
    """Returns the table of a head and its loss, with the memory that each way takes."""
    rows = latest("linear_cross_entropy", "size", "dtype", "what")
    found = index(rows, "size", "dtype", "what")
    names = {
        "eager": "torch",
        "compiled": "compiled",
        "torch, chunked": "torch's own in chunks",
        "loop by hand": "loop over chunks",
        "lightkit": "lightkit, `memory_limit` 64 MiB",
        "lightkit, room for all": "lightkit, room for all",
    }
    body = []
    for size, dtype in dict.fromkeys((row["size"], row["dtype"]) for row in rows):
        cells = [size.replace("x", " x "), dtype]
        for what in names:
            row = found[(size, dtype, what)]
            against = f" ({row['times_compiled']})" if "lightkit" in what else ""
            cells.append(f"{fixed(row['milliseconds'], 0)}{against}, {fixed(row['extra_mib'], 0)} MiB")
        body.append(cells)
    return layout(["rows x features x classes", "dtype", *names.values()], body, "linear_cross_entropy", rows)


_MEAN = ", mean"


@table("norm-act")
def norm_act() -> list[str]:
    """Returns the table of normalizations: how many times as fast the kernel is, and how many copies long."""
    rows = [row for row in latest("norm_act", "layer", "what") if not row["layer"].endswith(_MEAN)]
    found = index(rows, "layer", "what")
    body = []
    for layer in dict.fromkeys(row["layer"] for row in rows):
        eager, last, kernel, given, copy = (
            float(found[(layer, what)]["microseconds"])
            for what in ("eager", "eager channels-last", "kernel", "kernel, statistics", "copy")
        )
        ratios = (eager / kernel, last / kernel, last / given, kernel / copy)
        body.append((layer, *(f"{value:.1f}" for value in ratios)))
    header = ["input, what follows", "against torch", "against channels-last", "with statistics", "copies of the input"]
    return layout(header, body, "norm_act", rows)


@table("norm-act-mean")
def norm_act_mean() -> list[str]:
    """Returns the table of normalizations that end with a mean: how many times as fast the kernel is."""
    rows = [row for row in latest("norm_act", "layer", "what") if row["layer"].endswith(_MEAN)]
    found = index(rows, "layer", "what")
    peers = ("eager", "eager channels-last", "mean by torch")
    body = []
    for layer in dict.fromkeys(row["layer"] for row in rows):
        kernel = float(found[(layer, "kernel")]["microseconds"])
        ratios = (float(found[(layer, peer)]["microseconds"]) / kernel for peer in peers)
        body.append((layer, *(f"{value:.1f}" for value in ratios)))
    header = ["input, what follows", "against torch", "against channels-last", "against the kernel and torch's mean"]
    return layout(header, body, "norm_act", rows)


@table("dropout")
def dropout() -> list[str]:
    """Returns the table of dropout, in ratios: how many times as fast it is, and how many pairs of copies long."""
    rows = latest("dropout", "shape", "dtype", "what")
    found = index(rows, "shape", "dtype", "what")
    body = []
    for shape, dtype in dict.fromkeys((row["shape"], row["dtype"]) for row in rows):
        eager, own, copy = (
            float(found[(shape, dtype, what)]["microseconds"]) for what in ("eager", "lightkit", "copy")
        )
        body.append((shape.replace("x", " x "), dtype, f"{eager / own:.1f}", f"{own / copy:.1f}"))
    return layout(["input", "dtype", "against torch", "copies, forward and backward"], body, "dropout", rows)


@table("integer-chain")
def int8_chain() -> list[str]:
    """Returns the table of the CNN on 8-bit integers, microseconds a batch."""
    rows = [row for row in latest("int8_chain", "device", "layer", "what") if "batch" in row["layer"]]
    found = index(rows, "device", "layer", "what")
    ways = ("eager", "onnxruntime float32", "float32", "onnxruntime int8", "xnnpack int8", "int8")
    body = []
    for device, layer in dict.fromkeys((row["device"], row["layer"]) for row in rows):
        times = [row["microseconds"] if (row := found.get((device, layer, what))) else "" for what in ways]
        *others, own = times
        ratios = [f"{float(time) / float(own):.1f}" if time else "" for time in (others[3], others[4], others[2])]
        cells = [figures(time) if time else "" for time in times]
        body.append((device, layer.partition("batch ")[2], *cells, *ratios))
    header = [
        *("processor", "batch", "torch", "ONNX Runtime", "lightkit", "ONNX Runtime, int8", "XNNPACK, int8"),
        *("lightkit, int8", "int8: times as fast as ONNX Runtime's", "as XNNPACK's", "as lightkit's float32"),
    ]
    return layout(header, body, "int8_chain", rows)


@table("fake-quantize")
def fake_quantize() -> list[str]:
    """Returns the table of the CNN's weights rounded to a few bits, microseconds."""
    rows = [row for row in latest("int8_chain", "device", "layer", "what") if "bits" in row["layer"]]
    found = index(rows, "device", "layer", "what")
    body = [
        (
            device,
            layer.partition(", ")[2],
            *(figures(found[(device, layer, what)]["microseconds"]) for what in ("eager", "kernel", "copy")),
        )
        for device, layer in dict.fromkeys((row["device"], row["layer"]) for row in rows)
    ]
    return layout(["processor", "", "torch", "kernel", "a copy"], body, "int8_chain", rows)


@table("freed-memory")
def freed_memory() -> list[str]:
    """Returns the table of the CNN in torch's own layers, with and without `keep_freed_memory`."""
    rows = latest("freed_memory", "batch", "memory_format", "freed_memory")
    found = index(rows, "batch", "memory_format", "freed_memory")
    body = []
    for batch, layout_of_images in dict.fromkeys((row["batch"], row["memory_format"]) for row in rows):
        left, kept = (found[(batch, layout_of_images, freed)] for freed in ("left", "kept"))
        times = [fixed(row["microseconds_per_image"], 0) for row in (left, kept)]
        body.append((batch, layout_of_images, *times, fixed(kept["times_left"], 2)))
    header = ["batch", "memory format", "microseconds an image", "with `keep_freed_memory()`", "times as fast"]
    return layout(header, body, "freed_memory", rows)


@table("step-overhead")
def step_overhead() -> list[str]:
    """Returns the table of what Lightning's loop adds to a step."""
    rows = latest("step_overhead", "what")
    names = {
        "lightning": "Lightning",
        "lightning, nothing on": "Lightning, nothing on",
        "lean loop": "Lightning + `LeanLoop`",
        "lean loop, lightkit's bar": "Lightning + `LeanLoop`, lightkit's progress bar",
        "lean loop, nothing on": "Lightning + `LeanLoop`, nothing on",
    }
    found = index(rows, "what")
    body = [(text, fixed(found[(what,)]["above_the_loop"], 2)) for what, text in names.items()]
    return layout(["", "milliseconds above the loop"], body, "step_overhead", rows)


@table("cross-entropy")
def cross_entropy() -> list[str]:
    """Returns the table of forward and backward pass on a CPU, as ratios."""
    key = ("rows", "classes", "dtype", "pass", "what")
    found = index(latest("cross_entropy", *key), *key)
    body, used = [], []
    for rows, classes, dtype in dict.fromkeys(key[:3] for key in found):
        way = {what: found.get((rows, classes, dtype, "forward and backward", what)) for what in _WAYS}
        if any(row is None for row in way.values()):
            continue
        used += way.values()
        cells = [f"{rows} x {classes}", dtype]
        for own in ("lightkit", "lightkit in place"):
            cells += [ratio(way["eager"], way[own]), ratio(way["compiled"], way[own])]
            cells.append(fixed(way[own]["fraction_of_floor"], 2))
        body.append(cells)
    columns = ["against eager", "against compiled", "fraction of copy"]
    header = ["rows x classes", "dtype", *columns, *(f"in place: {name}" for name in columns)]
    return layout(header, body, "cross_entropy", used)


_WAYS = ("eager", "compiled", "lightkit", "lightkit in place")


@table("cross-entropy-gpu")
def cross_entropy_gpu() -> list[str]:
    """Returns the table of forward and backward pass on a GPU, in milliseconds."""
    key = ("rows", "classes", "dtype", "pass", "what")
    found = index(latest("cross_entropy", *key, on_gpu=True), *key)
    body, used = [], []
    for dtype in ("float32", "bfloat16"):
        for rows, classes in dict.fromkeys(key[:2] for key in found):
            ways = [
                found.get((rows, classes, dtype, "forward and backward", what))
                for what in ("eager", "Liger", "lightkit", "floor")
            ]
            if None in ways:
                continue
            used += ways
            body.append((f"{rows} x {classes}", dtype, *(fixed(row["milliseconds"], 2) for row in ways)))
    header = ["rows x classes", "dtype", "torch eager", "Liger", "lightkit", "copy"]
    return layout(header, body, "cross_entropy", used)


@table("optimizers")
def optimizers() -> list[str]:
    """Returns the table of a step of SGD on a CPU."""
    rows = latest("sgd", "case", "extras", "what")
    found = index(rows, "case", "extras", "what")
    body = []
    for case, extras in dict.fromkeys((row["case"], row["extras"]) for row in rows):
        times = [fixed(found[(case, extras, what)]["milliseconds"], 2) for what in ("foreach", "fused", "lightkit")]
        body.append((case, extras or "-", *times))
    return layout(["parameters", "extras", "torch foreach", "torch fused", "lightkit"], body, "sgd", rows)


@table("optimizers-gpu")
def optimizers_gpu() -> list[str]:
    """Returns the table of steps of SGD and Adam on a GPU."""
    key = ("case", "extras", "what")
    sgd, adam = (latest(name, *key, on_gpu=True) for name in ("sgd", "adam"))
    body = []
    for case, extras in dict.fromkeys((row["case"], row["extras"]) for row in sgd):
        times = [
            fixed(index(rows, *key)[(case, extras, what)]["milliseconds"], 2)
            for rows in (sgd, adam)
            for what in ("fused", "lightkit", "copy")
        ]
        body.append((case, extras or "-", *times))
    columns = ["torch fused", "lightkit", "copy"]
    header = ["parameters", "extras", *(f"SGD: {name}" for name in columns), *(f"Adam: {name}" for name in columns)]
    lines = layout(header, body, "sgd", [*sgd, *adam])
    return [line.replace("sgd.csv`", "sgd.csv` and `adam.csv`") for line in lines]
