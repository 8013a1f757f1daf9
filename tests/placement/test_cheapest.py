import json

import numpy as np
import pytest

from anabranch.errors import ConfigError
from anabranch.placement.base import Homes
from anabranch.placement.bounded import BoundedPlanner
from anabranch.placement.cheapest import SOONEST, CheapestChoice, candidate_planners
from anabranch.placement.choice import Exchange
from anabranch.placement.exact import ExactPlanner
from anabranch.placement.nodes import Nodes
from anabranch.placement.static import StaticPlanner

HOMES = Homes.contiguous(4, 2)
EVEN = np.array([[10, 10, 10, 10]] * 2)
SKEWED = np.array([[25, 15, 0, 0]] * 2)
FLAT, DEDUP = Exchange("all_to_all"), Exchange("dedup")


class Tariff:
    """A row of the fullest rank costs 1, a guest 5, and each exchange what the test says."""

    def __init__(self, exchange_ms):
        self.exchange_ms = exchange_ms
        self.asked = []

    def call_ms(self, plan, exchange, planner):
        self.asked.append((planner, exchange))
        return float(plan.rows_R.max() + 5 * plan.guests + self.exchange_ms[exchange])

    def guest_rows(self, *, across_nodes):
        return 1000 if across_nodes else 10


class Watched:
    """A planner that counts its plans."""

    def __init__(self, planner):
        self.name, self.inner, self.plans = planner.name, planner, 0

    def plan(self, counts_RE, homes):
        self.plans += 1
        return self.inner.plan(counts_RE, homes)

    def slots_needed(self, homes):
        return self.inner.slots_needed(homes)


def _chooser(tariff, exchanges=(FLAT, DEDUP), **settings):
    planners = {planner.name: Watched(planner) for planner in (StaticPlanner(), ExactPlanner())}
    return CheapestChoice(planners, exchanges, tariff, **settings)


def _reviews(chooser, batches):
    """The calls at which a review took place."""
    seen, at = chooser.review, []
    for call, counts_RE in enumerate(batches):
        chooser.choose(counts_RE, HOMES)
        if chooser.review is not seen:
            at.append(call)
            seen = chooser.review
    return at


def test_the_first_call_takes_the_cheapest():
    chooser = _chooser(Tariff({FLAT: 3, DEDUP: 1}))
    choice = chooser.choose(SKEWED, HOMES)
    assert (choice.planner, choice.exchange) == ("exact", DEDUP)
    assert choice.plan.rows_R.tolist() == [40, 40]
    found = {(c.planner, c.exchange): (c.guests, c.predicted_ms) for c in chooser.review}
    assert found == {
        ("static", FLAT): (0, 83),
        ("static", DEDUP): (0, 81),
        ("exact", FLAT): (1, 48),
        ("exact", DEDUP): (1, 46),
    }


def test_chunks_have_to_be_cheaper_by_more_than_prices_err():
    chunked = Exchange("dedup", 2)
    for gain_ms, wanted in ((1.8, DEDUP), (5.4, chunked)):  # of 60: 3 % and 9 %
        chooser = _chooser(Tariff({DEDUP: 20.0, chunked: 20.0 - gain_ms}), exchanges=(DEDUP, chunked))
        assert chooser.choose(EVEN, HOMES).exchange == wanted
    # A trial takes the doubt away: 3 % are enough then.
    chooser = _chooser(Tariff({DEDUP: 20.0, chunked: 18.2}), exchanges=(DEDUP, chunked))
    tried = chooser.choose(EVEN, HOMES, lambda choice: 58.2 if choice.exchange == chunked else 60.0)
    assert tried.exchange == chunked


