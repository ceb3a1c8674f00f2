"""Runs a command until it ends or whoever started this process does.

Called as ``supervise.py DIRECTORY COMMAND...``. Its standard input is a pipe of the process that it works for. The pipe
closes when that process ends, however it does; then the command is terminated, and DIRECTORY, which it works in, is
removed. It imports little, to start soon.
"""

import os
import select
import shutil
import signal
import subprocess
import sys


def main() -> int:
    """Returns the command's exit status."""
    directory, *command = sys.argv[1:]
    # Its own death is noticed without asking again and again: the kernel writes into a pipe at SIGCHLD.
    ended, wakeup = os.pipe()
    os.set_blocking(wakeup, False)
    signal.set_wakeup_fd(wakeup)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    # Terminated, not killed: ninja then ends its compilers, too.
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: process.terminate())
    while process.poll() is None:
        if 0 in select.select([0, ended], [], [])[0] and not os.read(0, 1):
            process.terminate()
            process.wait()
            shutil.rmtree(directory, ignore_errors=True)
            break
        if select.select([ended], [], [], 0)[0]:
            os.read(ended, 4096)
    return process.wait()


if __name__ == "__main__":
    sys.exit(main())
