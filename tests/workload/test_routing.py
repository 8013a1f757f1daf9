"""What sets each named workload apart, and what it refuses."""

import numpy as np
import pytest

from anabranch.errors import ConfigError
from anabranch.workload.routing import (
    BURST_EVERY,
    WORKLOADS,
    find_workload,
    reachable_max_mean,
    routing_counts,
    routing_ids,
)
from anabranch.workload.scene import contiguous_max_mean

SIZES = {"ranks": 4, "experts": 64, "tokens": 4096, "top_k": 8}
BURST = {"step": BURST_EVERY - 1}


def popularity_E(name, **changes):
    """Rows of each expert over the mean, under SIZES at max/mean 1.6."""
    load_E = routing_counts(name, **{**SIZES, "max_mean": 1.6, **changes}).sum(axis=0)
    return load_E / load_E.mean()


def rank_load_R(load_E):
    return load_E.reshape(SIZES["ranks"], -1).mean(axis=1)


def test_the_registry_names_eight_workloads_by_code_and_by_name():
    assert list(WORKLOADS) == [f"W{n}" for n in range(8)]
    for code, workload in WORKLOADS.items():
        assert workload.code == code
        assert find_workload(workload.name) is workload


def test_balanced_is_even_per_expert_and_per_rank_whatever_max_mean_says():
    counts_RE = routing_counts("W0", **SIZES, max_mean=3.0)
    assert (counts_RE == 512).all()


def test_balanced_spreads_what_does_not_divide_over_the_ranks():
    counts_RE = routing_counts("W0", ranks=4, experts=12, tokens=5, top_k=2, max_mean=1.0)
    load_E = counts_RE.sum(axis=0)
    assert np.ptp(counts_RE) <= 1
    assert np.ptp(load_E) == 1
    assert (load_E.reshape(4, 3).sum(axis=1) == 10).all()


