"""Starting ranks: this machine's processes under torchrun's own agent, without its tracebacks.

A job is a name and a JSON-serialisable dict. The ranks run `python -m anabranch.cli.rank JOB_FILE`. What they
have to say goes through the job's folder: rank 0's result, an `AnabranchError` of any rank, and the traceback
of a rank that crashed. The launcher alone reports, once.
"""

import json
import logging
import math
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from anabranch.cli.fail import RankDiedError
from anabranch.cli.process import usable_cores
from anabranch.errors import AnabranchError

# A rank that meets a dead peer says so in words like these, of gloo, of the store, or of torch.
LOST_PEER = (
    "gloo",
    "Connection closed by peer",
    "Connection reset by peer",
    "DistNetworkError",
    "DistBackendError",
)
LONGER = ". Raise timeout_s where a rank may take longer"
TIMED_OUT = ("Timed out waiting", "timed out", "Timeout")

# glibc returns every freed tensor of some MB to the system and faults its pages in again at the next use: a tenth of a
# CPU step (docs/log.md). Let it keep them.
KEEPS_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 34),
    "MALLOC_TOP_PAD_": str(1 << 28),
}


def launch(job: str, settings: dict[str, Any], ranks: int, *, timeout_s: int = 600) -> dict[str, Any]:
    """Run `job` on `ranks` processes and return what rank 0 wrote as its result.

    SIGINT and SIGTERM are passed on to the ranks, which get `timeout_s` to end in order. Raises the
    AnabranchError of a rank, RankDiedError with the reason where one died (the others are ended with it), and
    KeyboardInterrupt where a signal ended the job without a result.
    """
    with tempfile.TemporaryDirectory(prefix="anabranch-") as name:
        folder = Path(name)
        job_file = folder / "job.json"
        job_file.write_text(json.dumps({"job": job, "settings": settings, "launcher": os.getpid()}))
        config = LaunchConfig(
            min_nodes=1, max_nodes=1, nproc_per_node=ranks, run_id=uuid.uuid4().hex, rdzv_backend="c10d",
            rdzv_endpoint="127.0.0.1:0", local_addr="127.0.0.1", max_restarts=0, monitor_interval=0.2,
            logs_specs=DefaultLogsSpecs(log_dir=name), shutdown_timeout=timeout_s,
        )  # fmt: skip
        _hush_agent()
        result = folder / "result.json"
        try:
            with _environment(_rank_environment(ranks)):
                elastic_launch(config, sys.executable)("-P", "-m", "anabranch.cli.rank", str(job_file))
        except ChildFailedError as error:
            raise _reason(folder, error, timeout_s) from None
        except SignalException:
            if not result.exists():
                raise KeyboardInterrupt from None
        return json.loads(result.read_text())


def _rank_environment(ranks: int) -> dict[str, str]:
    """Defaults for the ranks' processes; what the user has set stays."""
    loopback = {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
    return {
        # No more threads than cores: with more, OpenMP stalls in 64 ms steps.
        "OMP_NUM_THREADS": str(max(1, usable_cores() // ranks)),
        **KEEPS_MEMORY,
        # All ranks are on this machine; else gloo looks up the host's name, which may have no address.
        **loopback,
    }


def _hush_agent() -> None:
    """The agent's loggers have levels of their own; what they warn of, the launcher says in one line."""
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)


@contextmanager
def _environment(defaults: dict[str, str]) -> Iterator[None]:
    """The agent gives its own environment to the ranks: set what is missing, for this job only."""
    missing = {name: value for name, value in defaults.items() if name not in os.environ}
    os.environ.update(missing)
    try:
        yield
    finally:
        for name in missing:
            os.environ.pop(name, None)


def _reason(folder: Path, error: ChildFailedError, timeout_s: int) -> AnabranchError:
    """The first cause: a reported mistake, else a rank that was killed, else a crash."""
    if reported := _reported(folder):
        return reported
    crashes = _crashes(folder)
    failures = sorted(error.failures.items(), key=lambda item: item[1].timestamp)
    began_s = min(failures[0][1].timestamp, *(crash["time_s"] for crash in crashes), math.inf)
    for rank, failure in failures:
        # The agent ends the other ranks by SIGTERM, and by SIGKILL those that do not heed it in 30 s.
        ended_by_agent = -failure.exitcode == signal.SIGTERM or failure.timestamp > began_s + 20
        if failure.exitcode < 0 and not ended_by_agent:
            name = signal.Signals(-failure.exitcode).name
            return RankDiedError(f"rank {rank} was killed by {name}; all ranks ended")
    return _crash(crashes, timeout_s, LONGER) or RankDiedError(
        f"rank {failures[0][0]} ended; all ranks ended"
    )


def told_cause(folder: Path, timeout_s: int) -> AnabranchError | None:
    """What the ranks of a job have left in its folder of why they ended: a mistake, or the first crash.

    timeout_s: how long they wait for each other, which is no setting of the user's.
    """
    return _reported(folder) or _crash(_crashes(folder), timeout_s)


def _reported(folder: Path) -> AnabranchError | None:
    files = sorted(folder.glob("error-*.json"))
    return AnabranchError(json.loads(files[0].read_text())["message"]) if files else None


def _crashes(folder: Path) -> list[dict[str, Any]]:
    """The first of them first."""
    crashes = [json.loads(file.read_text()) for file in folder.glob("crash-*.json")]
    return sorted(crashes, key=lambda crash: crash["time_s"])


def _crash(crashes: list[dict[str, Any]], timeout_s: int, remedy: str = "") -> RankDiedError | None:
    """The earliest crash that is no echo of another, its traceback to stderr; else a vain wait."""
    for crash in crashes:
        if not _says(crash, LOST_PEER + TIMED_OUT):
            sys.stderr.write(crash["traceback"])
            return RankDiedError(f"rank {crash['rank']} crashed: {crash['error']}; its traceback is above")
    for crash in crashes:
        if _says(crash, TIMED_OUT):
            return RankDiedError(
                f"rank {crash['rank']} waited {timeout_s} s for another one, which hangs or is stopped; "
                f"all ended{remedy}",
                setting="timeout_s" if remedy else None,
            )
    for crash in crashes:
        return RankDiedError(f"rank {crash['rank']} lost the others ({crash['error']}); all ranks ended")
    return None


def _says(crash: dict[str, Any], words: tuple[str, ...]) -> bool:
    return any(word in crash["error"] for word in words)