def test_what_prices_cannot_tell_apart_is_done_the_simplest_way():
    for dearer_ms, wanted in ((0.5, FLAT), (1.0, DEDUP)):  # of 43: 1.2 % and 2.3 %
        assert _chooser(Tariff({FLAT: 3.0 + dearer_ms, DEDUP: 3.0})).choose(EVEN, HOMES).exchange == wanted
    # `exact` lends a guest here, which costs as much as the rows that stay behind without.
    level = _chooser(Tariff({FLAT: 3}), (FLAT,)).choose(SKEWED, HOMES)
    home = StaticPlanner().plan(SKEWED, HOMES)
    assert level.planner == "exact" and level.plan.guests
    guest_ms = (home.rows_R.max() - level.plan.rows_R.max()) / level.plan.guests

    class DearGuests(Tariff):
        def call_ms(self, plan, exchange, planner):
            return float(plan.rows_R.max() + guest_ms * plan.guests) - (planner == "exact")

    assert _chooser(DearGuests({}), (FLAT,)).choose(SKEWED, HOMES).planner == "static"


def test_a_plan_without_guests_is_priced_once():
    tariff = Tariff({FLAT: 3, DEDUP: 3})
    choice = _chooser(tariff).choose(EVEN, HOMES)
    assert tariff.asked == [("static", FLAT), ("static", DEDUP)]
    assert (choice.planner, choice.exchange) == ("static", FLAT), "of equal prices the first"


def test_between_reviews_only_the_kept_planner_runs():
    chooser = _chooser(Tariff({FLAT: 3, DEDUP: 1}), review_every=8)
    for _ in range(8):
        assert chooser.choose(SKEWED, HOMES).planner == "exact"
    assert (chooser.planners["static"].plans, chooser.planners["exact"].plans) == (1, 8)
    chooser.choose(SKEWED, HOMES)
    assert chooser.planners["static"].plans == 2


def test_the_kept_pair_stays_until_another_is_clearly_cheaper():
    tariff = Tariff({FLAT: 3, DEDUP: 60})
    chooser = _chooser(tariff, hysteresis=0.05, review_every=1)
    assert chooser.choose(EVEN, HOMES).exchange == FLAT  # 43 ms
    tariff.exchange_ms[DEDUP] = 1  # 41 ms: cheaper by less than 5 %
    assert chooser.choose(EVEN, HOMES).exchange == FLAT
    tariff.exchange_ms[DEDUP] = 0
    assert chooser.choose(EVEN, HOMES).exchange == DEDUP
    tariff.exchange_ms[DEDUP] = 2
    assert chooser.choose(EVEN, HOMES).exchange == DEDUP


def test_a_kept_planner_without_guests_at_the_moment_is_kept():
    tariff = Tariff({FLAT: 3, DEDUP: 1})
    chooser = _chooser(tariff, review_every=1)
    assert chooser.choose(SKEWED, HOMES).planner == "exact"
    assert chooser.choose(EVEN, HOMES).planner == "exact"
    assert ("exact", DEDUP) in [(c.planner, c.exchange) for c in chooser.review]


def test_reviews_come_regularly_on_a_steady_load():
    assert _reviews(_chooser(Tariff({FLAT: 3, DEDUP: 1}), review_every=4), [SKEWED] * 13) == [0, 4, 8, 12]


def test_a_load_that_moves_is_reviewed_early():
    # Max/mean 1.05 and 1.3.
    near, far = np.array([[11, 10, 9, 10]] * 2), np.array([[13, 13, 7, 7]] * 2)
    chooser = _chooser(Tariff({FLAT: 3, DEDUP: 1}))
    assert _reviews(chooser, [EVEN, near, near, near, far, far]) == [0, 4]
    assert _reviews(_chooser(Tariff({FLAT: 3, DEDUP: 1})), [EVEN, far, far]) == [0, SOONEST]


def test_bursts_that_change_nothing_are_reviewed_ever_more_rarely():
    """Balanced but for every fourth call; `exact` is kept from the first burst on."""
    batches = [SKEWED if call % 4 == 3 else EVEN for call in range(100)]
    chooser = _chooser(Tariff({FLAT: 3, DEDUP: 1}), review_every=16)
    at = _reviews(chooser, batches)
    assert chooser.choose(EVEN, HOMES).planner == "exact"
    gaps = np.diff(at)
    assert gaps.max() == 16
    assert (gaps[-4:] == 16).all()
    assert len(at) <= 10