def test_hot_set_is_few_experts_of_one_rank():
    load_E = popularity_E("W1")
    hot = np.flatnonzero(load_E > 1.5)
    assert hot.size == 4
    assert np.unique(hot // 16).size == 1
    assert np.ptp(np.delete(load_E, hot)) < 0.01


def test_hot_rank_is_every_expert_of_one_rank():
    load_R = rank_load_R(popularity_E("W2"))
    assert sorted(np.round(load_R, 2)) == [0.8, 0.8, 0.8, 1.6]
    assert popularity_E("W2").max() < 1.61


def test_spread_falls_over_all_experts():
    falling_E = np.sort(popularity_E("W3"))[::-1]
    assert falling_E[0] > 3
    assert np.unique(falling_E).size > 50
    assert falling_E[-1] > 0


def test_ragged_sources_differ_in_tokens_and_in_mix():
    counts_RE = routing_counts("W4", **SIZES, max_mean=1.6)
    tokens_R = counts_RE.sum(axis=1) // 8
    assert tokens_R.sum() == 4 * 4096
    assert tokens_R.max() == 7 * tokens_R.min()
    favourite_R = (counts_RE / tokens_R[:, None]).argmax(axis=1)
    assert np.unique(favourite_R).size > 1
    assert [len(ids_SK) for ids_SK in routing_ids("W4", **SIZES, max_mean=1.6)] == tokens_R.tolist()


def test_zero_load_silences_one_rank_and_some_experts_of_the_others():
    load_E = popularity_E("W5")
    silent_R = (load_E.reshape(4, 16) == 0).sum(axis=1)
    assert sorted(silent_R) == [4, 4, 4, 16]


def test_rotating_is_a_hot_set_that_moves_on_by_a_rank_each_step():
    ranks = [int(rank_load_R(popularity_E("W6", step=step)).argmax()) for step in range(5)]
    assert (np.diff(ranks) % 4 == 1).all()
    assert (popularity_E("W6") > 1.5).sum() == 4


def test_rotating_also_moves_on_one_rank():
    hot = [routing_counts("W6", ranks=1, experts=16, tokens=32, top_k=2, max_mean=1, step=s) for s in (0, 1)]
    assert hot[0].argmax() != hot[1].argmax()


def test_burst_is_balanced_until_one_expert_is_in_most_tokens():
    for step in range(BURST_EVERY - 1):
        assert (routing_counts("W7", **SIZES, max_mean=1.3, step=step) == 512).all()
    load_E = routing_counts("W7", **SIZES, max_mean=1.3, **BURST).sum(axis=0)
    assert (load_E > load_E.mean()).sum() == 1
    assert load_E.max() > 0.8 * 4 * 4096


def test_the_hot_experts_stay_from_step_to_step_while_the_tokens_change():
    first, second = (routing_counts("W1", **SIZES, max_mean=1.6, step=step) for step in (0, 1))
    assert not np.array_equal(first, second)
    assert set(np.argsort(first.sum(axis=0))[-4:]) == set(np.argsort(second.sum(axis=0))[-4:])


def test_source_ranks_have_preferences_that_cancel_out():
    counts_RE = routing_counts("W1", **SIZES, max_mean=1.6)
    load_E = counts_RE.sum(axis=0)
    assert (np.ptp(counts_RE, axis=0) > 0.05 * counts_RE.mean(axis=0)).sum() > 32
    assert contiguous_max_mean(load_E, 4) == pytest.approx(1.6, abs=1e-4)


def test_experts_occur_together_in_many_combinations():
    ids_SK = routing_ids("W1", **SIZES, max_mean=1.6)[0]
    together_EE = np.zeros((64, 64), dtype=bool)
    for column in range(1, 8):
        together_EE[ids_SK, np.roll(ids_SK, column, axis=1)] = True
    assert together_EE.sum() == 64 * 63


@pytest.mark.parametrize("name", ["W1", "W2", "W6"])
def test_a_rank_cannot_take_more_than_every_token_once_per_expert(name):
    # Two experts a rank of eight a token: the fullest rank takes a quarter of the rows, of 8 ranks.
    sizes = {"ranks": 8, "experts": 16, "tokens": 64, "top_k": 8}
    assert reachable_max_mean(name, **sizes) == pytest.approx((1.0, 2.0))
    assert routing_counts(name, **sizes, max_mean=2.0).max() == 64
    with pytest.raises(ConfigError, match=r"^max_mean: 3 is out of reach .* from 1\.000 to 2\.000$"):
        routing_counts(name, **sizes, max_mean=3.0)


def test_a_max_mean_below_one_is_refused():
    with pytest.raises(ConfigError, match=r"max_mean: 0\.9 is out of reach of W1"):
        routing_counts("W1", **SIZES, max_mean=0.9)


def test_balanced_reaches_what_contiguous_homes_leave_it():
    assert reachable_max_mean("W0", ranks=4, experts=6, tokens=8, top_k=2) == pytest.approx((4 / 3, 4 / 3))


@pytest.mark.parametrize(
    ("changes", "setting"),
    [
        ({"ranks": 0}, "ranks"),
        ({"experts": 0}, "experts"),
        ({"tokens": 0}, "tokens"),
        ({"top_k": 0}, "top_k"),
        ({"top_k": 65}, "top_k"),
        ({"step": -1}, "step"),
        ({"seed": -1}, "seed"),
    ],
)
def test_impossible_sizes_name_their_setting(changes, setting):
    with pytest.raises(ConfigError) as refused:
        routing_counts("W1", **{**SIZES, "max_mean": 1.5, **changes})
    assert refused.value.setting == setting


def test_zero_load_needs_enough_experts_beside_the_silent_rank():
    with pytest.raises(ConfigError, match="top_k: zero_load silences one rank of 2 and leaves too few of 4"):
        routing_counts("W5", ranks=2, experts=4, tokens=8, top_k=3, max_mean=1.5)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"workload: no workload is called 'W9'.*W7 \(burst\)"):
        routing_counts("W9", **SIZES, max_mean=1.5)
