"""The cluster benchmark: what it routes, what it compares, and the verdict; a real one where a lab can be."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from anabranch.cli.cluster_book import Book, code_version
from anabranch.cli.cluster_cases import NATURAL, ClusterCases, workload_names
from anabranch.cli.cluster_contest import Record, next_round
from anabranch.cli.cluster_grid import full_grid, quick_grid
from anabranch.cli.cluster_rows import AUTO, IDEAL, TRANSFORMERS, Policy, policies
from anabranch.cli.cluster_verdict import verdict
from anabranch.cli.main import app
from anabranch.errors import ConfigError
from anabranch.lab.kernel import available
from anabranch.placement.choice import Exchange
from anabranch.placement.nodes import Nodes
from anabranch.transport.choose import candidate_exchanges
from anabranch.workload.trace import natural_trace

CASES = ClusterCases(4, 32, 8, 64, 2, 2.0, str(natural_trace("tiny8")))


@pytest.mark.parametrize("workload", workload_names())
def test_every_workload_routes_its_tokens_to_distinct_experts(workload):
    for step in (31, 35):
        layers = CASES.ids(workload, step)
        assert len(layers) == CASES.layers
        for by_rank, counts_RE in zip(layers, CASES.counts(layers), strict=True):
            assert sum(len(ids_SK) for ids_SK in by_rank) == 4 * 64
            for ids_SK in by_rank:
                assert ids_SK.shape[1] == 8
                assert (np.diff(np.sort(ids_SK, axis=1), axis=1) > 0).all()
            assert counts_RE.sum() == 4 * 64 * 8
        # A rank has one number of tokens in a micro-batch, whatever the layer.
        sizes = [[len(ids_SK) for ids_SK in by_rank] for by_rank in layers]
        assert all(of_layer == sizes[0] for of_layer in sizes)


def test_stress_is_as_skewed_as_asked_and_layers_differ():
    assert CASES.max_mean_of(CASES.counts(CASES.ids("W2", 32))) == pytest.approx(2.0, abs=0.04)
    assert CASES.max_mean_of(CASES.counts(CASES.ids("W0", 32))) == pytest.approx(1.0, abs=0.01)
    first, second = CASES.counts(CASES.ids("W2", 32))
    assert (first != second).any()
    assert 1.0 < CASES.max_mean_of(CASES.counts(CASES.ids(NATURAL, 32))) < 3.0
    assert (CASES.counts(CASES.ids(NATURAL, 32))[0] != CASES.counts(CASES.ids(NATURAL, 33))[0]).any()


@pytest.mark.parametrize(("nodes", "best"), [("aabb", "two_level"), ("abcd", "dedup")])
def test_fixed_choices_take_the_exchange_with_the_fewest_rows(nodes, best):
    found = policies(candidate_exchanges(Nodes.of(nodes)))
    assert len(set(found)) == len(found)
    assert {p.exchange.transport for p in found if p.exchange and p.codec == "int8"} == {best}
    assert {p.name for p in found if p.exchange is None} == {"auto", "ideal"}
    assert found[0].exchange == Exchange("all_to_all")


def _row(policy, rounds, theirs, workload="W2", **more):
    return {
        "topology": "2x2", "inter_mbit": 200.0, "workload": workload, "policy": policy, "transport": "dedup",
        "chunks": 1, "codec": "none", "guests": 0.0, "inter_bytes": 1300, "max_mean_before": 2.0, "predicted_ms": 110.0,
        "step_ms_rounds": rounds, "step_ms_median": float(np.median(rounds)),
        "speedup_vs_transformers": float(np.median(np.array(theirs) / np.array(rounds))), **more,
    }  # fmt: skip


def test_the_verdict_takes_the_worst_cell():
    theirs = [200.0, 220.0, 180.0]
    rows = [
        _row("transformers", theirs, theirs, predicted_ms=200.0),
        _row("static", [120.0, 120.0, 120.0], theirs, predicted_ms=120.0),
        _row("bounded", [90.0, 90.0, 90.0], theirs, codec="int8", inter_bytes=100, predicted_ms=None),
        _row("auto", [126.0, 120.0, 132.0], theirs, predicted_ms=126.0),
        _row("ideal", [50.0, 50.0, 50.0], theirs, predicted_ms=60.0),
    ]
    even = [
        _row(r["policy"], [100.0] * 2, [100.0] * 2, "W0", max_mean_before=1.0)
        for r in rows
        if r["codec"] == "none"
    ]
    found = verdict(rows + even)
    assert (found.cells, found.skewed_cells) == (2, 1)
    assert found.worst_vs_best_fixed == pytest.approx(1.05)
    assert found.worst_vs_transformers == pytest.approx(1.0)
    # Where guests' weights travelled too, rows alone cannot be told.
    assert found.int8_bytes_ratio == 13.0
    assert "13.0 times fewer bytes between nodes than transformers (6.5 times" in found.text()
    assert found.median_speedup == pytest.approx(200 / 126)
    assert found.prediction_error == pytest.approx(np.median([0, 0, 0, 0.2, 0.1, 0.1, 0.1, 0.1]))
    assert "2 cells" in found.text()


def test_the_grid_can_be_narrowed():
    grid = full_grid(2)
    assert [str(spec).split()[0] for spec in grid.labs[::3]] == ["2x2", "4x1", "2x4"]
    assert all(spec.too_much_for(2) is None for spec in grid.labs)
    assert len(grid.only(["4x1"]).labs) == 3
    assert quick_grid(2).workloads == ["W0", "W2", NATURAL]
    with pytest.raises(ConfigError, match="topology: '3x1' is not measured; choose of 2x2"):
        grid.only(["3x1"])


THEIRS, AUTOS, BEST, NEAR, FAR, LOSSY, BOUND = (
    Policy(TRANSFORMERS, Exchange("all_to_all")),
    Policy(AUTO, None),
    Policy("static", Exchange("dedup")),
    Policy("exact", Exchange("dedup")),
    Policy("bounded", Exchange("dedup")),
    Policy("bounded", Exchange("dedup"), "int8"),
    Policy(IDEAL, None),
)


def _contest(pace, most=8, noise=0.0, same=()):
    """Rounds of each policy until nobody is measured any more. pace: step times. same: who run one program."""
    return {policy: len(record.step_ms) for policy, record in _records(pace, most, noise, same).items()}


def _records(pace, most, noise, same=(), seed=0):
    draw, records = np.random.default_rng(seed), {policy: Record([], []) for policy in pace}
    while taking_part := next_round(records, most):
        for policy in taking_part:
            records[policy].step_ms.append(pace[policy] * (1 + noise * draw.uniform(-1, 1)))
            records[policy].program.append(same if policy in same else policy)
    return records


def test_rounds_go_to_the_ratios_that_are_open():
    pace = {THEIRS: 200.0, AUTOS: 101.0, BEST: 100.0, NEAR: 104.0, FAR: 140.0, LOSSY: 90.0, BOUND: 80.0}
    assert _contest(pace) == {THEIRS: 6, AUTOS: 6, BEST: 6, NEAR: 6, FAR: 2, LOSSY: 2, BOUND: 3}
    assert _contest({**pace, FAR: 150.0})[FAR] == 1
    assert _contest({**pace, NEAR: 111.0})[NEAR] == 5
    # As close to the limit of 1.05 as its noise: it is measured on, and who is not near the best is not.
    open_ = _contest({**pace, AUTOS: 105.0, NEAR: 120.0}, noise=0.05)
    assert (open_[AUTOS], open_[THEIRS], open_[BEST], open_[NEAR], open_[BOUND]) == (8, 6, 8, 3, 3)
    assert _contest(pace, most=2) == dict.fromkeys(pace, 2)
    # Once it is clear that transformers are slower, what is open is measured without them.
    long = _contest({**pace, AUTOS: 107.0}, most=20, noise=0.05)
    assert (long[AUTOS], long[BEST], long[THEIRS]) == (20, 20, 6)
    assert _contest({**pace, THEIRS: 104.0, AUTOS: 110.0}, most=20, noise=0.02)[THEIRS] == 20


def test_a_cell_that_ends_early_is_told_within_its_limit():
    pace, most = {THEIRS: 200.0, AUTOS: 102.0, BEST: 100.0, NEAR: 101.0}, 12
    early = 0
    for seed in range(40):
        times = {policy: record.step_ms for policy, record in _records(pace, most, 0.08, seed=seed).items()}
        if len(times[AUTOS]) < most:
            early += 1
            rows = [_row(p.name, times[p], [200.0] * len(times[p])) for p in pace]
            assert verdict(rows).worst_vs_best_fixed < 1.05
    assert 10 < early < 40


def test_one_program_is_measured_once_and_auto_may_run_it():
    pace = {THEIRS: 200.0, AUTOS: 105.0, BEST: 100.0, NEAR: 100.5, FAR: 102.0}
    noisy = _contest(pace, noise=0.05, same=(NEAR, BEST))
    assert noisy[NEAR] == 2 < noisy[BEST] == noisy[AUTOS]
    alone = {THEIRS: 200.0, AUTOS: 102.0, BEST: 100.0}
    assert _contest(alone, noise=0.05)[AUTOS] > 6
    assert _contest(alone, noise=0.05, same=(AUTOS, BEST))[AUTOS] == 6
    assert _contest({**alone, AUTOS: 120.0})[AUTOS] == 8, "what misses its limit is measured to the end"


def test_an_interrupted_grid_goes_on(tmp_path):
    file, settings = tmp_path / "cluster.json", {"tokens": 64, "rounds": 2}
    spec = full_grid(2).labs[0]
    cell = [_row(name, [100.0] * 2, [100.0] * 2) for name in ("transformers", "static", "auto")]
    first = Book(file, settings)
    first.add(cell)
    held = json.loads(file.read_text())
    assert held["rows"] == cell
    assert (held["machine"]["tokens"], held["machine"]["code"]) == (64, code_version())
    second = Book(file, settings)
    assert second.rows == cell
    assert "W2" not in quick_grid(2).missing(spec, second)
    assert quick_grid(2).missing(spec, Book(None, settings)) == ["W0", "W2", NATURAL]
    second.add([row | {"workload": "W0"} for row in cell])
    assert quick_grid(2).missing(spec, Book(file, settings)) == [NATURAL]
    with pytest.raises(ConfigError, match=r"json: .* measured with tokens 64; to keep them"):
        Book(file, {**settings, "tokens": 128})
    file.write_text(json.dumps({"rows": cell, "machine": {**held["machine"], "cpu": "another"}}))
    with pytest.raises(ConfigError, match="measured with cpu another"):
        Book(file, settings)
    file.write_text("[]")
    with pytest.raises(ConfigError, match=r"json: .* holds no rows"):
        Book(file, settings)
    deep = "[" * 100_000 + "]" * 100_000
    for broken in ([{}], [1], [cell[0]], [{**cell[0], "step_ms_median": "soon"}, *cell[1:]], deep):
        rows = broken if broken is deep else json.dumps(broken)
        file.write_text(f'{{"machine": {json.dumps(held["machine"])}, "rows": {rows}}}')
        with pytest.raises(ConfigError, match=r"json: .* holds no rows"):
            Book(file, settings)


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.skipif(available() is not None, reason=f"no emulated cluster here: {available()}")
def test_a_real_one(tmp_path):
    file = tmp_path / "cluster.json"
    result = CliRunner().invoke(
        app,
        ["bench", "cluster", "--quick", "--rounds", "2", "--tokens", "64", "--explain", "--json", str(file)],
    )
    assert result.exit_code == 0, result.output
    found = json.loads(file.read_text())
    assert len(found["rows"]) == 3 * 13
    words = [
        "bench",
        "cluster",
        "--quick",
        "--rounds",
        "2",
        "--tokens",
        "64",
        "--explain",
        "--json",
        str(file),
    ]
    again = CliRunner().invoke(app, words)
    assert "3 of 3 cells" in again.output, again.output
    assert "2x2 at 200.0 Mbit/s: its cells are in the file" in again.stderr
    assert json.loads(file.read_text()) == found
    wanted = {"topology", "inter_mbit", "workload", "policy", "transport", "codec", "step_ms_median", "predicted_ms",
              "speedup_vs_transformers", "percent_of_ideal", "inter_bytes", "intra_bytes"}  # fmt: skip
    assert wanted <= found["rows"][0].keys()
    by_codec = {
        r["codec"]: r["inter_bytes"]
        for r in found["rows"]
        if r["policy"] == "bounded" and r["workload"] == "W0"
    }
    theirs = next(r["inter_bytes"] for r in found["rows"] if r["policy"] == "transformers")
    assert theirs >= 4 * by_codec["int8"]
    assert "what auto chooses from" in result.output
