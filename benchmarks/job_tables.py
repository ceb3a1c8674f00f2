"""Tables of whole jobs, strategies, servers and campaigns, and the ratios of the README."""

from __future__ import annotations

from markdown_tables import figures, fixed, layout, line, ratio, table
from recorded import Row, describe_machine, every, index, latest

# The folder of all tests, in the rows of versions.
_ALL = "tests"

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


@table("headline")
def headline() -> list[str]:
    """Returns the table of the three ratios of the README."""
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
            ratio(*on_cpu),
            describe_machine(on_cpu),
        ),
        (
            "[cross-entropy](docs/measurements.md#cross-entropy-on-a-gpu) of 8192 x 32000 logits, bfloat16",
            "Liger",
            ratio(*on_gpu),
            describe_machine(on_gpu),
        ),
    ]
    return [line(["what", "peer", "times as fast", "machine"]), line(["---"] * 4), *(line(cells) for cells in body)]


@table("own-code")
def own_code() -> list[str]:
    """Returns the table of programs as people write them: the milliseconds of a stock step, and the ratios to it."""
    rows = latest("own_code", "program", "what")
    found = index(rows, "program", "what")
    ways = ("lean loop", "both callbacks", "torch.compile", "JAX")
    body = []
    for program in dict.fromkeys(row["program"] for row in rows):
        stock, both = found[(program, "stock")], found[(program, "both callbacks")]
        ratios = [found[(program, way)]["times_stock"] if (program, way) in found else "-" for way in ways]
        body.append((f"`{program}`", stock["batch"], figures(stock["milliseconds"]), *ratios, both["share_of_matmul"]))
    header = [
        *("program", "batch", "stock step, ms", "`LeanLoop`", "`LeanLoop`, `FuseKernels`"),
        *("`torch.compile`", "JAX", "share of a matrix product's rate"),
    ]
    return layout(header, body, "own_code", rows)


@table("cnn-job")
def cnn_job() -> list[str]:
    """Returns the table of an epoch of the documented job, by contender and batch size."""
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
    """Returns the table of programs from their start to their end."""
    rows = latest("whole_process", "program")
    # Only what trains the same network is a peer.
    body = []
    for row in rows:
        is_peer = row["note"].startswith("the documented CNN") and row["program"] != "lightkit"
        share = row["first_over_this"] if is_peer else "-"
        spread = f"{fixed(row['seconds'], 2)} ({fixed(row['least'], 2)} to {fixed(row['most'], 2)})"
        body.append((row["program"], f"`{row['command'].replace('|', chr(92) + '|')}`", spread, share, row["n"]))
    return layout(["", "command", "seconds", "lightkit takes, of it", "n"], body, "whole_process", rows)


@table("beside-keras")
def beside_keras() -> list[str]:
    """Returns the table of the three ways of a reader of Keras: statements, seconds of the process and accuracy."""
    rows = latest("beside_keras", "way", "what")
    ways = {
        "arrays": "arrays: `model.fit`, `lightkit.fit`",
        "command line": "command line: the program for arrays, `+experiment=cnn`",
        "folder": "2,000 PNG files: `image_dataset_from_directory`, `lightkit.fit(model, folder)`",
    }
    keras = {way: next((row for row in rows if (row["way"], row["what"]) == (way, "Keras")), None) for way in ways}
    body = []
    for way, name in ways.items():
        # The command line has no counterpart in Keras except the program for arrays.
        peer = keras[way] or keras["arrays"]
        assert peer is not None
        for row in [peer, *(row for row in rows if row["way"] == way and row["what"] != "Keras")]:
            spread = f"{fixed(row['seconds'], 1)} ({fixed(row['least'], 1)} to {fixed(row['most'], 1)})"
            share = "1" if row is peer else fixed(str(float(row["seconds"]) / float(peer["seconds"])), 2)
            count = "one command" if row["statements"] == "0" else row["statements"]
            used = fixed(row["processor_seconds"], 1)
            body.append((name, row["what"], count, spread, share, used, fixed(row["accuracy"], 3), row["n"]))
            name = ""
    header = ["", "", "statements", "seconds", "times Keras", "processor seconds", "accuracy", "n"]
    lines = layout(header, body, "beside_keras", rows)
    return [*lines[:-1], f"{lines[-1][:-1]}; {rows[-1]['note']}."]


