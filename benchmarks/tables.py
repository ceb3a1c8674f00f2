"""Writes the tables of figures in README.md and docs/ from the rows in results/.

    python benchmarks/tables.py            # writes every table between its markers
    python benchmarks/tables.py --check    # exit status 1 if a file has a table that is not current

A page has the markers ``<!-- table: NAME -->`` and ``<!-- end -->``. The lines between them are generated: the table,
and a line with its file of rows and its machine.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from recorded import Row, describe_machine, index, latest

ROOT = Path(__file__).resolve().parents[1]

_MARKED = re.compile(r"(?P<begin><!-- table: (?P<name>[a-z-]+) -->\n).*?(?P<end><!-- end -->)", re.DOTALL)

# The names of contenders in the rows, as a reader knows them.
_CONTENDERS = {
    "keras": "Keras 3 (TensorFlow), the documented listing",
    "lightning": "stock Lightning",
    "loop": "plain PyTorch loop",
    "tuned_loop": "plain loop, channels-last, fused Adam",
    "lightning_one_line": "stock Lightning + `LeanLoop`, `FuseKernels`",
    "lightkit_stock_loop": "lightkit without `LeanLoop`",
    "lightkit": "lightkit",
}

Table = Callable[[], list[str]]
TABLES: dict[str, Table] = {}


def table(name: str) -> Callable[[Table], Table]:
    """Registers a function as the writer of a table."""

    def register(function: Table) -> Table:
        TABLES[name] = function
        return function

    return register


def layout(header: Sequence[str], body: Sequence[Sequence[object]], source: str, rows: list[Row]) -> list[str]:
    """Returns the lines of a Markdown table, and below it where the figures come from."""
    lines = [_line(header), _line(["---"] * len(header)), *(_line(cells) for cells in body)]
    return [*lines, "", f"Rows: `benchmarks/results/{source}.csv`. {describe_machine(rows)}."]


def _line(cells: Sequence[object]) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def fixed(value: str, digits: int) -> str:
    """Returns a recorded number rounded, with commas between thousands; a missing one is a dash."""
    return f"{float(value):,.{digits}f}" if value else "-"


def figures(value: str) -> str:
    """Returns a recorded number with three figures, at least: 9.6, 31.7, 123, 1,448."""
    number = float(value)
    return f"{number:,.{0 if number >= 100 else 1 if number >= 10 else 2}f}"


@table("headline")
def headline() -> list[str]:
    """The three ratios of the README."""
    job = index(latest("cnn_job", "batch", "what"), "batch", "what")[("32", "lightkit")]
    key = ("rows", "classes", "dtype", "pass", "what")
    cpu = index(latest("cross_entropy", *key), *key)
    gpu = index(latest("cross_entropy", *key, on_gpu=True), *key)
    both = "forward and backward"
    on_cpu = [cpu[("1024", "32000", "float32", both, what)] for what in ("compiled", "lightkit in place")]
    on_gpu = [gpu[("8192", "32000", "bfloat16", both, what)] for what in ("Liger", "lightkit")]
    body = [
        (
            "[training the documented CNN](docs/measurements.md#the-documented-job), batch 32",
            "stock Lightning",
            fixed(job["times_lightning"], 1),
            describe_machine([job]),
        ),
        (
            "[cross-entropy](docs/measurements.md#cross-entropy) of 1024 x 32000 logits, float32, in place",
            "`torch.compile`",
            _ratio(*on_cpu),
            describe_machine(on_cpu),
        ),
        (
            "[cross-entropy](docs/measurements.md#cross-entropy-on-a-gpu) of 8192 x 32000 logits, bfloat16",
            "Liger",
            _ratio(*on_gpu),
            describe_machine(on_gpu),
        ),
    ]
    return [_line(["what", "peer", "times as fast", "machine"]), _line(["---"] * 4), *(_line(cells) for cells in body)]


def _ratio(peer: Row, own: Row) -> str:
    return f"{float(peer['milliseconds']) / float(own['milliseconds']):.1f}"


@table("cnn-job")
def cnn_job() -> list[str]:
    """An epoch of the documented job, by contender and batch size."""
    rows = [row for row in latest("cnn_job", "batch", "what") if row["what"] in _CONTENDERS]
    found = index(rows, "batch", "what")
    body = []
    for batch in ("32", "128"):
        for what, name in _CONTENDERS.items():
            row = found[(batch, what)]
            ratios = [fixed(row[f"times_{peer}"], 1) for peer in ("keras", "lightning", "loop")]
            body.append((batch, name, fixed(row["microseconds_per_image"], 0), *ratios, fixed(row["accuracy"], 3)))
    header = [
        "batch",
        "",
        "microseconds an image",
        "times Keras",
        "times stock Lightning",
        "times the loop",
        "accuracy",
    ]
    return layout(header, body, "cnn_job", rows)


@table("whole-process")
def whole_process() -> list[str]:
    """Programs from their start to their end."""
    rows = latest("whole_process", "program")
    # Only what trains the same network is a peer.
    body = []
    for row in rows:
        is_peer = row["note"].startswith("the documented CNN") and row["program"] != "lightkit"
        share = row["first_over_this"] if is_peer else "-"
        spread = f"{fixed(row['seconds'], 2)} ({fixed(row['least'], 2)} to {fixed(row['most'], 2)})"
        body.append((row["program"], f"`{row['command'].replace('|', chr(92) + '|')}`", spread, share, row["n"]))
    return layout(["", "command", "seconds", "lightkit takes, of it", "n"], body, "whole_process", rows)


@table("crowded")
def crowded() -> list[str]:
    """Images a second beside processes that never rest."""
    rows = latest("crowded", "contender", "neighbours")
    found = index(rows, "contender", "neighbours")
    body = []
    for count in dict.fromkeys(row["neighbours"] for row in rows):
        own, peer = found[("lightkit", count)], found[("torch", count)]
        cells = [count]
        for row in (own, peer):
            cells += [fixed(row["images_per_second"], 0), fixed(row["times_slower"], 1), row["n"]]
        body.append([*cells, fixed(own["fair"], 1)])
    header = ["neighbours", "lightkit", "times slower", "n", "plain torch loop", "times slower", "n", "fair share"]
    return layout(header, body, "crowded", rows)


@table("conv-relu-pool")
def conv_relu_pool() -> list[str]:
    """Layers of a convolution, microseconds an image at batch 128."""
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


@table("sweep-start")
def sweep_start() -> list[str]:
    """The time before a job of a sweep begins to train."""
    rows = latest("sweep_start", "what")
    names = {
        "fresh process": "a new process",
        "basic launcher": "the next job of a sweep, Hydra's basic launcher",
        "forked": "a job of `hydra/launcher=fork`",
    }
    body = [
        (
            names[row["what"]],
            fixed(row["cpu_seconds"], 3),
            fixed(row["share_of_fresh_cpu_seconds"], 3),
            fixed(row["seconds"], 3),
            fixed(row["share_of_fresh_seconds"], 3),
            fixed(row["own_mib"], 0),
        )
        for row in rows
    ]
    header = ["", "seconds of processor time", "share", "seconds", "share", "MiB of its own"]
    return layout(header, body, "sweep_start", rows)


@table("sequence-jobs")
def sequence_jobs() -> list[str]:
    """Experiments on sequences next to plain loops."""
    rows = latest("sequence_jobs", "job", "what")
    found = index(rows, "job", "what")
    body = []
    for job in dict.fromkeys(row["job"] for row in rows):
        own, plain = found[(job, "lightkit")], found[(job, "plain loop")]
        metric, unit = own["metric"].replace("_", " "), own["unit"].replace("_per_", " a ")
        rates = [fixed(row["rate"], 0) for row in (own, plain)]
        body.append((f"`{job}`", metric, fixed(own["test"], 3), fixed(plain["test"], 3), unit, *rates))
    header = ["experiment", "metric of the test", "lightkit", "plain loop", "rate", "lightkit", "plain loop"]
    return layout(header, body, "sequence_jobs", rows)


@table("forecasts")
def forecasts() -> list[str]:
    """Errors of the forecast experiment next to the simplest rules."""
    rows = latest("forecasts", "data", "seed")
    body = []
    for data in dict.fromkeys(row["data"] for row in rows):
        runs = [row for row in rows if row["data"] == data]
        cells: list[str] = [f"`{data}`", runs[0]["horizon"]]
        for name in ("mae", "rmse"):
            cells.append(", ".join(figures(run[name]) for run in runs))
            cells += [figures(runs[0][f"{name}_last"]), figures(runs[0][f"{name}_season"])]
        body.append([*cells, ", ".join(fixed(run["coverage"], 2) for run in runs)])
    rules = ["last value", "last season"]
    header = ["`data=`", "steps ahead", "MAE", *rules, "RMSE", *rules, "coverage of the 90 % intervals"]
    return layout(header, body, "forecasts", rows)


@table("linear-cross-entropy")
def linear_cross_entropy() -> list[str]:
    """A head and its loss, with the memory that each way takes."""
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
            ratio = f" ({row['times_compiled']})" if "lightkit" in what else ""
            cells.append(f"{fixed(row['milliseconds'], 0)}{ratio}, {fixed(row['extra_mib'], 0)} MiB")
        body.append(cells)
    return layout(["rows x features x classes", "dtype", *names.values()], body, "linear_cross_entropy", rows)


@table("strategies")
def strategies() -> list[str]:
    """Rates, traffic and accuracy of each strategy on two processes."""
    rows = [row for row in latest("strategies", "data", "what") if row["data"] == "mnist_5k"]
    body = [
        (
            row["what"].replace("lean loop", "`LeanLoop`"),
            fixed(row["images_per_second"], 0),
            fixed(row["times_stock"], 2),
            fixed(row["bytes_per_step"], 0),
            fixed(row["accuracy"], 3),
        )
        for row in rows
    ]
    header = ["", "images a second", "times Lightning's ddp", "bytes sent a step", "accuracy"]
    return layout(header, body, "strategies", rows)


@table("parameter-server")
def parameter_server() -> list[str]:
    """Pushes a second, next to an all_reduce among as many processes."""
    key = ("what", "numbers", "servers", "workers", "compute_ms")
    found = index(latest("parameter_server", *key), *key)
    body, used = [], []
    for numbers in dict.fromkeys(key[1] for key in found):
        cells = [fixed(numbers, 0)]
        for servers in ("1", "2"):
            rows = [found[("measured", numbers, servers, workers, "0")] for workers in ("1", "2", "4")]
            used += rows
            digits = 1 if float(rows[0]["pushes_per_second"]) < 100 else 0
            cells.append(", ".join(fixed(row["pushes_per_second"], digits) for row in rows))
            if servers == "1":
                reduced = [fixed(row["all_reduce"], digits) for row in rows if row["all_reduce"]]
        cells.append(", ".join(reduced))
        simulated = [found[("simulated", numbers, "1", "1", f"{ms}.0")]["note"] for ms in (10, 100, 1000)]
        full = [note.removeprefix("full at ").removesuffix(" workers") for note in simulated]
        body.append([*cells, ", ".join(fixed(count, 0) for count in full)])
    header = [
        "float32 numbers",
        "1 server: 1, 2, 4 workers",
        "2 servers: 1, 2, 4 workers",
        "all_reduce: 2, 4 processes",
        "workers that fill a server, if a step takes 10 ms, 100 ms, 1 s",
    ]
    return layout(header, body, "parameter_server", used)


@table("faults")
def faults() -> list[str]:
    """What is lost in each fault, and when the work goes on."""
    rows = latest("faults", "fault")
    body = [
        (row["fault"], row["lost"] or "-", row["twice"], fixed(row["median_s"], 2), fixed(row["max_s"], 2), row["n"])
        for row in rows
    ]
    header = ["fault", "lost", "counted twice", "seconds, median", "seconds, longest", "n"]
    return layout(header, body, "faults", rows)


@table("freed-memory")
def freed_memory() -> list[str]:
    """The CNN in torch's own layers, with and without `keep_freed_memory`."""
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
    """What Lightning's loop adds to a step."""
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
    """Forward and backward pass on a CPU, as ratios."""
    key = ("rows", "classes", "dtype", "pass", "what")
    found = index(latest("cross_entropy", *key), *key)
    body, used = [], []
    for rows, classes, dtype in dict.fromkeys(key[:3] for key in found):
        way = {what: found.get((rows, classes, dtype, "forward and backward", what)) for what in _CROSS_ENTROPY}
        if any(row is None for row in way.values()):
            continue
        used += way.values()
        cells = [f"{rows} x {classes}", dtype]
        for own in ("lightkit", "lightkit in place"):
            cells += [_ratio(way["eager"], way[own]), _ratio(way["compiled"], way[own])]
            cells.append(fixed(way[own]["fraction_of_floor"], 2))
        body.append(cells)
    columns = ["against eager", "against compiled", "fraction of copy"]
    header = ["rows x classes", "dtype", *columns, *(f"in place: {name}" for name in columns)]
    return layout(header, body, "cross_entropy", used)


