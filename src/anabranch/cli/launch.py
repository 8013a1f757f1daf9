"""Starting ranks: this machine's processes under torchrun's own agent, without its tracebacks.

A job is a name and a JSON-serialisable dict. The ranks run `python -m anabranch.cli.rank JOB_FILE`; a rank
that raises an `AnabranchError` writes it to the job's folder, and the launcher reports it once.
"""

import json
import logging
import os
import sys
import tempfile
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from anabranch.errors import AnabranchError, RankError


@dataclass(frozen=True)
class Failure:
    """What a failed rank left behind in the job's folder."""

    rank: int
    message: str


def under_torchrun() -> bool:
    """Whether an outer torchrun has already started this process as one of several ranks."""
    return "TORCHELASTIC_RUN_ID" in os.environ and "RANK" in os.environ


def launch(job: str, settings: dict[str, Any], ranks: int) -> dict[str, Any]:
    """Run `job` on `ranks` processes and return what rank 0 wrote as its result.

    Raises RankError with the reason where a rank failed or died; the other ranks are ended with it.
    """
    with tempfile.TemporaryDirectory(prefix="anabranch-") as folder:
        job_file = Path(folder) / "job.json"
        job_file.write_text(json.dumps({"job": job, "settings": settings}))
        logs = DefaultLogsSpecs(log_dir=folder)
        config = LaunchConfig(
            min_nodes=1, max_nodes=1, nproc_per_node=ranks, run_id=uuid.uuid4().hex, rdzv_backend="c10d",
            rdzv_endpoint="127.0.0.1:0", max_restarts=0, monitor_interval=0.2, logs_specs=logs,
        )  # fmt: skip
        for name, value in _rank_environment(ranks).items():
            os.environ.setdefault(name, value)
        logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
        try:
            elastic_launch(config, sys.executable)("-m", "anabranch.cli.rank", str(job_file))
        except ChildFailedError as error:
            raise _reason(Path(folder), error) from None
        result = Path(folder) / "result.json"
        return json.loads(result.read_text()) if result.exists() else {}


def _rank_environment(ranks: int) -> dict[str, str]:
    """Defaults for the ranks' processes; what the user has set stays."""
    return {
        # No more threads than cores: with more, OpenMP stalls in 64 ms steps.
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // ranks)),
        # glibc returns every freed tensor of some MB to the system and faults its pages in again at the next
        # use: a tenth of a CPU step (docs/log.md). Let it keep them.
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(1 << 34),
        "MALLOC_TOP_PAD_": str(1 << 28),
    }


def _reason(folder: Path, error: ChildFailedError) -> AnabranchError:
    left = sorted(folder.glob("error-*.json"))
    if left:
        said = json.loads(left[0].read_text())
        return AnabranchError(said["message"])
    rank, first = error.get_first_failure()
    what = f"signal {-first.exitcode}" if first.exitcode < 0 else f"exit code {first.exitcode}"
    return RankError(f"rank {rank} died ({what}) and ended the run; what it printed is above", setting="ranks")