@table("augmentation")
def augmentation() -> list[str]:
    """Returns the table of the cost of the random changes of training images."""
    rows = latest("augmentation", "images", "transform")
    found = index(rows, "images", "transform")
    body = []
    for row in rows:
        plain = found[(row["images"], "none")]
        rate = float(row["trained_per_second"]) / float(plain["trained_per_second"])
        cells = [fixed(row[key], 0) for key in ("converted_per_second", "trained_per_second")]
        share = "-" if row["transform"] == "none" else f"{100 * float(row['share_of_step']):.1f} %"
        body.append((row["images"], f"`{row['transform']}`", *cells, fixed(str(rate), 2), share))
    header = ["images", "transform", "converted a second", "trained a second", "of the rate without", "share of a step"]
    return layout(header, body, "augmentation", rows)


@table("crowded")
def crowded() -> list[str]:
    """Returns the table of images a second beside processes that never rest."""
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


@table("sweep-start")
def sweep_start() -> list[str]:
    """Returns the table of the time before a job of a sweep begins to train."""
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
    """Returns the table of experiments on sequences next to plain loops."""
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


@table("generation")
def generation() -> list[str]:
    """Returns the table of the rates of text generation, and what int8 costs."""
    rows = latest("generation", "model", "what", "threads")
    found = index(rows, "model", "what", "threads")
    body = []
    for row in rows:
        peer = found[(row["model"], "torch", row["threads"])]
        cost = float(row["bits_per_byte"]) - float(peer["bits_per_byte"])
        model = f"`{row['model']}`, {int(row['parameters']) / 1e6:.2f} M weights"
        rates = (fixed(row["tokens_per_second"], 0), fixed(row["times_torch"], 1))
        body.append((model, row["what"], *rates, fixed(row["bits_per_byte"], 4), f"{cost:+.4f}"))
    loads = sorted({row["load"] for row in rows}, key=float)
    header = ["model", "generated by", "tokens a second", "times torch", "bits per byte", "more than torch"]
    lines = layout(header, body, "generation", rows)
    lines[-1] += f" Other processes shared the cores: the load average before was {' and '.join(loads)}."
    return lines


@table("forecasts")
def forecasts() -> list[str]:
    """Returns the table of the errors of the forecast experiment next to the simplest rules."""
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


@table("strategies")
def strategies() -> list[str]:
    """Returns the table of rates, traffic and accuracy of each strategy on two processes."""
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
    """Returns the table of pushes a second, next to an all_reduce among as many processes."""
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
    """Returns the table of what is lost in each fault, and when the work goes on."""
    rows = latest("faults", "fault")
    body = [
        (row["fault"], row["lost"] or "-", row["twice"], fixed(row["median_s"], 2), fixed(row["max_s"], 2), row["n"])
        for row in rows
    ]
    header = ["fault", "lost", "counted twice", "seconds, median", "seconds, longest", "n"]
    return layout(header, body, "faults", rows)


@table("campaigns")
def campaigns() -> list[str]:
    """Returns the table of the long tests: random calls, killed jobs, hostile peers."""
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


@table("versions")
def versions() -> list[str]:
    """Returns the table of the fast tests with other versions of Python and torch."""
    found: dict[tuple[str, str], dict[str, Row]] = {}
    for row in every("versions"):
        environment = found.setdefault((row["python"], row["torch"]), {})
        # A row of all tests stands for the rows of parts before it.
        if row["tests"] == _ALL:
            environment.clear()
        environment[row["tests"]] = row
    rows = [row for environment in found.values() for row in environment.values()]
    rows.sort(key=lambda row: [int(part) for part in row["python"].split(".")])
    columns = ("python", "torch", "lightning", "numpy", "passed", "failed", "skipped", "note")
    header = ["Python", "torch", "Lightning", "NumPy", "passed", "failed", "skipped", "note", "tests"]
    body = [[*(row[column] for column in columns), _extent(row["tests"])] for row in rows]
    return [line(header), line(["---"] * len(header)), *map(line, body), "", "Rows: `benchmarks/results/versions.csv`."]


def _extent(tests: str) -> str:
    return "all fast ones" if tests == _ALL else f"{len(tests.split())} folders and files"


def _sum(rows: list[Row], column: str) -> int:
    return sum(int(row[column]) for row in rows)
