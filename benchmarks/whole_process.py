"""Measures whole processes from Enter to the prompt: start, work and end. The programs take turns.

    python benchmarks/whole_process.py 'lightkit=python -m lightkit.train +experiment=cnn' 'other=python script.py'

Each argument names a program and gives its command. The first program is compared with each of the others. They run in
one temporary directory, and their output is discarded.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import subprocess
import tempfile
import time

from rows import append


def seconds(command: str, directory: str) -> float:
    """Runs a command to its end, and returns its seconds."""
    started = time.perf_counter()
    subprocess.run(shlex.split(command), cwd=directory, check=True, capture_output=True)
    return time.perf_counter() - started


def main() -> None:
    """Measures, prints a table and appends the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("programs", nargs="+", metavar="NAME=COMMAND")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--note", default="", help="what is different this time, such as the state of the machine")
    options = parser.parse_args()
    commands = dict(program.split("=", 1) for program in options.programs)
    times: dict[str, list[float]] = {name: [] for name in commands}
    with tempfile.TemporaryDirectory() as directory:
        for _ in range(options.rounds):
            for name, command in commands.items():
                times[name].append(seconds(command, directory))
    own = statistics.median(next(iter(times.values())))
    rows = []
    for name, found in times.items():
        middle = statistics.median(found)
        rows.append(
            {
                "program": name,
                "command": commands[name],
                "seconds": round(middle, 2),
                "least": round(min(found), 2),
                "most": round(max(found), 2),
                "first_over_this": round(own / middle, 2),
                "n": len(found),
                "note": options.note,
            }
        )
        spread = f"{min(found):.2f} to {max(found):.2f}"
        print(f"{name:24} {middle:6.2f} s ({spread}); the first takes {own / middle:.2f} of it")
    append("whole_process", rows)


if __name__ == "__main__":
    main()
