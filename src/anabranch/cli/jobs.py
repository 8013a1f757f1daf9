"""The jobs that `launch` can start, by name: what one rank does with a job's settings."""

import os
from collections.abc import Callable
from typing import Any

import torch

from anabranch.cli.bench_balance import bench_balance_rank
from anabranch.cli.bench_cluster import bench_cluster_rank
from anabranch.cli.bench_codecs import codec_gradients_rank
from anabranch.cli.bench_skew import bench_skew_rank
from anabranch.cli.device import quiet
from anabranch.cli.generate import generate_rank
from anabranch.cli.generate_engines import measure_rank
from anabranch.cli.memory_rank import memory_rank
from anabranch.cli.train import train_rank
from anabranch.training.agreement import leave

JOBS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "bench_balance": bench_balance_rank,
    "bench_cluster": bench_cluster_rank,
    "bench_skew": bench_skew_rank,
    "codec_gradients": codec_gradients_rank,
    "generate": generate_rank,
    "measure_generate": measure_rank,
    "memory": memory_rank,
    "train": train_rank,
}


def carry_out(job: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Run the job on this rank, and leave the group of ranks that it joined."""
    quiet()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    result = JOBS[job](settings)
    leave()
    return result
