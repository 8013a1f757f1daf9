"""The table of published measurements: one row a configuration, its source beside it.

`read_published` turns a row into a `Setup` and the quantity that was published, in its own unit; a row that cannot be
simulated is returned with its reason. How a row is read where the table leaves room is said at each function.
"""

import csv
import re
from dataclasses import dataclass
from pathlib import Path

from anabranch.costs.training.setup import Setup, Software
from anabranch.errors import AnabranchError, DataError
from anabranch.hardware.catalog import Catalog, load_catalog
from anabranch.hardware.instance import Cluster
from anabranch.workload.blocks import Attention, DenseFeedForward, Experts, Latent
from anabranch.workload.layout import Layout, Precision
from anabranch.workload.shape import ModelShape

HERE = Path(__file__).parent
TABLE = HERE / "published_throughput.csv"
SYSTEMS = HERE / "published_systems.toml"

# What a table may measure, in the order of preference: its column, and whether more is better.
QUANTITIES = ("step_time_s", "tokens_s_per_dev", "tflops_per_dev")
REQUIRED = (
    "id",
    "model",
    "layers",
    "hidden",
    "heads",
    "vocab",
    "seq_len",
    "hardware",
    "n_devices",
    "GBS",
    "leak_group",
)


@dataclass(frozen=True)
class Published:
    """A measured run. quantity: the column that `measured` is from; `leak_group`: rows of one configuration."""

    id: str
    setup: Setup
    measured: float
    quantity: str
    step_s: float
    leak_group: str
    memory_gb: float | None
    per_step: float  # measured x step_s, or measured / step_s: what turns one into the other

    def in_quantity(self, step_s: float) -> float:
        """A step's seconds in the row's own quantity."""
        return step_s if self.quantity == "step_time_s" else self.per_step / step_s


@dataclass(frozen=True)
class Unusable:
    """A row that is not simulated, and why."""

    id: str
    reason: str


