"""Fuzzes all that is native: every registered op, forward, backward and twice, the step plans and the optimizers.

    python tests/fuzz/fuzz_ops.py --seed 1 --calls 20000 --sanitize

A call is made from the seed and its number alone: from the schemas that are registered, of right arguments some of
which are changed in dtype, device, layout, strides, overlap, sizes from 0 to 2^50, values, class or place, or of random
ones. It must return what its schema says, without writing into an argument that is not its to write, or raise
RuntimeError, ValueError, TypeError, IndexError or OverflowError. Calls run in a process of their own, which is started
again after a crash or a call that does not end; a line then says which call it was.

Options:
    --seed N: of the calls. Default 0.
    --calls N: how many. Default 1000.
    --first N: number of the first call. Default 0.
    --sanitize: use the library that is built with AddressSanitizer and UndefinedBehaviorSanitizer (compiled first if
        it is not in the cache); a report of theirs is a crash.
    --replay N: run the call of this number alone, in a process of its own, and show all that it says.
    --limit S: seconds that a call may take. Default 60.
    --record: append the counts to benchmarks/results/fuzz_ops.csv.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[2]

_SANITIZERS = "address,undefined"


def environment(sanitize: bool) -> dict[str, str]:
    """Returns the environment of the processes that run calls, with the sanitizers' run-time loaded if wanted."""
    path = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    variables = {**os.environ, "LIGHTKIT_NATIVE": "require", "PYTHONPATH": path}
    if not sanitize:
        return variables
    sys.path.insert(0, str(_ROOT))
    from lightkit.native import toolchain

    compiler = toolchain.require_compiler()
    names = ("libasan.so", "libubsan.so")
    said = [subprocess.check_output([*compiler, f"-print-file-name={name}"], text=True).strip() for name in names]
    variables["LIGHTKIT_NATIVE_SANITIZE"] = _SANITIZERS
    # The compilers run without the sanitizers.
    subprocess.run([sys.executable, "-m", "lightkit.build"], env=variables, check=True, stdout=subprocess.DEVNULL)
    # An allocation that cannot be is torch's to report. What Python and torch keep until the end are not our leaks.
    variables["ASAN_OPTIONS"] = "detect_leaks=0:allocator_may_return_null=1:max_allocation_size_mb=8192"
    variables["UBSAN_OPTIONS"] = "print_stacktrace=1"
    variables["LD_PRELOAD"] = ":".join(str(Path(path).resolve()) for path in said)
    return variables


def work(seed: int, first: int, last: int) -> None:
    """Runs calls in this process and says on standard output, a line each, what became of them."""
    from fuzz_calls import Failure, run

    for number in range(first, last):
        print(json.dumps({"began": number}), flush=True)
        try:
            outcome = run(seed, number)
        except Failure as failure:
            print(json.dumps({"failed": number, "why": str(failure)}), flush=True)
        except Exception as error:
            print(json.dumps({"failed": number, "why": f"{type(error).__name__}: {error}"}), flush=True)
        else:
            print(json.dumps({"ended": number, "name": outcome.name, "refusal": outcome.refusal}), flush=True)


class _Worker:
    """A process that runs calls, what it says of each, and what it says besides."""

    def __init__(self, seed: int, first: int, calls: int, variables: dict[str, str]) -> None:
        command = [sys.executable, __file__, "--worker", f"--seed={seed}", f"--first={first}", f"--calls={calls}"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, env=variables, text=True, errors="replace", **pipes)
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._said: list[str] = []
        self._readers = [threading.Thread(target=reader) for reader in (self._read_lines, self._read_errors)]
        for reader in self._readers:
            reader.start()

    def _read_lines(self) -> None:
        for line in self.process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def _read_errors(self) -> None:
        for line in self.process.stderr:
            self._said.append(line)

    def events(self, limit: float) -> Iterator[dict[str, Any]]:
        """Returns what became of the calls, until the process ends or a call takes longer than `limit` seconds."""
        # The first one also imports torch.
        patience = limit + 300
        try:
            while (line := self._lines.get(timeout=patience)) is not None:
                patience = limit
                yield json.loads(line)
        except queue.Empty:
            self._said.append(f"the call did not end within {limit} s\n")
            self.process.kill()

    def end(self) -> str:
        """Returns the lines on standard error that tell why the process ended."""
        self.process.wait()
        for reader in self._readers:
            reader.join()
        first = next((i for i, line in enumerate(self._said) if "ERROR" in line or "runtime error" in line), 0)
        return "".join(line[:300] for line in self._said[first : first + 30])


def supervise(seed: int, first: int, calls: int, variables: dict[str, str], limit: float) -> Counter[str]:
    """Runs calls in processes, and counts results, refusals by class, failures and crashes."""
    counts: Counter[str] = Counter()
    number, last = first, first + calls
    while number < last:
        worker = _Worker(seed, number, last - number, variables)
        for event in worker.events(limit):
            if "failed" in event:
                counts["failures"] += 1
                print(f"seed {seed}, call {number} failed: {event['why']}", flush=True)
            elif "ended" in event:
                counts[event["refusal"] or "results"] += 1
            else:
                continue
            number += 1
        said = worker.end()
        if number < last:
            counts["crashes"] += 1
            print(f"seed {seed}, call {number} crashed ({worker.process.returncode}):\n{said}", flush=True)
            number += 1
    return counts


def record(seed: int, calls: int, sanitize: bool, counts: Counter[str]) -> None:
    """Appends a row of counts to the results."""
    sys.path[:0] = [str(_ROOT), str(_ROOT / "benchmarks")]
    import rows

    commit = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=_ROOT, text=True).strip()
    refusals = {"RuntimeError", "NotImplementedError", "ValueError", "TypeError", "IndexError", "KeyError"}
    known = {"results", "failures", "crashes", *refusals}
    row = {"commit": commit, "seed": seed, "calls": calls, "sanitizer": _SANITIZERS if sanitize else ""}
    row |= {"results": counts["results"], **{name: counts[name] for name in sorted(refusals)}}
    row |= {"other_refusals": sum(n for name, n in counts.items() if name not in known)}
    row |= {"failures": counts["failures"], "crashes": counts["crashes"]}
    rows.append("fuzz_ops", [row])


def main() -> int:
    """Runs what the command line says; returns 1 if a call crashed or failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--limit", type=float, default=60)
    parser.add_argument("--replay", type=int)
    parser.add_argument("--sanitize", action="store_true")
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.seed, options.first, options.first + options.calls)
        return 0
    if options.replay is not None:
        options.first, options.calls = options.replay, 1
    variables = environment(options.sanitize)
    counts = supervise(options.seed, options.first, options.calls, variables, options.limit)
    print(", ".join(f"{name} {count}" for name, count in sorted(counts.items())))
    if options.record:
        record(options.seed, options.calls, options.sanitize, counts)
    return int(counts["crashes"] + counts["failures"] > 0)


if __name__ == "__main__":
    sys.exit(main())
