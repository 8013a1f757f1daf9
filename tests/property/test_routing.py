"""The stress workloads keep their promises for any sizes, skew, step and seed."""

import numpy as np
from hypothesis import assume, given
from hypothesis import strategies as st

from anabranch.errors import ConfigError
from anabranch.workload.routing import (
    WORKLOADS,
    find_workload,
    reachable_max_mean,
    routing_counts,
    routing_ids,
)
from anabranch.workload.scene import contiguous_max_mean


@st.composite
def routings(draw, codes=tuple(WORKLOADS)):
    """(name, keyword arguments, whether max_mean binds) of a routing that can be had."""
    name = draw(st.sampled_from(codes))
    experts = draw(st.integers(1, 40))
    sizes = {
        "ranks": draw(st.integers(1, 9)),
        "experts": experts,
        "tokens": draw(st.integers(1, 60)),
        "top_k": draw(st.integers(1, min(experts, 8))),
        "step": draw(st.integers(0, 9)),
        "seed": draw(st.integers(0, 2**40)),
    }
    try:
        low, high = reachable_max_mean(name, **sizes)
    except ConfigError as refused:
        assume(refused.setting != "top_k")  # a silent rank can leave too few experts
        raise
    max_mean = low + draw(st.floats(0, 1)) * (high - low)
    return name, {**sizes, "max_mean": max_mean}


@given(routings())
def test_sources_route_all_their_rows_and_at_most_one_a_token_to_an_expert(routing):
    name, asked = routing
    counts_RE = routing_counts(name, **asked)
    assert counts_RE.shape == (asked["ranks"], asked["experts"])
    assert counts_RE.dtype == np.int64
    assert counts_RE.min() >= 0
    rows_R = counts_RE.sum(axis=1)
    assert rows_R.sum() == asked["ranks"] * asked["tokens"] * asked["top_k"]
    assert (rows_R % asked["top_k"] == 0).all()
    assert (counts_RE <= rows_R[:, None] // asked["top_k"]).all()
    if name != "W4":
        assert (rows_R == asked["tokens"] * asked["top_k"]).all()


@given(routings())
def test_max_mean_is_met_within_two_percent_or_one_row(routing):
    name, asked = routing
    got = contiguous_max_mean(routing_counts(name, **asked).sum(axis=0), asked["ranks"])
    one_row = 1 / (asked["tokens"] * asked["top_k"])
    assert abs(got - asked["max_mean"]) <= max(0.02 * asked["max_mean"], one_row) + 1e-9


@given(routings())
def test_ids_are_distinct_in_a_token_and_add_up_to_the_counts(routing):
    name, asked = routing
    counts_RE = routing_counts(name, **asked)
    ids_RSK = routing_ids(name, **asked)
    assert len(ids_RSK) == asked["ranks"]
    for ids_SK, counts_E in zip(ids_RSK, counts_RE, strict=True):
        assert ids_SK.shape[1] == asked["top_k"]
        assert (np.diff(np.sort(ids_SK, axis=1), axis=1) > 0).all()
        # bincount would fail on a negative id and grow on one past the last expert.
        assert np.array_equal(np.bincount(ids_SK.ravel(), minlength=asked["experts"]), counts_E)


@given(routings())
def test_the_same_arguments_give_the_same_routing(routing):
    name, asked = routing
    assert np.array_equal(routing_counts(name, **asked), routing_counts(find_workload(name).name, **asked))
    for once, again in zip(routing_ids(name, **asked), routing_ids(name, **asked), strict=True):
        assert np.array_equal(once, again)


@given(routings())
def test_a_max_mean_past_the_reach_is_refused_with_the_reach(routing):
    name, asked = routing
    assume(find_workload(name).families is not WORKLOADS["W0"].families)
    assume(name != "W7" or asked["step"] % 4 == 3)
    sizes = {key: value for key, value in asked.items() if key != "max_mean"}
    _, high = reachable_max_mean(name, **sizes)
    try:
        routing_counts(name, **sizes, max_mean=1.05 * high)
    except ConfigError as refused:
        assert refused.setting == "max_mean"
        assert f"{high:.3f}" in str(refused)
    else:
        raise AssertionError("a max_mean out of reach was accepted")


@given(routings(codes=("W6",)), st.integers(1, 5))
def test_the_hot_set_of_w6_moves_with_the_step(routing, steps):
    name, asked = routing
    ranks, slots = asked["ranks"], -(-asked["experts"] // asked["ranks"])
    full_ranks = asked["experts"] // slots
    sizes = {key: value for key, value in asked.items() if key != "max_mean"}
    low, high = reachable_max_mean(name, **sizes)
    assume(steps % full_ranks and high - low > 0.4 and asked["tokens"] * asked["top_k"] >= 20)
    asked = {**asked, "max_mean": (low + high) / 2}
    later = {**asked, "step": asked["step"] + steps}
    home_E = np.arange(asked["experts"]) // slots

    def fullest_rank(**arguments):
        load_E = routing_counts(name, **arguments).sum(axis=0)
        return np.bincount(home_E, load_E, minlength=ranks).argmax()

    assert fullest_rank(**asked) != fullest_rank(**later)
