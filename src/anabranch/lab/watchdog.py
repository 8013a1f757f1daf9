"""The process that takes a lab down: when its owner asks, and when its owner is gone.

`python -m anabranch.lab.watchdog LAB` reads its standard input to the end. The owner holds the other end of
that pipe: it ends when the owner closes it, exits, crashes or is killed. The watchdog is in a session of its
own and heeds no signal that a terminal or a supervisor sends to the owner.
"""

import os
import signal
import sys
from contextlib import suppress

from anabranch.errors import AnabranchError
from anabranch.lab.ownership import remove

UNHEEDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


def main() -> None:
    """Wait for the end of the pipe, then remove the lab."""
    for number in UNHEEDED:
        signal.signal(number, signal.SIG_IGN)
    with suppress(BrokenPipeError):  # an owner that has gone already
        os.write(sys.stdout.fileno(), b"ready\n")
    sys.stdin.read()
    try:
        remove(sys.argv[1])
    except AnabranchError as error:
        sys.exit(f"anabranch: {error}")


if __name__ == "__main__":
    main()
