"""``python -m lightkit`` lists the commands."""

from __future__ import annotations

import sys

_COMMANDS = {
    "train": "train, test and report: python -m lightkit.train +experiment=cnn",
    "evaluate": "measure a checkpoint on its test set",
    "predict": "classify images, forecast a series, or continue a text",
    "export": "write a checkpoint's model to a file that other programs run",
    "serve": "answer requests by HTTP with a checkpoint, in batches",
    "compress": "make a checkpoint's model smaller and faster, and compare it with the dense one",
    "runs": "show runs, compare them, and remove those that came to nothing",
    "build": "compile the native kernels ahead of time",
    "launch": "start a training on several machines, or check the network between them",
}


def main(arguments: list[str] | None = None) -> int:
    """Prints the commands, or with ``--version`` the versions.

    Args:
        arguments: the words of the command line; None for those of this process.

    Returns:
        The exit status: 0, or 1 if there are other words.
    """
    words = sys.argv[1:] if arguments is None else arguments
    if "--version" in words:
        from lightkit.native.versions import version_lines

        print(version_lines())
        return 0
    rest = [word for word in words if word not in ("-h", "--help")]
    if rest:
        known = rest[0] if rest[0] in _COMMANDS else "COMMAND"
        print(f"error: write python -m lightkit.{known}, with a dot: python -m lightkit lists them", file=sys.stderr)
        return 1
    print("The commands of lightkit; each has --help and --version:\n")
    for name, purpose in _COMMANDS.items():
        print(f"  python -m lightkit.{name:<9} {purpose}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
