"""The registry of transports, and what `auto` means."""

import difflib

import torch.distributed as dist

from anabranch.errors import ConfigError
from anabranch.transport.all_gather import AllGather
from anabranch.transport.all_to_all import AllToAll
from anabranch.transport.base import Transport
from anabranch.transport.dedup import Dedup

TRANSPORTS: dict[str, type[Transport]] = {cls.name: cls for cls in (AllToAll, Dedup, AllGather)}


def check_transport(name: str) -> None:
    """Raise ConfigError unless `name` is `auto` or a registered transport."""
    if name == "auto" or name in TRANSPORTS:
        return
    near = difflib.get_close_matches(name, ["auto", *TRANSPORTS], n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ConfigError(f"{name!r} is not one of auto, {', '.join(TRANSPORTS)}.{hint}", setting="transport")


def make_transport(name: str, group: dist.ProcessGroup, *, top_k: int) -> Transport:
    """Build the named transport for `group`. Raises ConfigError for an unknown name."""
    check_transport(name)
    if name == "auto":
        name = _fewest_rows(dist.get_world_size(group), top_k)
    return TRANSPORTS[name](group)


def _fewest_rows(ranks: int, top_k: int) -> str:
    """The pattern that moves fewer rows under even routing.

    A token's K rows leave its rank with probability (R-1)/R each; the number of distinct other ranks they
    reach is (R-1)(1 - (1-1/R)^K). `dedup` pays one more small exchange, so it must save a quarter of the rows.
    `all_gather` is never chosen here: its fixed buffers only pay where shapes must be static.
    """
    pairs = top_k * (ranks - 1) / ranks
    distinct = (ranks - 1) * (1 - (1 - 1 / ranks) ** top_k)
    return "dedup" if distinct < 0.75 * pairs else "all_to_all"
