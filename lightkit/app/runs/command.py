"""The command line of ``python -m lightkit.runs``."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from lightkit._util.atomic_write import write_text_atomically
from lightkit._util.printable import printable
from lightkit.errors import ConfigError, LightkitError
from lightkit.native.versions import add_version_option

_HELP = """Show the runs below a directory, compare them, and remove those that came to nothing.

  python -m lightkit.runs                                        all runs, the newest first
  python -m lightkit.runs --name cnn --state finished --sort test/accuracy
  python -m lightkit.runs compare TIME_1 TIME_2 --page compare.html
  python -m lightkit.runs clean --failed --empty                 shows what would go; --yes removes it
  python -m lightkit.runs clean --keep-checkpoints 3             the checkpoints of all runs but the three best
  python -m lightkit.runs sweep runs/cnn/sweep_TIME              writes sweep.html there anew
"""

_COMMANDS = ("list", "compare", "clean", "sweep")

# The words that argparse answers by itself.
_ANSWERED = ("-h", "--help", "--version")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        arguments: the words of the command line; None for those of this process.

    Returns:
        The exit status: 0, or 1 after an error, which the function prints.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or (words[0] not in _COMMANDS and words[0] not in _ANSWERED and words[0].startswith("-")):
        words.insert(0, "list")
    options = _parser().parse_args(words)
    try:
        return {"list": _list, "compare": _compare, "clean": _clean, "sweep": _sweep}[options.command](options)
    except (LightkitError, OSError) as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lightkit.runs",
        description=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_version_option(parser)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    root = argparse.ArgumentParser(add_help=False)
    root.add_argument("--root", type=Path, default=Path("runs"), metavar="DIR", help="directory of the runs (./runs)")
    chosen = argparse.ArgumentParser(add_help=False)
    chosen.add_argument("--name", metavar="NAME", help="name of the job, or a pattern such as 'cnn*'")
    chosen.add_argument("--tag", action="append", default=[], help="a tag that the run has; several must all be there")
    printed = argparse.ArgumentParser(add_help=False)
    printed.add_argument("--format", choices=("table", "json", "csv"), default="table", help="(table)")

    listed = _add(commands, "list", [root, chosen, printed], "Show runs as a table, as the command alone does.")
    listed.add_argument(
        "--state", metavar="STATES", default="", help="running, finished, failed, killed; several with commas"
    )
    listed.add_argument("--sort", metavar="METRIC", default="started", help="a metric, best first; or started, name")
    listed.add_argument("--metrics", metavar="NAMES", default="", help="the metrics to show, with commas")
    listed.add_argument("--limit", type=int, metavar="N", help="show the first N runs")

    compared = _add(commands, "compare", [root, printed], "Show what differs between runs, and their figures.")
    compared.add_argument("runs", nargs="+", metavar="RUN", help="directory of a run, or the end of its path")
    compared.add_argument("--page", type=Path, metavar="FILE", help="also write a page with the curves of the runs")

    cleaned = _add(commands, "clean", [root, chosen], "Remove runs, or checkpoints. Without --yes nothing is removed.")
    cleaned.add_argument("--failed", action="store_true", help="runs that ended in an error")
    cleaned.add_argument("--killed", action="store_true", help="ended runs, which ckpt_path=last might resume")
    cleaned.add_argument("--empty", action="store_true", help="runs that ended without a checkpoint or a result")
    cleaned.add_argument(
        "--keep-checkpoints", type=int, metavar="K", help="checkpoints of finished runs, but those of the K best"
    )
    cleaned.add_argument("--metric", help="the metric by which runs are the best (their objective)")
    cleaned.add_argument("--yes", action="store_true", help="remove, and do not only show")

    sweep = _add(commands, "sweep", [], "Write the page of a sweep anew.")
    sweep.add_argument("directory", type=Path, metavar="DIR", help="directory of the sweep")
    return parser


def _add(commands: argparse._SubParsersAction, name: str, parents: list, help: str) -> argparse.ArgumentParser:
    return commands.add_parser(name, parents=parents, help=help, description=help, allow_abbrev=False)


def _list(options: argparse.Namespace) -> int:
    from lightkit.app.runs.listing import choose_metrics, select_runs, sort_runs
    from lightkit.app.runs.table import run_rows

    runs = select_runs(_find(options.root), options.name, _words(options.state), options.tag)
    sorted_runs = sort_runs(runs, options.sort) if runs else runs
    shown = sorted_runs if options.limit is None else sorted_runs[: max(0, options.limit)]
    sorted_by = [] if options.sort in ("started", "name") else [options.sort]
    metrics = _words(options.metrics) or list(dict.fromkeys([*sorted_by, *choose_metrics(shown)]))
    _print_rows(run_rows(shown, metrics, options.root, runs), options.format)
    return 0


def _compare(options: argparse.Namespace) -> int:
    from lightkit.app.runs.comparison import compare_runs, comparison_page
    from lightkit.app.runs.listing import resolve_runs

    runs = resolve_runs(options.runs, options.root)
    # First the file: standard output may fail.
    if options.page is not None:
        write_text_atomically(options.page, comparison_page(runs, options.page))
    _print_rows(compare_runs(runs).rows(), options.format)
    return 0


def _clean(options: argparse.Namespace) -> int:
    from lightkit.app.runs.cleaning import find_removals, remove
    from lightkit.app.runs.listing import select_runs

    states = [state for state in ("failed", "killed") if getattr(options, state)]
    if not states and not options.empty and options.keep_checkpoints is None:
        raise ConfigError("say what to remove: --failed, --killed, --empty, --keep-checkpoints K")
    runs = select_runs(_find(options.root), options.name, (), options.tag)
    removals = find_removals(runs, states, options.empty, options.keep_checkpoints, options.metric)
    status = 0
    for removal in removals:
        what = "checkpoints" if removal.why.startswith("not among") else "run"
        line = f"{removal.run.directory}  {removal.size / 1e6:.1f} MB  {what}, {removal.why}"
        if options.yes:
            try:
                left = remove(removal)
            except (LightkitError, OSError) as error:
                print(f"error: {printable(str(error))}", file=sys.stderr)
                status = 1
                continue
            line += f"; kept {', '.join(left[:4])}" if left and what == "run" else ""
        print(printable(line))
    size = sum(removal.size for removal in removals) / 1e6
    done = "removed" if options.yes else "would be removed: --yes removes it"
    print(f"{len(removals)} of {len(runs)} runs, {size:.1f} MB {done}" if removals else "there is nothing to remove")
    return status


def _sweep(options: argparse.Namespace) -> int:
    from lightkit.app.runs.sweep_page import write_sweep_page

    if not options.directory.is_dir():
        raise ConfigError(f"there is no directory {options.directory}")
    print(printable(str(write_sweep_page(options.directory))))
    return 0


def _find(root: Path) -> list:
    from lightkit.app.runs.listing import find_runs

    found = find_runs(root)
    for line in found.skipped:
        print(f"skipped: {line}", file=sys.stderr)
    return found.runs


def _print_rows(rows: list[dict], form: str) -> None:
    from lightkit.app.runs.table import as_csv, as_json, as_table

    if form != "table":
        sys.stdout.write(as_json(rows) if form == "json" else as_csv(rows))
        return
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    sys.stdout.write(as_table(rows, width) if rows else "there are no such runs\n")


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]
