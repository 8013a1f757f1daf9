"""`anabranch bench codecs`: what each wire codec does to the loss of a whole training, and to one gradient.

For each seed every run trains the same model on the same text in the same order with one transport, so that between
them only the codec differs. One more run differs by rounding alone: its rows travel uncompressed by another exchange,
which adds up in another order. Training amplifies any difference, so a codec's effect is judged beside that run's.
Gradients are of one micro-batch at the weights of the first uncompressed run.
"""

import heapq
import inspect
import os
import statistics
import textwrap
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from itertools import product
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.distributed import DistributedConfig

import anabranch
from anabranch.cli.cluster_book import comparable, rows_of
from anabranch.cli.device import device
from anabranch.cli.launch import launch
from anabranch.integrations.transformers import NAME, AdaptiveSettings
from anabranch.training.config import RunConfig
from anabranch.training.presets import presets
from anabranch.transport.codecs import CODECS, make_codec

# (dispatch, combine): each codec both ways, and the finer one on the way back.
PAIRS = [("none", "none"), *((name, name) for name in CODECS), ("int8", "bf16")]
MODEL, RANKS, TRANSPORT, OTHER_TRANSPORT = "tiny", 2, "dedup", "all_to_all"
TOKENS = 2048
# Where the code that decides a loss starts.
ENTRIES = ("anabranch.cli.bench_codecs", "anabranch.training.runner")
# Of each seed: (transport, dispatch, combine), the uncompressed run first, then its twin.
RUNS = [(TRANSPORT, *PAIRS[0]), (OTHER_TRANSPORT, *PAIRS[0]), *((TRANSPORT, *pair) for pair in PAIRS[1:])]
# Two-sided 95 % of Student's t, by degrees of freedom.
T_95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)


def bench_codecs(steps: int, seeds: Sequence[int], folder: Path, jobs: int = 1) -> Iterator[dict[str, Any]]:
    """A row a run, all runs of one seed before the next seed's. jobs: trainings at a time, of RANKS threads each."""
    plain_loss = 0.0
    trainings = [Training(steps, seed, *run, str(folder)) for seed, run in product(seeds, RUNS)]
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool, _ending_trainings():
        for training, loss in zip(trainings, pool.map(_final_loss, trainings), strict=True):
            _, seed, transport, dispatch, combine, _ = training
            if (transport, dispatch, combine) == RUNS[0]:
                plain_loss = loss
            first = str(Training(steps, 0, *RUNS[0], str(folder)).out / "model")
            asked = {"model": first, "transport": transport, "dispatch": dispatch, "combine": combine}
            yield {
                "model": MODEL,
                "ranks": RANKS,
                "steps": steps,
                "seed": seed,
                "transport": transport,
                "dispatch_wire": dispatch,
                "combine_wire": combine,
                "bytes_a_number": [_bytes_a_number(name) for name in (dispatch, combine)],
                "eval_loss": round(loss, 5),
                "eval_loss_change_percent": round(100 * (loss / plain_loss - 1), 3),
                **(launch("codec_gradients", asked, RANKS) if seed == 0 else {}),
            }


@contextmanager
def _ending_trainings() -> Generator[None]:
    """Whatever ends the block early ends the trainings, for which the pool would wait; in the end none is left."""
    try:
        yield
    finally:
        for training in active_children():
            training.terminate()


def about(steps: int) -> dict[str, Any]:
    """What rows of one file have in common."""
    return comparable({"steps": steps}, ENTRIES)


