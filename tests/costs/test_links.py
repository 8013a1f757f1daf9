import numpy as np
import pytest

from anabranch.costs.links import Busiest, Links
from anabranch.placement.nodes import Nodes

PAIRS = Nodes.of("aabb")
TABLES = {"intra": {0: 1.0, 100: 2.0}, "inter": {0: 3.0, 100: 13.0}}


def test_the_busiest_node_counts_shared_by_its_ranks():
    sent_RR = np.array([[9, 4, 10, 0], [2, 9, 0, 20], [0, 0, 9, 0], [5, 0, 0, 9]], dtype=float)
    # Within the first node 6 rows, between the nodes 30 one way and 5 the other.
    assert Links(TABLES, PAIRS).busiest(sent_RR) == Busiest(intra=3.0, inter=15.0)


def test_receiving_much_is_as_slow_as_sending_much():
    links, rng = Links(TABLES, Nodes.of("aabbcc")), np.random.default_rng(0)
    sent_RR = rng.random((6, 6))
    assert links.busiest(sent_RR) == pytest.approx(links.busiest(sent_RR.T))


def test_nodes_of_different_sizes_share_among_their_own_ranks():
    sent_RR = np.array([[0, 0, 6], [0, 0, 6], [0, 0, 0]], dtype=float)
    assert Links(TABLES, Nodes.of("aab")).busiest(sent_RR) == Busiest(intra=0.0, inter=12.0)


def test_the_slower_class_counts():
    links = Links(TABLES, PAIRS)
    assert links.ms(Busiest(intra=50.0, inter=1.0), 1.0) == pytest.approx(3.1)
    assert links.ms(Busiest(intra=50.0, inter=10.0), 10.0) == pytest.approx(13.0)
    assert links.ms(Busiest(intra=50.0, inter=1.0), 2.0, ("intra",)) == pytest.approx(2.0)


def test_nothing_to_send_takes_the_latency():
    links = Links(TABLES, PAIRS)
    nothing = links.busiest(np.zeros((4, 4)))
    assert links.ms(nothing, 100.0) == 3.0
    assert links.ms(nothing, 100.0, ("intra",)) == 1.0


def test_a_class_without_peers_costs_nothing():
    links = Links({"intra": TABLES["intra"]}, Nodes.single(4))
    assert links.ms(Busiest(100.0, 0.0), 1.0) == 2.0
    assert links.ms(Busiest(100.0, 0.0), 1.0, ("inter",)) == 0.0


def test_one_direction_alone_is_faster_where_directions_take_turns():
    one_way = np.array([[0, 0, 8, 0], [0, 0, 0, 8], [0, 0, 0, 0], [0, 0, 0, 0]], dtype=float)
    for one_way_ms, duplex in (({100: 8.0}, 0.5), ({50: 3.1, 100: 11.0}, 0.8), ({100: 13.0}, 1.0), ({}, 1.0)):
        links = Links(TABLES, PAIRS, one_way_ms)
        assert links.duplex == pytest.approx(duplex)
        assert links.busiest(one_way).inter == pytest.approx(8 * duplex)
        assert links.busiest(one_way + one_way.T).inter == pytest.approx(8)
        # The measured exchange is given back.
        if one_way_ms:
            assert links.ms(links.busiest(one_way * 12.5), 1.0) == pytest.approx(one_way_ms[100])


def test_a_rank_that_sends_alone_is_bounded_by_itself():
    alone = np.zeros((4, 4))
    alone[0, 2] = 8.0
    assert Links(TABLES, PAIRS).busiest(alone).inter == 4.0
    for alone_ms, bound in ((3.0, 4.0), (8.0, 4.0), (10.5, 6.0), (13.0, 8.0), (99.0, 8.0)):
        links = Links(TABLES, PAIRS, alone_ms={"inter": {100: alone_ms}})
        assert links.busiest(alone).inter == pytest.approx(bound)
        assert links.busiest(alone).intra == 0.0
        everyone = np.array([[0, 0, 4, 4], [0, 0, 4, 4], [4, 4, 0, 0], [4, 4, 0, 0]], dtype=float)
        assert links.busiest(everyone).inter == pytest.approx(8.0)
    inside = np.zeros((4, 4))
    inside[0, 1] = inside[0, 0] = 6.0
    assert Links(TABLES, PAIRS, alone_ms={"intra": {100: 2.0}}).busiest(inside).intra == pytest.approx(6.0)


@pytest.mark.parametrize(("ms", "duplex"), [(20.0, 1.0), (0.0, 0.5)])
def test_a_noisy_one_way_sample_stays_within_what_links_do(ms, duplex):
    assert Links(TABLES, PAIRS, {100: ms}).duplex == duplex
    assert Links({"inter": {0: 3.0, 100: 3.0}}, PAIRS, {100: ms}).duplex == 1.0
    assert Links({"intra": TABLES["intra"]}, Nodes.single(2), {100: ms}).duplex == 1.0
