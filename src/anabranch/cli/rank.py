"""One rank of a launched job: `python -m anabranch.cli.rank JOB_FILE`.

What is imported here is light: the rank knows how to end before it spends seconds on importing torch.
"""

import contextlib
import json
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from importlib import import_module
from pathlib import Path
from types import TracebackType

from anabranch.errors import AnabranchError


def main(job_file: Path) -> None:
    """Run the job; rank 0's result, and the error of any rank, go to the job's folder."""
    folder, rank = job_file.parent, int(os.environ["RANK"])
    with _LastWords(folder, rank):
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # an interruption, as SIGINT is one
        request = json.loads(job_file.read_text())
        if request["launcher"] is not None:  # a lab ends its own ranks
            threading.Thread(target=_end_with, args=(request["launcher"], folder), daemon=True).start()
        result = import_module("anabranch.cli.jobs").carry_out(request["job"], request["settings"])
        if rank == 0:
            (folder / "result.json").write_text(json.dumps(result))


class _LastWords:
    """Leaves the error of a rank to the launcher, and ends the process at once.

    At once, because tearing down a group in which others still wait, or have died, may wait or abort.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder = folder
        self.rank = rank

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            return
        for number in (signal.SIGINT, signal.SIGTERM):  # the agent ends the ranks that are left
            signal.signal(number, signal.SIG_IGN)
        sys.stderr.flush()
        if isinstance(error, KeyboardInterrupt):
            os._exit(130)
        if isinstance(error, AnabranchError):
            self._write("error", {"message": str(error)})
            os._exit(2)
        crash = {
            "rank": self.rank,
            "time_s": time.time(),
            "error": " ".join("".join(traceback.format_exception_only(error)).split()),
            "traceback": "".join(traceback.format_exception(kind, error, trace)),
        }
        self._write("crash", crash)
        os._exit(1)

    def _write(self, kind: str, content: dict[str, object]) -> None:
        with contextlib.suppress(FileNotFoundError):  # the launcher was killed, its folder is gone
            (self.folder / f"{kind}-{self.rank:04d}.json").write_text(json.dumps(content))


def _end_with(launcher: int, folder: Path) -> None:
    """A launcher that was killed leaves no rank behind, not even one that hangs in a collective."""
    while os.getppid() == launcher:
        time.sleep(1.0)
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    # At once here too: torch has aborted a rank while the interpreter took it down, all its work done.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
