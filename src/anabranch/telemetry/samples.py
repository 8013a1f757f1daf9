"""What the muscle measures before training, and the mind fits costs to: times of one layer's parts on one group.

Shape suffixes: R ranks of the process group.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple, Self, cast

from anabranch.errors import ConfigError

INTRA, INTER = "intra", "inter"


class CallSample(NamedTuple):
    """One measured call of a whole layer, forward and backward, with even routing and every expert at home.

    transport: a name of the registry, or "transformers" for their own all-to-all. tokens: of each rank.
    """

    transport: str
    chunks: int
    tokens: int
    ms: float


@dataclass(frozen=True)
class Samples:
    """Measured times on one process group, for layers of one shape.

    experts, top_k, hidden: the layer's shape. node_R: the node of each rank.
    row_bytes: one token's row as computed; dispatch_row_bytes, combine_row_bytes: as the codecs put it on the wire.
    expert_bytes: the parameters of one expert.
    link_ms: by class of peers, "intra" (other ranks of the node) and "inter" (ranks of other nodes): bytes that
    each rank sends in total to its peers of the class, evenly, all ranks at once, to the time of one all-to-all
    (median over repetitions of the slowest rank). A class without peers is absent.
    one_way_ms: the same between nodes in one direction: the ranks of every even node send so many bytes each, evenly
    to those of the next node, and nothing comes back; a last node without a next one idles. Empty where not measured.
    alone_ms: by class, the same for one sender: of each pair of nodes the first rank sends so many bytes to the first
    of the next (of each node, to its second rank), and nobody else sends. Empty where not measured.
    expert_ms: rows on every rank, even over its homes, to the time of their computation, forward and backward.
    expert_alone_ms: the same with rows on one rank only, while the others wait. Empty where not measured.
    copy_ms_per_mb: gathering rows by index, per 10^6 bytes.
    plan_ms: host time of planning, by name of the planner.
    call_ms: whole calls, every exchange at two sizes or more: what the parts leave unexplained is its overhead.
    """

    hidden: int
    experts: int
    top_k: int
    node_R: tuple[int, ...]
    row_bytes: int
    dispatch_row_bytes: int
    combine_row_bytes: int
    expert_bytes: int
    link_ms: Mapping[str, Mapping[int, float]]
    expert_ms: Mapping[int, float]
    copy_ms_per_mb: float
    plan_ms: Mapping[str, float]
    call_ms: tuple[CallSample, ...]
    one_way_ms: Mapping[int, float] = field(default_factory=dict[int, float])
    alone_ms: Mapping[str, Mapping[int, float]] = field(default_factory=dict[str, Mapping[int, float]])
    expert_alone_ms: Mapping[int, float] = field(default_factory=dict[int, float])

    def __post_init__(self) -> None:
        """Raises ConfigError naming the first field that no machine could have measured."""
        for name in ("hidden", "experts", "top_k", *_BYTES):
            _require(name, getattr(self, name) >= 1, "must be at least 1")
        _require(
            "node_R", bool(self.node_R) and min(self.node_R) == 0, "must number the node of every rank from 0"
        )
        _require(
            "link_ms", set(self.link_ms) <= {INTRA, INTER}, f"knows the classes {INTRA} and {INTER} only"
        )
        for table in (*self.link_ms.values(), self.expert_ms):
            _require(
                "link_ms, expert_ms", len(table) >= 2, "need two sizes or more, to tell latency from rate"
            )
            _require("link_ms, expert_ms", min(table) >= 0, "must have sizes of at least 0")
            _require_times("link_ms, expert_ms", table.values())
        for table in (self.one_way_ms, self.expert_alone_ms, *self.alone_ms.values()):
            _require_times("one_way_ms, alone_ms, expert_alone_ms", table.values())
        _require_times("copy_ms_per_mb", (self.copy_ms_per_mb,))
        _require_times("plan_ms", self.plan_ms.values())
        _require("call_ms", bool(self.call_ms), "must hold a sample of every exchange")
        _require_times("call_ms", [call.ms for call in self.call_ms])
        _require("call_ms", all(c.chunks >= 1 and c.tokens >= 1 for c in self.call_ms), "must count from 1")

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers; sizes become text, as keys of JSON are."""
        out = asdict(self)
        out["node_R"] = list(self.node_R)
        out["link_ms"] = {name: _with_text_keys(table) for name, table in self.link_ms.items()}
        out["one_way_ms"] = _with_text_keys(self.one_way_ms)
        out["alone_ms"] = {name: _with_text_keys(table) for name, table in self.alone_ms.items()}
        out["expert_ms"] = _with_text_keys(self.expert_ms)
        out["expert_alone_ms"] = _with_text_keys(self.expert_alone_ms)
        out["plan_ms"] = dict(self.plan_ms)
        out["call_ms"] = [call._asdict() for call in self.call_ms]
        return out

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """The reverse of `to_json`. Raises ConfigError where a field is missing, unknown or malformed."""
        try:
            found = dict(content)
            found["node_R"] = tuple(int(node) for node in found["node_R"])
            found["link_ms"] = {str(name): _with_sizes(table) for name, table in found["link_ms"].items()}
            found["one_way_ms"] = _with_sizes(found["one_way_ms"])
            found["alone_ms"] = {str(name): _with_sizes(table) for name, table in found["alone_ms"].items()}
            found["expert_ms"] = _with_sizes(found["expert_ms"])
            found["expert_alone_ms"] = _with_sizes(found["expert_alone_ms"])
            found["call_ms"] = tuple(CallSample(**call) for call in found["call_ms"])
            return cls(**found)
        except (KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"a field is missing or malformed ({error})", setting="samples") from error
        except ValueError as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"a number is malformed ({error})", setting="samples") from error


_BYTES = ("row_bytes", "dispatch_row_bytes", "combine_row_bytes", "expert_bytes")


def _with_text_keys(table: Mapping[int, float]) -> dict[str, float]:
    return {str(size): ms for size, ms in table.items()}


def _with_sizes(table: Any) -> dict[int, float]:
    return {int(size): float(ms) for size, ms in cast("Mapping[str, float]", table).items()}


def _require(field: str, holds: bool, what: str) -> None:
    if not holds:
        raise ConfigError(f"{field} {what}; measure again", setting="samples")


def _require_times(field: str, times: Sequence[float] | Any) -> None:
    good = all(math.isfinite(ms) and ms >= 0 for ms in times)
    _require(field, good, "must hold finite times of at least 0")
