"""What every planner promises, on any counts. R ranks, E experts, L home slots a rank, N micro-batches."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from anabranch.placement.base import Homes, IntArray, Planner
from anabranch.placement.bounded import BoundedPlanner
from anabranch.placement.exact import ExactPlanner
from anabranch.placement.least_loaded import LeastLoadedPlanner
from anabranch.placement.load import load_of
from anabranch.placement.periodic_replication import PeriodicReplicationPlanner
from anabranch.placement.static import StaticPlanner

Case = tuple[list[IntArray], Homes]

BUILDERS: dict[str, Callable[[], Planner]] = {
    "static": StaticPlanner,
    "exact": ExactPlanner,
    "bounded": BoundedPlanner,
    "bounded tight": lambda: BoundedPlanner(epsilon=0.0, slots=1),
    "bounded loose": lambda: BoundedPlanner(epsilon=0.3, slots=4, min_rows=7),
    "least_loaded": LeastLoadedPlanner,
    "least_loaded eager": lambda: LeastLoadedPlanner(alpha=1.0, min_chunk_rows=1, threshold=1.0),
    "least_loaded chunky": lambda: LeastLoadedPlanner(alpha=1.1, min_chunk_rows=20, threshold=1.0),
    "periodic": lambda: PeriodicReplicationPlanner(slots=1, period=1, window=2),
    "periodic slow": lambda: PeriodicReplicationPlanner(slots=3, period=2, window=1),
}
every_planner = pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS.keys())


def _homes(experts: int, ranks: int, order: list[int]) -> Homes:
    """Equal slots a rank, the experts dealt to them in `order`."""
    flat = Homes.contiguous(experts, ranks)
    rank_E, slot_E = np.empty_like(flat.rank_E), np.empty_like(flat.slot_E)
    rank_E[order], slot_E[order] = flat.rank_E, flat.slot_E
    return Homes(rank_E, slot_E, ranks)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Three micro-batches (a planner may remember) of small, huge or no load, on any equal-slot homes."""
    ranks, experts = draw(st.integers(1, 6)), draw(st.integers(1, 9))
    homes = _homes(experts, ranks, draw(st.permutations(range(experts))))
    some_rows = st.one_of(st.just(0), st.integers(0, 9), st.integers(0, 300), st.integers(0, 10**9))
    counts = st.lists(some_rows, min_size=ranks * experts, max_size=ranks * experts)
    batches = draw(st.lists(counts, min_size=3, max_size=3))
    return [np.array(batch, dtype=np.int64).reshape(ranks, experts) for batch in batches], homes


