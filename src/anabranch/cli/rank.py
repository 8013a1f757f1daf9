"""One rank of a launched job: `python -m anabranch.cli.rank JOB_FILE`."""

import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from anabranch.cli.bench_balance import bench_balance_rank
from anabranch.cli.fail import INTERRUPTED, USER_ERROR
from anabranch.cli.process import quiet
from anabranch.cli.train import train_rank
from anabranch.errors import AnabranchError
from anabranch.training.agreement import leave

JOBS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "bench_balance": bench_balance_rank,
    "train": train_rank,
}


def main(job_file: Path) -> int:
    """Run the job; rank 0's result and the first user error of each rank go to the job's folder."""
    request = json.loads(job_file.read_text())
    folder, rank = job_file.parent, int(os.environ["RANK"])
    sys.excepthook = _Crash(folder, rank)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # an interruption, as SIGINT is one
    threading.Thread(target=_end_with, args=(request["launcher"],), daemon=True).start()
    quiet()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    try:
        result = JOBS[request["job"]](request["settings"])
    except AnabranchError as error:
        (folder / f"error-{rank:04d}.json").write_text(json.dumps({"message": str(error)}))
        return USER_ERROR
    if rank == 0:
        (folder / "result.json").write_text(json.dumps(result))
    leave()
    return 0


class _Crash:
    """What a rank does with an exception nobody expected: leave it to the launcher, and end at once.

    At once, because tearing down a group that lost a rank may wait for it.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder = folder
        self.rank = rank

    def __call__(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if issubclass(kind, KeyboardInterrupt):
            os._exit(INTERRUPTED)
        crash = {
            "rank": self.rank,
            "time_s": time.time(),
            "error": " ".join("".join(traceback.format_exception_only(error)).split()),
            "traceback": "".join(traceback.format_exception(kind, error, trace)),
        }
        (self.folder / f"crash-{self.rank:04d}.json").write_text(json.dumps(crash))
        os._exit(1)


def _end_with(launcher: int) -> None:
    """A launcher that was killed leaves no rank behind, not even one that hangs in a collective."""
    while os.getppid() == launcher:
        time.sleep(1.0)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
