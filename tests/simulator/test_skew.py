"""The skew of ranks from popularity alone: against arithmetic, against recorded traces, by every planner."""

from pathlib import Path

import numpy as np
import pytest

from anabranch.errors import ConfigError
from anabranch.placement.policy import PLANNERS
from anabranch.simulator.histogram import (
    Histogram,
    histogram_of,
    natural_histogram,
    read_histogram,
    trace_histogram,
)
from anabranch.simulator.skew import Group, Policy, place, rank_skew
from anabranch.workload import trace

NATURAL = Path(trace.__file__).parent / "natural_tiny.npz"


def one_layer(counts: list[int] | list[float]) -> Histogram:
    return histogram_of(np.array([counts]), np.zeros(1, dtype=np.int64), "test")


def test_static_skew_is_that_of_the_histogram() -> None:
    # Half of all rows go to one of eight experts: its rank of four has 1/2 + 1/14 of them, over 1/4.
    hot = one_layer([7, 1, 1, 1, 1, 1, 1, 1])
    skew = rank_skew([1, 4], experts=8, top_k=1, tokens=4096, histogram=hot)
    assert skew == {1: 1.0, 4: pytest.approx(4 * (1 / 2 + 1 / 14), rel=0.02)}


def test_a_token_picks_no_expert_twice() -> None:
    # All of the weight on one expert, yet it can have but one of a token's four rows.
    skew = rank_skew([4], experts=8, top_k=4, tokens=4096, histogram=one_layer([1, 0, 0, 0, 0, 0, 0, 0]))
    assert skew[4] == pytest.approx(4 * (1 / 4 + 3 / 4 / 7), rel=0.02)


def test_the_skew_of_a_trace_is_the_recorded_one() -> None:
    """Its histogram alone, drawn anew, against its own counts at the ranks it was recorded on."""
    recorded = trace.load_trace(NATURAL)
    group = Group(
        recorded.metadata["ranks"], recorded.metadata["tokens_per_rank"], recorded.metadata["top_k"]
    )
    placed = place(trace_histogram(NATURAL), group, Policy(), draws=3)
    for layer, told in zip(placed, recorded.summary(), strict=True):
        assert layer.max_mean == pytest.approx(told.mean_max_mean, rel=0.01)


@pytest.mark.parametrize("name", PLANNERS)
def test_every_planner_keeps_all_rows_and_never_loads_more(name: str) -> None:
    popularity, group = natural_histogram(32), Group(8, 512, 8)
    for layer, at_home in zip(
        place(popularity, group, Policy(name, slots=4)), place(popularity, group, Policy()), strict=True
    ):
        assert (layer.rows_DR.sum(axis=1) == 8 * 512 * 8).all()
        assert (layer.rows_DR.max(axis=1) <= at_home.rows_DR.max(axis=1)).all()
        for plan, other in zip(layer.plans, at_home.plans, strict=True):
            assert name == "periodic_replication" or np.array_equal(plan.counts_RE, other.counts_RE)
        assert (layer.guests == 0) == (name == "static")
        assert layer.lent <= layer.guests


def test_exact_is_even_and_bounded_within_its_cap() -> None:
    popularity, group = natural_histogram(32), Group(4, 1024, 8)
    assert all(layer.max_mean < 1.001 for layer in place(popularity, group, Policy("exact")))
    bounded = place(popularity, group, Policy("bounded", epsilon=0.1, slots=8))
    assert all(layer.max_mean <= 1.1 + 1e-3 for layer in bounded)


def test_even_popularity_leaves_the_noise_of_sampling() -> None:
    skew = rank_skew([8], experts=64, top_k=8, tokens=2048, histogram=one_layer([0.5] * 64))[8]
    assert 1.0 < skew < 1.02


def test_as_many_rows_as_were_counted_have_the_loads_that_were_counted() -> None:
    counts = [700, 100, 50, 0, 150, 24, 0, 0]
    twice = [rows * 2 for rows in counts]
    for ranks, wanted in ((4, counts), (8, twice)):
        (layer,) = place(one_layer(counts), Group(ranks, 256, 1), Policy(), draws=2)
        for plan in layer.plans:
            assert plan.counts_RE.sum(axis=0).tolist() == wanted
            assert (plan.counts_RE.sum(axis=1) == 256).all()
        assert not np.array_equal(*(plan.counts_RE for plan in layer.plans))


@pytest.mark.parametrize(("rows", "tokens"), [(10**9, 1 << 20), (3, 1 << 28), (10**12, 64)])
def test_any_number_of_rows_can_be_counted_and_drawn(rows: int, tokens: int) -> None:
    (layer,) = place(one_layer([rows] * 8), Group(8, tokens, 1), Policy(), draws=1)
    assert layer.rows_DR.sum() == 8 * tokens


def test_fewer_rows_than_were_counted_vary_less_than_if_they_were_put_back() -> None:
    half, popular = [512] * 8, [0.125] * 8
    spread = [
        np.std(
            [plan.rows_R for plan in place(one_layer(rows), Group(4, 512, 1), Policy(), draws=64)[0].plans]
        )
        for rows in (half, popular)
    ]
    assert 0.5 < spread[0] / spread[1] < 0.9  # the square root of 1 - 2048 / 4096


def test_homes_that_follow_the_load_need_no_guests() -> None:
    popularity, group = natural_histogram(32), Group(8, 512, 8)
    layers = zip(*(place(popularity, group, Policy(name)) for name in ("rehome", "static")), strict=True)
    for moved, stayed in layers:
        assert moved.guests == stayed.moved == 0 < moved.moved
        assert moved.max_mean < stayed.max_mean
        assert all(
            np.array_equal(a.counts_RE, b.counts_RE) for a, b in zip(moved.plans, stayed.plans, strict=True)
        )


def test_resampling_keeps_unevenness() -> None:
    few = trace_histogram(NATURAL)
    many = few.resampled(128)
    assert few.resampled(16) is few
    assert many.share_NE.shape == (12, 128)
    assert many.share_NE.sum(axis=1) == pytest.approx(1.0)
    assert "resampled from 16 to 128" in many.source
    over_mean = [(h.share_NE * h.experts).std(axis=1) for h in (few, many, many.resampled(16))]
    assert over_mean[1] == pytest.approx(over_mean[0], rel=0.1)
    assert over_mean[2] == pytest.approx(over_mean[0], rel=0.1)


def test_equal_arguments_give_equal_skew() -> None:
    sizes = {"experts": 64, "top_k": 8, "tokens": 256}
    assert rank_skew([8], **sizes) == rank_skew([8], **sizes)


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("{", "histogram"),
        ("[]", "histogram"),
        ("[1, -2]", r"histogram\[0\]\[1\]"),
        ("[[1, 2], [3, true]]", r"histogram\[1\]\[1\]"),
        ("[[1, 2], [3]]", r"histogram\[1\]"),
        ("[0, 0]", "histogram"),
    ],
)
def test_a_malformed_histogram_is_one_clear_error(tmp_path: Path, text: str, place: str) -> None:
    file = tmp_path / "counts.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match=f"^{place}: "):
        read_histogram(file)


def test_histograms_are_read_from_json_and_traces(tmp_path: Path) -> None:
    file = tmp_path / "counts.json"
    file.write_text("[[1, 3], [2, 2]]")
    assert read_histogram(file).share_NE.tolist() == [[0.25, 0.75], [0.5, 0.5]]
    assert read_histogram(NATURAL).layers == [0, 1, 2, 3]
