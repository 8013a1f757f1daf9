"""Transports by name, and what `auto` chooses from."""

import pytest

from anabranch.errors import ConfigError
from anabranch.placement.choice import Exchange
from anabranch.placement.nodes import Nodes
from anabranch.transport import TRANSPORTS
from anabranch.transport.choose import OVERLAPPING, candidate_exchanges, require_transport


def test_an_unknown_name_is_told_with_the_nearest() -> None:
    with pytest.raises(
        ConfigError, match="transport: 'deduplicate' is not one of all_to_all, dedup"
    ) as caught:
        require_transport("deduplicate")
    assert caught.value.setting == "transport"
    with pytest.raises(ConfigError, match="Did you mean 'all_gather'"):
        require_transport("allgather")
    with pytest.raises(ConfigError, match="not one of auto, all_to_all"):
        require_transport("automatic", "auto")
    require_transport("auto", "auto")
    for name in TRANSPORTS:
        require_transport(name)


@pytest.mark.parametrize(
    ("node_R", "levels"),
    [
        ([0], set()),
        ([0, 0], {"dedup"}),
        ([0, 1, 2], {"dedup"}),
        ([0, 0, 1, 1], {"dedup", "two_level"}),
        ([0, 0, 1], {"dedup"}),
    ],
    ids=["one rank", "one node", "one rank a node", "two nodes", "uneven nodes"],
)
def test_two_levels_need_two_levels(node_R: list[int], levels: set[str]) -> None:
    found = candidate_exchanges(Nodes.of(node_R))
    assert Exchange("all_to_all") in found
    assert {e.transport for e in found} == {"all_to_all"} | levels
    assert {e.transport for e in found if e.chunks > 1} == levels <= set(OVERLAPPING)
