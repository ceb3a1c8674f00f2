"""``python -m lightkit.parameter_server --host HOST --port PORT``: runs one server until its workers have left."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import threading

import torch

from lightkit.errors import LightkitError
from lightkit.parameter_server.rendezvous import SECRET_VARIABLE
from lightkit.parameter_server.server import Server


def main() -> int:
    """Runs a server; returns 0 after the end of the training, 1 after an error and 2 without a secret."""
    parser = argparse.ArgumentParser(
        prog="python -m lightkit.parameter_server",
        description=f"Runs a parameter server for one training. Workers need the same {SECRET_VARIABLE} in their "
        "environment. Both sides prove that they know the secret, and sign all that they send, except the elements of "
        "tensors. Nothing is encrypted: use a trusted network or a tunnel.",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address that workers reach (default: this machine alone)")
    parser.add_argument("--port", type=int, default=29600, help="0 for any free port (default: 29600)")
    parser.add_argument("--directory", help="directory of the snapshots and the log; the server recovers from it")
    parser.add_argument("--timeout", type=float, default=30.0, help="seconds without a heartbeat of a worker (30)")
    parser.add_argument("--threads", type=int, default=1, help="threads of the optimizer step (default: 1)")
    parser.add_argument(
        "--recover-until-damage",
        action="store_true",
        help="recover from a damaged log: use the updates before the damage, and keep the rest of the log in "
        "--directory as damaged-log-*.bin (default: an error that changes nothing)",
    )
    parser.add_argument("--leave-with-parent", action="store_true", help="end when standard input is closed")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="parameter server: %(message)s")
    secret = os.environ.get(SECRET_VARIABLE, "")
    if not secret:
        print(
            f"error: {SECRET_VARIABLE} is not set: choose a secret, and give it to servers and workers", file=sys.stderr
        )
        return 2
    if options.threads < 1:
        parser.error(f"--threads must be at least 1, got {options.threads}")
    torch.set_num_threads(options.threads)
    if options.leave_with_parent:
        threading.Thread(target=_leave_with_parent, daemon=True).start()
    try:
        server = Server(
            options.host, options.port, secret, options.directory, options.timeout, options.recover_until_damage
        )
        print(f"listening on {server.listener.host}:{server.listener.port}", flush=True)
        server.run()
    except (LightkitError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _leave_with_parent() -> None:
    # os.read bypasses the buffer of sys.stdin, whose lock this thread would hold at the end of the interpreter.
    while os.read(0, 4096):
        pass
    os._exit(0)


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads may still wait for connections, and an orderly exit would wait for the threads.
    os._exit(status)
