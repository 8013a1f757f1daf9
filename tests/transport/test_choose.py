"""Transports by name, and what `auto` stands for."""

import pytest
import torch.distributed as dist

from anabranch.errors import ConfigError
from anabranch.transport import TRANSPORTS
from anabranch.transport.choose import check_transport, make_transport
from run_distributed import RankPool


def test_an_unknown_name_is_told_with_the_nearest() -> None:
    with pytest.raises(
        ConfigError, match="transport: 'deduplicate' is not one of auto, all_to_all, dedup"
    ) as caught:
        check_transport("deduplicate")
    assert caught.value.setting == "transport"
    with pytest.raises(ConfigError, match="Did you mean 'all_gather'"):
        check_transport("allgather")
    for name in ("auto", *TRANSPORTS):
        check_transport(name)


def chosen(name: str, top_ks: list[int]) -> list[str]:
    group = dist.group.WORLD
    assert group is not None
    return [make_transport(name, group, top_k=k).name for k in top_ks]


def test_auto_moves_fewer_rows(ranks2: RankPool, ranks4: RankPool) -> None:
    """Two ranks: a token leaves for one rank at most. Four: it needs several experts until ranks coincide."""
    assert ranks2.run(chosen, "auto", [1, 2, 3, 8]) == [["all_to_all", "all_to_all", "dedup", "dedup"]] * 2
    assert ranks4.run(chosen, "auto", [1, 2, 4, 8]) == [["all_to_all", "all_to_all", "dedup", "dedup"]] * 4
    assert ranks2.run(chosen, "all_gather", [1]) == [["all_gather"]] * 2
