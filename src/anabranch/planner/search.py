"""The fastest layouts that fit: every layout priced by the formula, the best of them again by the whole calibration."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from anabranch.costs.training.calibration import Calibration, Prediction, load_calibration
from anabranch.costs.training.columns import Column, Columns, chip_values, model_values, software_values
from anabranch.costs.training.efficiency import Families
from anabranch.costs.training.memory import MemoryParts, peak_memory
from anabranch.costs.training.setup import Setup, Software
from anabranch.costs.training.stacks import Stack, has_known_modules, megatron, transformers_modules
from anabranch.errors import ConfigError, PlanError
from anabranch.hardware.catalog import load_catalog
from anabranch.hardware.instance import Cluster
from anabranch.planner.launch import trainable
from anabranch.planner.space import MICRO_BATCHES, Space, layouts
from anabranch.workload.hf_config import read_shape
from anabranch.workload.layout import Layout, Precision
from anabranch.workload.shape import ModelShape

PART = 8192  # layouts priced in one pass of numpy: 64 KiB a column
BEST = 128  # layouts whose residual is predicted
GIB = 2.0**30
# Of a chip's memory, for what is no tensor of the model: runtime, buffers of collectives, gaps between allocations.
RESERVE = 0.1
MOST_TOKENS = 1e18  # a million times what any model has read

USUAL_SOFTWARE = Software()


@dataclass(frozen=True)
class Request:
    """A training run that is to be planned. Raises ConfigError naming what cannot be.

    tokens: of the whole run. global_batch: sequences a step. skew: by expert-parallel degree, rows of the busiest rank
    over the mean; degrees between those given lie on a line over log2 of the degree. reserve: share of a chip's memory
    that the model's tensors may not take. guest_slots: experts that a rank may borrow in each layer. by_train: only
    layouts that `anabranch train` can run.
    """

    shape: ModelShape
    cluster: Cluster
    tokens: float
    seq_len: int
    global_batch: int
    precision: Precision = "bf16"
    software: Software = USUAL_SOFTWARE
    skew: Mapping[int, float] = field(default_factory=lambda: {1: 1.0})
    reserve: float = RESERVE
    guest_slots: int = 0
    by_train: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.tokens <= MOST_TOKENS:
            raise ConfigError(
                f"{self.tokens:g} must be above 0 and at most {MOST_TOKENS:g}", setting="tokens"
            )
        Layout(self.seq_len, self.global_batch, precision=self.precision)
        if (step := self.global_batch * self.seq_len) > self.tokens:
            raise ConfigError(
                f"a step of {self.global_batch:,} sequences has {step:,} tokens, more than the run's {self.tokens:g}",
                setting="global_batch",
            )
        self.cluster.chip.peak_tflops(self.precision)
        if not 0 <= self.reserve < 1:
            raise ConfigError(f"{self.reserve:g} must be at least 0 and below 1", setting="reserve")
        for degree, factor in self.skew.items():
            if degree < 1 or not 1 <= factor < float("inf"):
                raise ConfigError(f"{factor:g} at ep {degree} must be at least 1", setting="skew")

    @property
    def steps(self) -> int:
        """Optimizer steps of the run; the last one may be larger than what is left."""
        return int(np.ceil(self.tokens / (self.global_batch * self.seq_len)))

    @property
    def room_bytes(self) -> float:
        """Of a chip, for the model's tensors."""
        return self.cluster.chip.memory_gib.low * GIB * (1.0 - self.reserve)

    def space(self) -> Space:
        """All layouts that divide."""
        found = layouts(
            self.shape, self.cluster.chips, seq_len=self.seq_len, global_batch=self.global_batch,
            precision=self.precision, domain=self.cluster.domain,
        )  # fmt: skip
        return found.at(trainable(found.columns)) if self.by_train else found

    @property
    def own_modules(self) -> bool:
        """Whether memory is that of transformers' modules, which `anabranch train` runs, or of fused kernels."""
        return self.by_train and has_known_modules(self.shape)

    def stack(self) -> Stack:
        """What layers keep until backward."""
        if not self.own_modules:
            return megatron(self.shape, self.precision)
        mixed = "mixed" if self.cluster.chips > 1 else "autocast"
        return transformers_modules(self.shape, "fp32" if self.precision == "fp32" else mixed)

    def skew_at(self, ep: Column) -> Column:
        """Of a degree outside those given: the nearest one's, and 1 for a single rank."""
        known = sorted({1: 1.0, **self.skew}.items())
        return np.interp(np.log2(ep), np.log2([at for at, _ in known]), [factor for _, factor in known])


class Candidate(NamedTuple):
    """One layout. memory: bytes on the fullest chip."""

    setup: Setup
    step: Prediction
    memory: dict[str, float]

    @property
    def layout(self) -> Layout:
        return self.setup.layout

    @property
    def memory_bytes(self) -> float:
        return sum(self.memory.values())


class Found(NamedTuple):
    """candidates: by predicted time, the fastest first. considered: layouts that divide; fitting: into memory."""

    request: Request
    candidates: tuple[Candidate, ...]
    considered: int
    fitting: int

    @property
    def best(self) -> Candidate:
        return self.candidates[0]


