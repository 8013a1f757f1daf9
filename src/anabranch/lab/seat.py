"""A rank's seat: run by torchrun's agent as the rank, it starts the rank's command inside the rank's cgroup.

    python seat.py CGROUPS RECORDS

CGROUPS is the lab's folder of groups, RECORDS one for how ranks ended, with the command line in it: torchrun
would take a `$` in an argument for a macro of its own. The seat itself is not under the quota.
When the command fails, the seat keeps that from the agent, which would print a traceback of its own: it waits
for the lab, which reads the records, to end everything. When it ends well, the seat waits for all other ranks: an agent
gives those of other nodes 300 s. Only the standard library: run by its path, it needs nothing of the command's
environment.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

COMMAND = "command.json"
POLL_S = 0.1
NOT_FOUND, NOT_RUNNABLE = 127, 126
SIGNALLED = 128


def main() -> None:
    """Run the command, record its exit status, and wait: for the end where that is not 0, else for the other ranks."""
    cgroups, records = map(Path, sys.argv[1:])
    rank = os.environ["RANK"]
    group = cgroups / f"rank{rank}" / "cgroup.procs"
    status = _run(json.loads((records / COMMAND).read_text()), group)
    told = records / f"rank{rank}"
    written = told.with_name(f".{told.name}")
    written.write_text(f"{time.monotonic_ns()} {status}")
    written.rename(told)
    while status or len(list(records.glob("rank*"))) < int(os.environ["WORLD_SIZE"]):
        time.sleep(POLL_S)


def _run(command: list[str], group: Path) -> int:
    """The exit status of the command, as a shell tells it."""
    try:
        # The seat has one thread, so code between fork and exec is safe.
        child = subprocess.Popen(command, preexec_fn=lambda: group.write_text(str(os.getpid())))
    except OSError as error:
        sys.stderr.write(f"{command[0]}: {error.strerror}\n")
        return NOT_FOUND if isinstance(error, FileNotFoundError) else NOT_RUNNABLE

    def pass_on(number: int, _: FrameType | None) -> None:
        child.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, pass_on)
    status = child.wait()
    return status if status >= 0 else SIGNALLED - status


if __name__ == "__main__":
    main()
