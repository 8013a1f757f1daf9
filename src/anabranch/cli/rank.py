"""One rank of a launched job: `python -m anabranch.cli.rank JOB_FILE`."""

import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers.utils import logging as transformers_logging

from anabranch.cli.bench_balance import bench_balance_rank
from anabranch.errors import AnabranchError
from anabranch.cli.train import train_rank

JOBS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "bench_balance": bench_balance_rank,
    "train": train_rank,
}


def quiet() -> None:
    """Keep libraries' progress bars and advice off the run's display; errors and our warnings still show."""
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)


def main(job_file: Path) -> int:
    """Run the job; rank 0's result and the first user error of each rank go to the job's folder."""
    request = json.loads(job_file.read_text())
    quiet()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    rank = os.environ["RANK"]
    try:
        result = JOBS[request["job"]](request["settings"])
    except AnabranchError as error:
        (job_file.parent / f"error-{int(rank):04d}.json").write_text(json.dumps({"message": str(error)}))
        return 2
    if rank == "0":
        (job_file.parent / "result.json").write_text(json.dumps(result))
    if dist.is_initialized():
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