_CROSS_ENTROPY = ("eager", "compiled", "lightkit", "lightkit in place")


@table("cross-entropy-gpu")
def cross_entropy_gpu() -> list[str]:
    """Forward and backward pass on a GPU, in milliseconds."""
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
    """A step of SGD on a CPU."""
    rows = latest("sgd", "case", "extras", "what")
    found = index(rows, "case", "extras", "what")
    body = []
    for case, extras in dict.fromkeys((row["case"], row["extras"]) for row in rows):
        times = [fixed(found[(case, extras, what)]["milliseconds"], 2) for what in ("foreach", "fused", "lightkit")]
        body.append((case, extras or "-", *times))
    return layout(["parameters", "extras", "torch foreach", "torch fused", "lightkit"], body, "sgd", rows)


@table("optimizers-gpu")
def optimizers_gpu() -> list[str]:
    """Steps of SGD and Adam on a GPU."""
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


@table("campaigns")
def campaigns() -> list[str]:
    """The long tests: random calls, killed jobs, hostile peers."""
    calls, kills = latest("fuzz_ops", "seed"), latest("kill_resume", "kill", "kind")
    peers = latest("hostile_peers", "seed")
    same = sum(row["outcome"] == "as without the kill" for row in kills)
    body = [
        (
            "`tests/fuzz/fuzz_ops.py`",
            f"{_sum(calls, 'calls'):,} random calls of the native ops under the sanitizers",
            f"{_sum(calls, 'crashes')} crashes, {_sum(calls, 'failures')} wrong results",
        ),
        (
            "`tests/campaigns/kill_resume.py`",
            f"{len(kills)} runs and sweeps killed at random moments",
            f"{same} ended as without the kill",
        ),
        (
            "`tests/campaigns/hostile_peers.py`",
            f"{_sum(peers, 'connections'):,} hostile connections beside a worker that pushes",
            f"{_sum(peers, 'pushes'):,} pushes, {_sum(peers, 'lost')} lost, {_sum(peers, 'added')} added",
        ),
    ]
    lines = layout(["campaign", "what it does", "outcome"], body, "fuzz_ops", [*calls, *kills, *peers])
    names = "fuzz_ops.csv`, `kill_resume.csv`, `hostile_peers.csv`"
    return [line.replace("fuzz_ops.csv`.", f"{names}.") for line in lines]


def _sum(rows: list[Row], column: str) -> int:
    return sum(int(row[column]) for row in rows)


def pages() -> list[Path]:
    """Returns the Markdown files that may have tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def rewrite(text: str) -> str:
    """Returns a page with each of its tables written anew.

    Raises:
        KeyError: a marker names a table that there is not.
    """

    def replace(match: re.Match[str]) -> str:
        return match["begin"] + "\n".join(TABLES[match["name"]]()) + "\n" + match["end"]

    return _MARKED.sub(replace, text)


def names_in(text: str) -> list[str]:
    """Returns the names of the tables on a page."""
    return [match["name"] for match in _MARKED.finditer(text)]


def main() -> int:
    """Writes or checks the tables, and returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a table is not current")
    options = parser.parse_args()
    status = 0
    for page in pages():
        old = page.read_text()
        new = rewrite(old)
        if new == old:
            continue
        if options.check:
            print(f"{page.relative_to(ROOT)} has tables that are not current: run python benchmarks/tables.py")
            status = 1
        else:
            page.write_text(new)
            print(f"wrote {page.relative_to(ROOT)}")
    return status


if __name__ == "__main__":
    sys.exit(main())
