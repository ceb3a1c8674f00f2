"""``python -m lightkit.parameter_server --host HOST --port PORT``: one server of a job, until its workers have left."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import threading

import torch

from lightkit.errors import LightkitError
from lightkit.parameter_server.rendezvous import SECRET
from lightkit.parameter_server.server import Server


def main() -> int:
    """Runs a server; 0 when the job has come to its end."""
    parser = argparse.ArgumentParser(
        prog="python -m lightkit.parameter_server",
        description=f"A parameter server for one job. Workers must have the same {SECRET} in their environment. Both "
        "sides prove that they know it, and sign what they send, except the elements of tensors; nothing is encrypted: "
        "the network between them must be one that is trusted, or a tunnel.",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address that workers reach (default: this machine alone)")
    parser.add_argument("--port", type=int, default=29600, help="0 for any free one (default: 29600)")
    parser.add_argument("--directory", help="where its snapshots and log go, and where it comes back from")
    parser.add_argument("--timeout", type=float, default=30.0, help="seconds without a worker's sign of life")
    parser.add_argument("--threads", type=int, default=1, help="of the optimizer's step (default: 1)")
    parser.add_argument(
        "--recover-until-damage",
        action="store_true",
        help="where the log in --directory is damaged and updates follow the damage: go on from the last update before "
        "it, and keep the rest of the log there as damaged-log-*.bin (default: an error, and nothing is changed)",
    )
    parser.add_argument("--leave-with-parent", action="store_true", help="end when standard input is closed")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="parameter server: %(message)s")
    secret = os.environ.get(SECRET, "")
    if not secret:
        print(f"error: {SECRET} is not set: choose a secret, and give it to servers and workers", file=sys.stderr)
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
    # Past Python's own buffer, whose lock would be held when the interpreter ends.
    while os.read(0, 4096):
        pass
    os._exit(0)


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Connections may still be waited on in threads, which would keep an orderly end from coming.
    os._exit(status)