def _one_expert(ranks: int, experts: int, rows: int) -> Case:
    counts_RE = np.zeros((ranks, experts), dtype=np.int64)
    counts_RE[:, experts // 2] = rows
    return [counts_RE] * 3, Homes.contiguous(experts, ranks)


def _hot_rank(ranks: int, experts: int) -> Case:
    counts_RE = np.ones((ranks, experts), dtype=np.int64)
    homes = Homes.contiguous(experts, ranks)
    counts_RE[:, homes.rank_E == ranks - 1] = 50
    return [counts_RE] * 3, homes


def _empty_ranks() -> Case:
    counts_RE = np.zeros((5, 10), dtype=np.int64)
    counts_RE[2] = [0, 0, 40, 3, 0, 0, 7, 900, 0, 1]
    return [counts_RE] * 3, Homes.contiguous(10, 5)


ADVERSARIAL = (
    _one_expert(4, 8, 1000),  # all rows to one expert
    _one_expert(7, 3, 11),  # fewer experts than ranks
    _one_expert(3, 8, 0),  # no tokens at all
    _one_expert(1, 5, 9),  # a single rank
    _one_expert(5, 1, 13),  # a single expert
    _hot_rank(4, 10),  # E is no multiple of R, the last rank is short and hot
    _hot_rank(2, 14),
    _empty_ranks(),
)


def adversarial(**others: float) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The inputs that planners get wrong: always tried, with `others`, whatever hypothesis draws."""

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        for case in ADVERSARIAL:
            test = example(case=case, **others)(test)
        return test

    return decorate


@every_planner
@adversarial()
@given(case=cases())
def test_keeps_every_row_and_its_own_limits(build, case):
    batches, homes = case
    planner = build()
    for counts_RE in batches:
        plan = planner.plan(counts_RE, homes)
        assert plan.quota_RE.dtype == np.int64
        assert plan.quota_RE.shape == counts_RE.shape
        assert plan.quota_RE.min() >= 0
        np.testing.assert_array_equal(plan.quota_RE.sum(axis=0), counts_RE.sum(axis=0))
        assert plan.rows_R.max() <= plan.home_rows_R.max(), "worse than static"
        assert plan.guest_RE.sum(axis=1).max() <= planner.slots_needed(homes)
        assert plan.counts_RE is counts_RE
        assert plan.homes is homes


@every_planner
@adversarial()
@given(case=cases())
def test_equal_histories_give_equal_plans(build, case):
    batches, homes = case
    first, second = build(), build()
    for counts_RE in batches:
        before_RE = counts_RE.copy()
        one, two = first.plan(counts_RE, homes), second.plan(counts_RE.copy(), homes)
        np.testing.assert_array_equal(one.quota_RE, two.quota_RE)
        assert one.cap == two.cap
        np.testing.assert_array_equal(counts_RE, before_RE, "the planner changed its input")


@every_planner
@settings(max_examples=300)
@given(
    ranks=st.integers(1, 7),
    experts=st.integers(1, 20),
    spread=st.sampled_from([2, 3, 10**3, 10**7]),
    seed=st.integers(0, 2**32 - 1),
)
def test_relabelling_ranks_and_experts_relabels_the_plan(build, ranks, experts, spread, seed):
    """Exactly, where ties do not leave the plan open: all experts differ in load, and all ranks.

    With rank r renamed sigma[r] and expert e renamed pi[e], in counts and homes alike, the plan of the
    renamed input is the renamed plan, for the same history of micro-batches. Loads that only meet while
    rows are moved (small numbers see to that) are no ties.
    """
    rng = np.random.default_rng(seed)
    sigma_R, pi_E = rng.permutation(ranks), rng.permutation(experts)
    homes = _homes(experts, ranks, rng.permutation(experts).tolist())
    batches = [_scattered(rng, ranks, experts, spread * experts) for _ in range(3)]
    # A planner may look at one micro-batch, or at the sum of two.
    for counts_RE in (*batches, batches[0] + batches[1], batches[1] + batches[2]):
        load = load_of(counts_RE, homes)
        assume(np.unique(load.expert_rows_E).size == experts)
        assume(np.unique(load.rank_rows_R).size == ranks)
    planner, renamed_planner = build(), build()
    for counts_RE in batches:
        plan = planner.plan(counts_RE, homes)
        renamed = renamed_planner.plan(
            _renamed(counts_RE, sigma_R, pi_E), _renamed_homes(homes, sigma_R, pi_E)
        )
        np.testing.assert_array_equal(renamed.quota_RE, _renamed(plan.quota_RE, sigma_R, pi_E))
        assert renamed.cap == plan.cap


MEMORYLESS = {
    "exact": ExactPlanner(),
    "bounded": BoundedPlanner(epsilon=0.1, slots=1),
    "bounded wide": BoundedPlanner(epsilon=0.3, slots=3, min_rows=3),
    "least_loaded": LeastLoadedPlanner(alpha=1.0, min_chunk_rows=1, threshold=1.0),
    "least_loaded chunky": LeastLoadedPlanner(alpha=1.1, min_chunk_rows=5, threshold=1.0),
}


@pytest.mark.parametrize("planner", MEMORYLESS.values(), ids=MEMORYLESS.keys())
def test_loads_that_meet_on_the_way_do_not_depend_on_labels(planner):
    """The same at its hardest: loads of two digits meet all the time. Too rare for drawn examples."""
    rng = np.random.default_rng(0)
    tried = 0
    for _ in range(3000):
        ranks, slots = int(rng.integers(3, 7)), int(rng.integers(1, 4))
        homes = Homes.contiguous(ranks * slots, ranks)
        counts_RE = np.zeros((ranks, homes.experts), dtype=np.int64)
        counts_RE[0] = rng.choice(30, homes.experts, replace=False)
        sigma_R, pi_E = np.arange(ranks)[::-1], np.arange(homes.experts)[::-1]
        plan = planner.plan(counts_RE, homes)
        if np.unique(plan.home_rows_R).size < ranks:
            continue
        tried += 1
        renamed = planner.plan(_renamed(counts_RE, sigma_R, pi_E), _renamed_homes(homes, sigma_R, pi_E))
        np.testing.assert_array_equal(renamed.quota_RE, _renamed(plan.quota_RE, sigma_R, pi_E))
    assert tried > 1000


def _scattered(rng: np.random.Generator, ranks: int, experts: int, most_rows: int) -> IntArray:
    """Distinct loads, one expert ten times as hot as it would be, each from a few sources."""
    load_E = rng.choice(most_rows, experts, replace=False)
    load_E[0] *= 10
    return np.stack([rng.multinomial(rows, rng.dirichlet(np.ones(ranks))) for rows in load_E], axis=1)


def _renamed_homes(homes: Homes, sigma_R: IntArray, pi_E: IntArray) -> Homes:
    rank_E, slot_E = np.empty_like(homes.rank_E), np.empty_like(homes.slot_E)
    rank_E[pi_E], slot_E[pi_E] = sigma_R[homes.rank_E], homes.slot_E
    return Homes(rank_E, slot_E, homes.ranks)


def _renamed(array_RE: IntArray, sigma_R: IntArray, pi_E: IntArray) -> IntArray:
    renamed_RE = np.empty_like(array_RE)
    renamed_RE[np.ix_(sigma_R, pi_E)] = array_RE
    return renamed_RE


@adversarial()
@given(case=cases())
def test_relabelling_with_ties_keeps_the_rank_loads_of_exact(case):
    """The alias construction compares loads of ranks only, so that ties cannot change the loads it leaves."""
    batches, homes = case
    flipped = Homes(homes.ranks - 1 - homes.rank_E[::-1], homes.slot_E[::-1], homes.ranks)
    for counts_RE in batches:
        plan, mirror = (
            ExactPlanner().plan(counts_RE, homes),
            ExactPlanner().plan(counts_RE[::-1, ::-1], flipped),
        )
        np.testing.assert_array_equal(np.sort(plan.rows_R), np.sort(mirror.rows_R))


@adversarial()
@given(case=cases())
def test_exact_never_exceeds_the_mean_rounded_up(case):
    batches, homes = case
    for counts_RE in batches:
        plan = ExactPlanner().plan(counts_RE, homes)
        assert plan.cap == -(-int(counts_RE.sum()) // homes.ranks)
        assert plan.fits
        assert plan.guest_RE.sum(axis=1).max() <= homes.slots
        trips = plan.guest_RE.any(axis=1).sum()
        assert trips <= max(0, homes.ranks - 1)


@adversarial()
@given(case=cases())
def test_guests_of_a_rank_have_one_home_under_exact(case):
    batches, homes = case
    for counts_RE in batches:
        plan = ExactPlanner().plan(counts_RE, homes)
        for guest_E in plan.guest_RE:
            assert np.unique(homes.rank_E[guest_E]).size <= 1


@adversarial(epsilon=0.0, extra_slots=0)
@given(case=cases(), epsilon=st.sampled_from([0.0, 0.01, 0.05, 0.5, 3.0]), extra_slots=st.integers(0, 2))
def test_bounded_fits_with_a_slot_for_every_home(case, epsilon, extra_slots):
    batches, homes = case
    planner = BoundedPlanner(epsilon, slots=homes.slots + extra_slots)
    for counts_RE in batches:
        plan = planner.plan(counts_RE, homes)
        assert plan.fits
        assert plan.cap >= -(-int(counts_RE.sum()) // homes.ranks)
        assert plan.cap <= (1 + epsilon) * counts_RE.sum() / homes.ranks + 1


@adversarial(epsilon=0.05, min_rows=30)
@given(case=cases(), epsilon=st.sampled_from([0.0, 0.05, 0.5]), min_rows=st.integers(0, 500))
def test_bounded_guests_are_worth_their_weights(case, epsilon, min_rows):
    batches, homes = case
    planner = BoundedPlanner(epsilon, slots=2, min_rows=min_rows)
    for counts_RE in batches:
        plan = planner.plan(counts_RE, homes)
        assert (plan.quota_RE[plan.guest_RE] >= min_rows).all()
        if plan.home_rows_R.max() <= plan.cap:
            assert plan.guests == 0, "did harm"


@adversarial()
@given(case=cases())
def test_least_loaded_with_chunks_of_one_row_meets_its_capacity(case):
    batches, homes = case
    planner = LeastLoadedPlanner(alpha=1.0, min_chunk_rows=1, threshold=1.0)
    for counts_RE in batches:
        assert planner.plan(counts_RE, homes).fits
