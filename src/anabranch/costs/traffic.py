"""Who sends how many rows to whom under a plan, by each exchange pattern.

Shape suffixes: R ranks, E experts, G experts with guests, N nodes, M ranks a node, X destinations (ranks or nodes),
K experts a token.

`all_to_all` is exact. The patterns that send a token once per destination need the tokens themselves, of which a
plan knows counts only; `distinct` gives their expected number.
"""

from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from anabranch.errors import ConfigError
from anabranch.placement.assign import GuestRows, guest_rows
from anabranch.placement.base import IntArray, Plan
from anabranch.placement.nodes import Nodes
from anabranch.telemetry.samples import INTER, INTRA

FloatArray = NDArray[np.float64]

TRANSFORMERS = "transformers"


class Hop(NamedTuple):
    """One exchange on the way of rows to their experts; the way back is its reverse.

    rows_RR: rows that rank s hands to rank d; the diagonal is what stays where it is. links: classes of peers in
    the process group. wired: whether the codecs apply. carries: whether routing weights and slots travel along.
    """

    rows_RR: FloatArray
    links: tuple[str, ...]
    wired: bool
    carries: bool


class Flow:
    """The rows of one plan between ranks and nodes."""

    def __init__(self, plan: Plan, nodes: Nodes, top_k: int) -> None:
        self.plan, self.nodes, self.top_k = plan, nodes, top_k
        self.tokens_R = plan.counts_RE.sum(axis=1) / top_k

    @cached_property
    def _guests(self) -> GuestRows:
        return guest_rows(self.plan)

    @cached_property
    def rows_RR(self) -> FloatArray:
        """Rows that rank s sends to rank d."""
        return self._sum_and_most(np.arange(self.nodes.ranks), self.nodes.ranks)[0]

    @cached_property
    def tokens_RR(self) -> FloatArray:
        """Expected tokens of rank s that rank d computes something of."""
        return self._distinct(np.arange(self.nodes.ranks), self.nodes.ranks)

    @cached_property
    def tokens_RN(self) -> FloatArray:
        """Expected tokens of rank s that some rank of node n computes something of."""
        return self._distinct(self.nodes.node_R, self.nodes.count)

    def _distinct(self, place_R: IntArray, places: int) -> FloatArray:
        rows_RX, most_RX = self._sum_and_most(place_R, places)
        return distinct(rows_RX, most_RX, self.tokens_R, self.top_k, self.plan.homes.experts)

    def _sum_and_most(self, place_R: IntArray, places: int) -> tuple[FloatArray, FloatArray]:
        """Rows of each source at each place that ranks map to: of all experts, and the most of any one expert."""
        counts_RE, home_E = self.plan.counts_RE, self.plan.homes.rank_E
        if self._guests.expert_G.size:
            counts_RE = counts_RE.copy()
            counts_RE[:, self._guests.expert_G] = 0
        order_E = np.argsort(place_R[home_E], kind="stable")
        # Only places that own an expert: reduceat cannot sum nothing.
        held_X, first_X = np.unique(place_R[home_E[order_E]], return_index=True)
        sum_RX, most_RX = np.zeros((2, place_R.size, places))
        sorted_RE = counts_RE[:, order_E]
        sum_RX[:, held_X] = np.add.reduceat(sorted_RE, first_X, axis=1)
        most_RX[:, held_X] = np.maximum.reduceat(sorted_RE, first_X, axis=1)
        if self._guests.expert_G.size:
            sent_RRG = self._guests.sent_RRG
            if places < place_R.size:
                at_RX = place_R[:, None] == np.arange(places)
                sent_RRG = np.einsum("sdg,dx->sxg", sent_RRG, at_RX.astype(np.int64))
            sum_RX += sent_RRG.sum(axis=2)
            most_RX = np.maximum(most_RX, sent_RRG.max(axis=2))
        return sum_RX, most_RX

    def hops(self, transport: str) -> tuple[Hop, ...]:
        """The exchanges of one pattern. Raises ConfigError for a name without a known pattern.

        "transformers" is their own all-to-all. `two_level` on one node, or with one rank on each, is `dedup`.
        """
        if transport in ("all_to_all", TRANSFORMERS):
            return (Hop(self.rows_RR, (INTRA, INTER), transport != TRANSFORMERS, carries=False),)
        one_level = self.nodes.count == 1 or (self.nodes.regular and self.nodes.per_node == 1)
        if transport == "dedup" or (transport == "two_level" and one_level):
            return (Hop(self.tokens_RR, (INTRA, INTER), wired=True, carries=True),)
        if transport == "two_level" and self.nodes.regular:
            return self._two_level
        raise ConfigError(
            f"{transport!r} has no known traffic on nodes {self.nodes.node_R.tolist()}; choose all_to_all, dedup, "
            "or two_level where all nodes hold as many ranks",
            setting="transport",
        )

    @cached_property
    def _two_level(self) -> tuple[Hop, ...]:
        """Along the rails to a node's rank at the source's own place, from there to the ranks that compute."""
        ranks, rank_NM = self.nodes.ranks, self.nodes.rank_GM
        rail_RR, fan_RR = np.zeros((2, ranks, ranks))
        # Row s: the rank at s's place of every node.
        rail_RR[np.arange(ranks)[:, None], rank_NM.T[self.nodes.local_R]] = self.tokens_RN
        flat = rank_NM.ravel()
        by_place = self.tokens_RR[np.ix_(flat, flat)].reshape(*rank_NM.shape, *rank_NM.shape)
        # What arrived at place i of node n, from place i of every node, for place j: (N, M, M).
        fan_NMM = by_place.sum(axis=0).transpose(1, 0, 2)
        fan_RR[rank_NM[:, :, None], rank_NM[:, None, :]] = fan_NMM
        return Hop(rail_RR, (INTER,), wired=True, carries=True), Hop(
            fan_RR, (INTRA,), wired=False, carries=True
        )

    @cached_property
    def copies_RR(self) -> FloatArray:
        """Guests: experts that home h lends to host d."""
        lent_RR = np.zeros((self.nodes.ranks, self.nodes.ranks))
        host_I, expert_I = np.nonzero(self.plan.guest_RE)
        np.add.at(lent_RR, (self.plan.homes.rank_E[expert_I], host_I), 1)
        return lent_RR


def distinct(
    rows_RX: FloatArray, most_RX: FloatArray, tokens_R: FloatArray, top_k: int, experts: int
) -> FloatArray:
    """Expected tokens of each source with at least one of their K distinct experts at a destination.

    rows_RX: rows there; most_RX: those of the expert with most. A token draws experts one by one without replacement.
    A draw misses the destination with probability 1 - q / K at first, q rows a token being there; after j misses only
    E - j of E experts are left, and the destination's part of them is that much larger. Equally popular experts make
    this the hypergeometric distribution exactly. Popularity is not equal, so the result is kept within what any
    routing allows: at least the rows of the hottest expert (a token picks it once) and rows / K; at most all rows,
    and all tokens. Tokens that prefer experts of one rank together are fewer than this.
    """
    share_RX = rows_RX / np.maximum(tokens_R, 1e-9)[:, None] / top_k
    left_K = experts / (experts - np.arange(top_k))
    missed_RX = np.maximum(1.0 - share_RX[..., None] * left_K, 0.0).prod(axis=-1)
    least_RX = np.maximum(most_RX, rows_RX / top_k)
    most_tokens_RX = np.minimum(rows_RX, tokens_R[:, None])
    return np.clip(tokens_R[:, None] * (1.0 - missed_RX), least_RX, most_tokens_RX)