def whole_seeds(json_file: Path | None, steps: int) -> list[dict[str, Any]]:
    """Rows that an interrupted benchmark left in the file, of the seeds of which it has all.

    Raises ConfigError as `rows_of`: figures that may not be compared are neither mixed nor lost.
    """
    rows = rows_of(json_file, about(steps), _judge)
    return rows[: len(rows) // len(RUNS) * len(RUNS)]


def _judge(rows: list[dict[str, Any]]) -> None:
    """Raise ValueError or KeyError unless the rows are those of RUNS, seed after seed."""
    for number, row in enumerate(rows):
        seed, run = divmod(number, len(RUNS))
        if (row["seed"], row["transport"], row["dispatch_wire"], row["combine_wire"]) != (seed, *RUNS[run]):
            raise ValueError(f"row {number} is of another run")
    summary(rows)


class Training(NamedTuple):
    """One of them, and the folder that all of them are in."""

    steps: int
    seed: int
    transport: str
    dispatch: str
    combine: str
    folder: str

    @property
    def out(self) -> Path:
        return Path(self.folder) / f"{self.seed}-{self.transport}-{self.dispatch}-{self.combine}"


def _final_loss(training: Training) -> float:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # a core a rank, however many the machine has
    steps, seed, transport, dispatch, combine, _ = training
    experts = AdaptiveSettings(transport=transport, dispatch_wire=dispatch, combine_wire=combine)
    config = RunConfig(
        model=MODEL, ranks=RANKS, steps=steps, out=str(training.out), experts=experts, save_every=0, eval_every=0,
        seed=seed,
    )  # fmt: skip
    try:
        trained = launch("train", config.to_dict(), RANKS)
    except KeyboardInterrupt:
        trained = None
    if trained is None or trained["stopped_early"]:
        os._exit(130)  # else this process would take up the next training
    return trained["eval_loss"]


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row a kind of run, over its seeds: mean change of the loss, its spread, and the range the true mean lies in.

    spread_percent: standard deviation over seeds; margin_percent: half the width of the 95 % interval of the mean,
    None for one seed. The twin's row tells what rounding alone does.
    """
    found: list[dict[str, Any]] = []
    for transport, dispatch, combine in RUNS[1:]:
        wanted = {"transport": transport, "dispatch_wire": dispatch, "combine_wire": combine}
        runs = [row for row in rows if wanted.items() <= row.items()]
        changes = [row["eval_loss_change_percent"] for row in runs]
        if not runs:
            continue
        spread = statistics.stdev(changes) if len(changes) > 1 else None
        freedom = min(len(changes) - 1, len(T_95))
        found.append({
            **wanted,
            "seeds": len(changes),
            "mean_change_percent": round(statistics.mean(changes), 3),
            "spread_percent": None if spread is None else round(spread, 3),
            "margin_percent": None if spread is None else round(T_95[freedom - 1] * spread / len(changes) ** 0.5, 3),
            "gradient_relative_error": runs[0].get("gradient_relative_error"),
        })  # fmt: skip
    return found


def _bytes_a_number(name: str) -> float:
    hidden, codec = presets()[MODEL].config.hidden_size, make_codec(name)
    return 4.0 if codec is None else codec.row_bytes(hidden) / hidden


def codec_gradients_rank(settings: dict[str, Any]) -> dict[str, Any]:
    """The job of one rank: how far codecs and transport move the gradient of one micro-batch, over all parameters."""
    dist.init_process_group(dist.get_default_backend_for_device(device()))
    plain = _gradients(settings["model"], TRANSPORT, "none", "none")
    coded = _gradients(settings["model"], settings["transport"], settings["dispatch"], settings["combine"])
    difference = torch.sqrt(
        sum(((coded[n] - plain[n]).double().square().sum() for n in plain), torch.zeros(()))
    )
    scale = torch.sqrt(sum((g.double().square().sum() for g in plain.values()), torch.zeros(())))
    cosine = sum(((coded[n] * plain[n]).double().sum() for n in plain), torch.zeros(()))
    norm = torch.sqrt(sum((g.double().square().sum() for g in coded.values()), torch.zeros(())))
    return {
        "gradient_relative_error": float(f"{float(difference / scale):.3g}"),
        "gradient_cosine": round(float(cosine / (scale * norm)), 6),
    }


def _gradients(folder: str, transport: str, dispatch: str, combine: str) -> dict[str, Tensor]:
    """Whole gradients of one micro-batch of the standard library's text, which differs from rank to rank."""
    anabranch.enable(transport=transport, dispatch_wire=dispatch, combine_wire=combine)
    sharding = DistributedConfig(fsdp_size=RANKS, ep_size=RANKS, ep_implementation=NAME)
    model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=sharding)
    text = inspect.getsource((heapq, textwrap)[dist.get_rank() % 2])
    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")["input_ids"][:, :TOKENS].to(
        device()
    )
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return {
        name: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        for name, p in model.named_parameters()
        if p.grad is not None
    }