def read_published(table: Path = TABLE) -> tuple[list[Published], list[Unusable]]:
    """All rows of `table`. Raises DataError where the file is not such a table."""
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            missing = [name for name in REQUIRED if name not in (reader.fieldnames or ())]
            # A line that is too short lacks its last cells; one that is too long has them under None.
            rows = [{name: cell or "" for name, cell in row.items() if name} for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{table}: {error}", setting="table") from error
    if missing:
        raise DataError(f"{table} lacks the columns {', '.join(missing)}", setting="table")
    catalog, good, bad = load_catalog(SYSTEMS), list[Published](), list[Unusable]()
    for number, row in enumerate(rows, 2):
        name = row["id"] or f"line {number}"
        try:
            good.append(_published(name, row, catalog))
        except AnabranchError as error:
            bad.append(Unusable(name, str(error)))
    return good, bad


def _published(name: str, row: dict[str, str], catalog: Catalog) -> Published:
    cluster = _cluster(row, catalog)
    shape, layout = _shape(row), _layout(row)
    setup = Setup(shape, cluster, layout, _software(row))
    cluster.chip.peak_tflops(layout.precision)  # raises where the chip has none
    quantity = next((column for column in QUANTITIES if row.get(column)), None)
    if quantity is None:
        raise DataError("it states neither step time, tokens nor FLOP/s", setting="step_time_s")
    measured = _number(row, quantity)
    if measured <= 0:
        raise DataError(f"{measured:g} must be above 0", setting=quantity)
    tokens = layout.tokens / _size(row, "n_devices")
    per_step = {
        "step_time_s": 1.0,
        "tokens_s_per_dev": tokens,
        "tflops_per_dev": tokens * _counted_flops(row, shape, layout.seq_len) / 1e12,
    }[quantity]
    step_s = measured if quantity == "step_time_s" else per_step / measured
    memory = _number(row, "mem_GB") if row.get("mem_GB") else None
    if memory and "mem in GiB" in row.get("notes", ""):
        memory *= 1.024**3
    return Published(name, setup, measured, quantity, step_s, row["leak_group"] or name, memory, per_step)


def _counted_flops(row: dict[str, str], shape: ModelShape, seq_len: int) -> float:
    """FLOPs of a token as the row's source counts them: the model's, forward and backward, with causal attention.

    Narayanan et al. (arXiv:2104.04473) count the recomputation as well, and whole attention.
    """
    flops = shape.forward_flops(seq_len)
    if "Narayanan" in row.get("source", ""):
        return 4.0 * (flops.total - flops.head) + 3.0 * flops.head + 4.0 * flops.attention
    return 3.0 * flops.total


def _number(row: dict[str, str], column: str, default: float | None = None) -> float:
    """The number that a cell starts with: "1 (assumed)" is 1. Raises DataError naming the column."""
    found = re.match(r"\s*(\d+\.?\d*|\.\d+)", row.get(column) or "")
    if found:
        return float(found.group(1))
    if default is None:
        raise DataError(f"{row.get(column)!r} is no number", setting=column)
    return default


def _whole(row: dict[str, str], column: str, default: int | None = None) -> int:
    return round(_number(row, column, None if default is None else float(default)))


def _size(row: dict[str, str], column: str) -> int:
    """At least 1. Raises DataError naming the column."""
    if (size := _whole(row, column)) < 1:
        raise DataError(f"{size} must be at least 1", setting=column)
    return size


def _shape(row: dict[str, str]) -> ModelShape:
    """GPT-style models (named GPT-, Megatron- or Turing-) have two matrices a feed-forward and whole keys and values.

    MLA has the ranks of DeepSeek-V2-Lite below a hidden size of 4096 and of DeepSeek-V3 above.
    """
    layers, hidden, name = _size(row, "layers"), _size(row, "hidden"), row["model"]
    classic = re.match(r"(GPT-?\d|Megatron|Turing)", name) is not None
    heads = _size(row, "heads")
    mla = "MLA" in row["heads"]
    # Qwen3 (arXiv:2505.09388) and gpt-oss (arXiv:2508.10925) set heads apart from the hidden size.
    head_dim = 128 if "Qwen3" in name else 64 if "OSS" in name.upper() else hidden // heads
    attention = Attention(heads, _whole(row, "kv_heads", heads) or heads, head_dim)
    if mla:
        attention = Attention(heads, heads, 192, Latent(1536 if hidden > 4096 else None, 512, 64, 128, 128))
    count = _whole(row, "experts", 0)
    dense_first = re.search(r"\((\d+) dense\)", row["layers"])
    first = int(dense_first.group(1)) if dense_first else 0
    experts = None
    if count:
        width = _size(row, "moe_ffn")
        experts = Experts(count, _size(row, "top_k"), width, tuple(range(first, layers)),
                          shared_width=_shared(row, width))  # fmt: skip
    wide = _whole(row, "ffn", 4 * hidden)
    dense = DenseFeedForward(wide, gated=not classic) if not count or first else None
    return ModelShape(name, _size(row, "vocab"), hidden, layers, attention, dense, experts,
                      mtp=1 if "MTP" in row["layers"] else 0)  # fmt: skip


def _shared(row: dict[str, str], width: int) -> int:
    """ "2" is two shared experts of the experts' width, "1 (20480)" one of 20480."""
    found = re.match(r"\s*(\d+)\s*(?:\((\d+)\))?", row.get("shared_experts") or "")
    if found is None:
        return 0
    return int(found.group(1)) * (int(found.group(2)) if found.group(2) else width)


def _layout(row: dict[str, str]) -> Layout:
    """Degrees that are blank are 1; dp is what the chips leave. Trainium's rows count cores, two a chip, so tp (all
    of a chip's cores belong to one tensor-parallel group) is halved.

    torchtitan's batch of a pipeline is cut into micro-batches of one sequence. Experts without an EP degree under
    FSDP are spread over all ranks that have one.
    """
    chips = _size(row, "n_devices")
    tp, pp, cp = (_whole(row, name, 1) or 1 for name in ("TP", "PP", "CP"))
    if row["hardware"].startswith("Trainium1"):
        tp = max(1, tp // 2)
    dp = max(1, chips // (tp * pp * cp))
    count = _whole(row, "experts", 0)
    full_shard = _sharded(row)
    ep = _whole(row, "EP", min(dp, count) if full_shard and count else 1) if count else 1
    batch = _size(row, "GBS")
    per_replica = re.match(r"\s*(\d+)\s*/\s*DP", row["GBS"])
    if per_replica:
        batch = int(per_replica.group(1)) * dp
    micro = _whole(row, "MBS", 1) or 1
    if "torchtitan" in row.get("framework", "") and pp > 1:
        micro = 1
    layout = Layout(
        seq_len=_size(row, "seq_len"), global_batch=batch, micro_batch=min(micro, max(1, batch // dp)), tp=tp, pp=pp,
        vp=_whole(row, "VP", 1) or 1, ep=ep, etp=_whole(row, "ETP", 1) or 1, cp=cp, dp=dp,
        recompute="full" if row.get("recompute", "").startswith("full") else "none",
        precision=_precision(row), shard="full" if full_shard else "optimizer",
    )  # fmt: skip
    if layout.chips != chips:
        raise DataError(
            f"TP x PP x CP = {tp} x {pp} x {cp} do not divide {chips} devices", setting="n_devices"
        )
    return layout


def _sharded(row: dict[str, str]) -> bool:
    fsdp = (row.get("FSDP") or "").strip()
    return fsdp not in ("", "0", "1", "no") or "FSDP" in row.get("framework", "")


def _precision(row: dict[str, str]) -> Precision:
    stated = row.get("precision", "").upper()
    return "fp4" if "FP4" in stated else "fp8" if "FP8" in stated else "bf16"


def _software(row: dict[str, str]) -> Software:
    """Traits from what a row says of its dispatcher, precision, recomputation and notes."""
    route, notes = row.get("dispatcher_overlap", "").lower(), row.get("notes", "").lower()
    stated, again = row.get("precision", "").upper(), row.get("recompute", "").lower()
    family = row.get("framework", "")
    return Software(
        family=_family(family),
        source=re.split(r"[,(]| container| perf", row.get("source", ""))[0].strip().lower(),
        dispatcher="deduplicated" if "deepep" in route or "hybridep" in route else "all_to_all",
        expert_overlap=re.search(r"overlap(=true| on)|a2a overlap|\+ .*overlap|, ep overlap$", route)
        is not None,
        graphs="graph=transformer" in route or "cuda graph" in route,
        async_tp="asynctp" in notes.replace(" ", ""),
        compiled="compile" in notes,
        folded="folding" in family.lower(),
        scaling="mx"
        if "MX" in stated
        else "row"
        if "ROW" in stated
        else "tensor"
        if "TENSOR" in stated
        else "",
        adapters="lora" in notes,
        packed="sft" in notes or "lora" in notes,
        recomputed=frozenset(part for part in ("mlp", "norm", "act") if part in again),
    )


def _family(framework: str) -> str:
    """ "Megatron-Bridge/MCore" and "Megatron-Bridge" are one trainer, "NxD / NeMo-Megatron" is nxd."""
    name = re.sub(r"[^a-z0-9]+", "-", framework.lower()).strip("-")
    known = ("megatron-bridge", "nxd", "torchtitan", "megatron-lm", "megatron-deepspeed", "megascale")
    return next((family for family in known if name.startswith(family)), name)


# How tables name hardware, as the start of a name, and the instance of the catalog or of `SYSTEMS` that it is.
HARDWARE = {
    "H100-96GB": "published-h100-96gb", "A100-80GB (8/node, 800": "published-a100-800g",
    "A100": "dgx-a100", "H100": "dgx-h100", "H200": "dgx-h200", "B200": "dgx-b200", "B300": "p6-b300.48xlarge",
    "GB200": "gb200-nvl72", "GB300": "gb300-nvl72", "Trainium1": "trn1.32xlarge", "Trainium2": "trn2.48xlarge",
}  # fmt: skip


def _cluster(row: dict[str, str], catalog: Catalog) -> Cluster:
    """As many instances as hold the devices; the last one may be in use in part."""
    name = next((system for start, system in HARDWARE.items() if row["hardware"].startswith(start)), None)
    if name is None:
        raise DataError(f"no system is known as {row['hardware']!r}", setting="hardware")
    instance = catalog.instance(name)
    return Cluster(instance, -(-_size(row, "n_devices") // instance.chips))