def test_equal_histories_choose_alike():
    rng = np.random.default_rng(0)
    batches = [rng.integers(0, 40, (2, 4)) for _ in range(60)]
    one, two = (_chooser(Tariff({FLAT: 3, DEDUP: 2}), review_every=5) for _ in range(2))
    for counts_RE in batches:
        a, b = one.choose(counts_RE, HOMES), two.choose(counts_RE.copy(), HOMES)
        assert a[1:] == b[1:]
        np.testing.assert_array_equal(a.plan.quota_RE, b.plan.quota_RE)
        assert one.review == two.review


def test_no_load_at_all_is_no_reason_to_stop():
    nothing = np.zeros_like(EVEN)
    chooser = _chooser(Tariff({FLAT: 3, DEDUP: 1}))
    for counts_RE in (nothing, SKEWED, nothing, nothing):
        np.testing.assert_array_equal(chooser.choose(counts_RE, HOMES).plan.rows_R.sum(), counts_RE.sum())


def test_slots_suffice_for_every_planner():
    planners = {"bounded": BoundedPlanner(slots=1), "exact": ExactPlanner()}
    assert CheapestChoice(planners, [FLAT], Tariff({FLAT: 0})).slots_needed(HOMES) == 2


@pytest.mark.parametrize(
    ("setting", "change"),
    [
        ("planners", {"planners": {}}),
        ("exchanges", {"exchanges": ()}),
        ("hysteresis", {"hysteresis": -0.1}),
        ("review_every", {"review_every": 0}),
    ],
)
def test_bad_settings_are_named(setting, change):
    settings = {"planners": {"static": StaticPlanner()}, "exchanges": [FLAT], "prices": Tariff({FLAT: 0})}
    with pytest.raises(ConfigError, match=f"^{setting}: "):
        CheapestChoice(**{**settings, **change})


@pytest.mark.parametrize(
    ("names", "planners", "least"),
    [
        ("aaaa", ["static", "bounded", "exact"], {"bounded": 10}),
        ("abcd", ["static", "bounded", "exact"], {"bounded": 1000}),
        (
            "aabb",
            ["static", "bounded_within_node", "exact_within_node", "bounded", "exact"],
            {"bounded_within_node": 10, "bounded": 1000},
        ),
    ],
)
def test_the_planners_worth_pricing(names, planners, least):
    found = candidate_planners(Tariff({}), Nodes.of(names), 0.1, 3)
    assert list(found) == planners
    for name, rows in least.items():
        bounded = getattr(found[name], "inner", found[name])
        assert (bounded.min_rows, bounded.epsilon, bounded.slots) == (rows, 0.1, 3)
    unpriced = candidate_planners(None, Nodes.of(names), 0.1, 3)
    assert list(unpriced) == planners
    assert unpriced["bounded"].min_rows == 0


def test_a_restored_choice_goes_on_as_the_first_would_have():
    batches = [SKEWED, SKEWED, EVEN, SKEWED, EVEN, EVEN, SKEWED, EVEN] * 4
    whole = _chooser(Tariff({FLAT: 3, DEDUP: 2}), review_every=5)
    chosen = [whole.choose(counts_RE, HOMES)[1:] for counts_RE in batches]
    for stop in range(1, len(batches)):
        first, second = (_chooser(Tariff({FLAT: 3, DEDUP: 2}), review_every=5) for _ in range(2))
        for counts_RE in batches[:stop]:
            first.choose(counts_RE, HOMES)
        second.restore(json.loads(json.dumps(first.state())))
        assert [second.choose(counts_RE, HOMES)[1:] for counts_RE in batches[stop:]] == chosen[stop:]


def test_a_choice_that_is_no_longer_offered_is_forgotten():
    first = _chooser(Tariff({FLAT: 3, DEDUP: 1}))
    first.choose(SKEWED, HOMES)
    alone = _chooser(Tariff({FLAT: 3}), exchanges=(FLAT,))
    alone.restore(first.state())
    alone.restore(_chooser(Tariff({})).state())
    assert alone.choose(SKEWED, HOMES).exchange == FLAT
