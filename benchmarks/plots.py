"""Draws the pictures of README.md and docs/ from the rows in results/.

    python benchmarks/plots.py

Each picture shows the rows of the last day and device of its file, for CPUs or for GPUs.
"""

from __future__ import annotations

from matplotlib.figure import Figure
from recorded import RESULTS, latest

GREY, BLUE, ORANGE, GREEN = "#94a3b8", "#2563eb", "#ea580c", "#15803d"

CONTENDERS = {
    "keras": "Keras, the documented listing",
    "lightning": "stock Lightning",
    "loop": "plain PyTorch loop",
    "tuned_loop": "plain loop, channels-last, fused Adam",
    "lightning_one_line": "stock Lightning + LeanLoop, FuseKernels",
    "lightkit": "lightkit",
}


def save(figure: Figure, name: str) -> None:
    figure.savefig(RESULTS / f"{name}.png", dpi=120, facecolor="white")


def tidy(axis) -> None:
    axis.spines[["top", "right"]].set_visible(False)


def cnn_job() -> None:
    """Draws microseconds an image of the documented job, a bar for each contender."""
    rows: dict[str, float] = {}
    for row in latest("cnn_job"):
        if row["batch"] == "32":
            # A later row of a contender replaces an earlier one.
            rows[row["what"]] = float(row["microseconds_per_image"])
    names = [name for name in CONTENDERS if name in rows]
    figure = Figure(figsize=(8, 0.42 * len(names) + 0.9), layout="constrained")
    axis = figure.subplots()
    values = [rows[name] for name in names]
    colors = [BLUE if name.startswith("lightkit") else ORANGE if "one_line" in name else GREY for name in names]
    bars = axis.barh([CONTENDERS[name] for name in names], values, color=colors)
    axis.bar_label(bars, labels=[f"{value:.0f}" for value in values], padding=4)
    axis.invert_yaxis()
    axis.set_xlabel("microseconds an image, training (less is better)")
    tidy(axis)
    save(figure, "cnn_job")


def cross_entropy(on_gpu: bool) -> None:
    """Draws the fraction of the speed of a copy of the logits against the number of classes."""
    rows = [row for row in latest("cross_entropy", on_gpu=on_gpu) if row["pass"] == "forward and backward"]
    # Each number of classes was measured with several numbers of rows: the largest is drawn.
    most = {row["classes"]: max(int(r["rows"]) for r in rows if r["classes"] == row["classes"]) for row in rows}
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    lines = {"eager": GREY, "compiled": GREEN, "Liger": GREEN, "lightkit": BLUE, "lightkit in place": ORANGE}
    for axis, dtype in zip(figure.subplots(1, 2, sharey=True), ("float32", "bfloat16"), strict=True):
        for what, color in lines.items():
            points = sorted(
                (int(row["classes"]), float(row["fraction_of_floor"]))
                for row in rows
                if (row["what"], row["dtype"]) == (what, dtype) and int(row["rows"]) == most[row["classes"]]
            )
            if points:
                axis.plot(*zip(*points, strict=True), color=color, marker="o", markersize=4, label=what)
        axis.set(xscale="log", xlabel="classes", title=dtype, ylim=(0, None))
        tidy(axis)
    figure.axes[0].set_ylabel("fraction of the speed of a copy")
    figure.axes[0].legend(frameon=False)
    save(figure, "cross_entropy_gpu" if on_gpu else "cross_entropy")


if __name__ == "__main__":
    cnn_job()
    cross_entropy(on_gpu=False)
    cross_entropy(on_gpu=True)