class Priced(NamedTuple):
    """Of every layout of a space: bytes on the fullest chip and seconds of a step, N each."""

    bytes: Column
    step_s: Column


def search(request: Request, calibration: Calibration, best: int = BEST) -> Found:
    """Raises PlanError where no layout divides the model or fits into memory: it says the least that one needs."""
    space = request.space()
    if not len(space):
        raise PlanError(_nothing_divides(request), setting="cluster")
    priced = price(request, space, calibration)
    fits = np.flatnonzero(priced.bytes <= request.room_bytes)
    if not len(fits):
        raise PlanError(_nothing_fits(request, space, priced), setting="cluster")
    order = fits[np.lexsort((priced.bytes[fits], priced.step_s[fits]))]
    chosen = order[_different(priced, order)][:best]
    setups = [setup_of(request, space.layout(int(row))) for row in chosen]
    memory = memory_of(request, space.at(chosen))
    held = [dict(zip(MemoryParts._fields, parts, strict=True)) for parts in np.stack(memory, axis=1).tolist()]
    rows = zip(setups, calibration.predict(setups), held, strict=True)
    ranked = sorted((Candidate(*row) for row in rows), key=lambda candidate: candidate.step.step_s)
    return Found(request, tuple(ranked), len(space), len(fits))


def price(request: Request, space: Space, calibration: Calibration) -> Priced:
    """By the formula alone."""
    model, software = model_values(request.shape, request.seq_len), request.software
    chip, traits = (
        chip_values(request.cluster, request.precision),
        software_values(software, request.precision),
    )
    families = Families([request.cluster.chip.family], [software.family])
    sizes, seconds = list[Column](), list[Column]()
    for part in space.parts(PART):
        skew = request.skew_at(part.columns.ep)
        columns = Columns(model, chip, part.columns, traits, skew)
        seconds.append(calibration.efficiency.step_s(columns, families))
        sizes.append(memory_of(request, part).total)
    return Priced(np.concatenate(sizes), np.concatenate(seconds))


def memory_of(request: Request, space: Space) -> MemoryParts:
    skew = request.skew_at(space.columns.ep)
    return peak_memory(
        request.shape, space.columns, request.precision, skew, request.guest_slots, request.stack()
    )


def setup_of(request: Request, layout: Layout) -> Setup:
    skew = float(request.skew_at(np.array([float(layout.ep)]))[0])
    return Setup(request.shape, request.cluster, layout, request.software, skew)


def _different(priced: Priced, order: np.ndarray) -> np.ndarray:
    """Of layouts in order of time and memory, the first of those that no figure tells apart, such as with selective
    recomputation, which saves a flash kernel nothing."""
    changes = (np.diff(priced.step_s[order]) != 0) | (np.diff(priced.bytes[order]) != 0)
    return np.concatenate([[True], changes])


def _nothing_divides(request: Request) -> str:
    chips, batch = request.cluster.chips, request.global_batch
    if request.by_train:
        some = f"{', '.join(map(str, MICRO_BATCHES[:-1]))} or {MICRO_BATCHES[-1]}"
        return (
            f"`anabranch train` takes a step with every micro-batch, which cannot be {batch} sequences on {chips} "
            f"chips: give {chips} times {some} as global_batch"
        )
    return (
        f"no layout on {chips} chips of {request.cluster} divides {request.shape.layers} layers, "
        f"{request.shape.attention.heads} heads, seq_len {request.seq_len} and global_batch {batch}: choose a "
        f"global_batch that {chips} divides, or another number of nodes"
    )


def _nothing_fits(request: Request, space: Space, priced: Priced) -> str:
    least = int(np.argmin(priced.bytes))
    need, layout = priced.bytes[least] / GIB, space.layout(least)
    chip = request.cluster.chip
    return (
        f"none of {len(space)} layouts fits {request.cluster}: the smallest needs {need:.1f} GiB a chip "
        f"({brief(layout)}), {chip.kind} has {request.room_bytes / GIB:.1f} GiB beside the reserve: take more "
        "nodes, or a smaller global_batch or seq_len"
    )


def brief(layout: Layout) -> str:
    """Degrees above 1, micro-batch, recomputation and sharding, in words."""
    degrees = [f"{name} {getattr(layout, name)}" for name in ("tp", "pp", "vp", "ep", "etp", "cp", "dp")]
    named = [text for text in degrees if not text.endswith(" 1")]
    return ", ".join([*named, f"micro-batch {layout.micro_batch}", f"recompute {layout.recompute}",
                      f"shard {layout.shard}"])  # fmt: skip


def layouts_per_s() -> float:
    """Layouts enumerated, and their memory and time priced, in a second of one core: Qwen3-30B-A3B on four
    trn2.48xlarge, sequences of 32,768 tokens. Numpy does this on one thread."""
    cluster, shape = load_catalog().cluster("trn2.48xlarge:4"), read_shape("Qwen3-30B-A3B")
    request, calibration = Request(shape, cluster, 1e12, 32_768, 128), load_calibration()
    start_s = time.process_time()
    space = request.space()
    price(request, space, calibration)
    return len(space) / (time.process_time() - start_s)
