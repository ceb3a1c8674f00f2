"""A script that runs a command until the command or the parent process ends.

Usage: ``supervise.py DIRECTORY COMMAND...``. The standard input of the script is a pipe from the parent process. The
pipe closes when the parent ends for any reason; the script then terminates the command, and removes DIRECTORY, in which
the command works. The script imports little, to start fast.
"""

import os
import select
import shutil
import signal
import subprocess
import sys


def main() -> int:
    """Runs the command in ``sys.argv``; returns the exit status of the command."""
    directory, *command = sys.argv[1:]
    # Notices the end of the command without polling: at SIGCHLD the interpreter writes into a pipe.
    ended, wakeup = os.pipe()
    os.set_blocking(wakeup, False)
    signal.set_wakeup_fd(wakeup)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    # A terminated ninja ends its compilers, too; a killed one does not.
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
