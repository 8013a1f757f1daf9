"""The cluster benchmark: what it routes, what it compares, and the verdict; a real one where a lab can be."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from anabranch.cli.bench import natural_trace
from anabranch.cli.cluster_cases import NATURAL, ClusterCases
from anabranch.cli.cluster_grid import full_grid, quick_grid, verdict
from anabranch.cli.cluster_rows import policies
from anabranch.cli.main import app
from anabranch.errors import ConfigError
from anabranch.lab.kernel import available
from anabranch.placement.choice import Exchange
from anabranch.placement.nodes import Nodes
from anabranch.transport.choose import candidate_exchanges

CASES = ClusterCases(4, 32, 8, 64, 2, 2.0, str(natural_trace("tiny8")))


@pytest.mark.parametrize("workload", CASES.names())
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
        "chunks": 1, "codec": "none", "max_mean_before": 2.0, "step_ms_rounds": rounds, "predicted_ms": 110.0,
        "step_ms_median": float(np.median(rounds)),
        "speedup_vs_transformers": float(np.median(np.array(theirs) / np.array(rounds))), **more,
    }  # fmt: skip


def test_the_verdict_takes_the_worst_cell():
    theirs = [200.0, 220.0, 180.0]
    rows = [
        _row("transformers", theirs, theirs, predicted_ms=200.0),
        _row("static", [120.0, 120.0, 120.0], theirs, predicted_ms=120.0),
        _row("bounded", [90.0, 90.0, 90.0], theirs, codec="int8", predicted_ms=None),
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
    assert len(found["rows"]) == 2 * 3 * 13
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
