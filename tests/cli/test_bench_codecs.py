"""`bench codecs`: what is said of a codec beside rounding alone. The trainings themselves are the benchmark's."""

import json

import pytest

from anabranch.cli.bench_codecs import OTHER_TRANSPORT, PAIRS, RUNS, TRANSPORT, about, summary, whole_seeds
from anabranch.errors import ConfigError


def _rows(changes, seeds):
    """changes: percent by (transport, codec), one a seed."""
    return [
        {
            "transport": transport, "dispatch_wire": codec, "combine_wire": codec, "seed": seed,
            "eval_loss_change_percent": by_seed[seed],
            **({"gradient_relative_error": 0.01} if seed == 0 else {}),
        }
        for seed in range(seeds)
        for (transport, codec), by_seed in changes.items()
    ]  # fmt: skip


CHANGES = {
    (TRANSPORT, "none"): [0.0, 0.0, 0.0],
    (OTHER_TRANSPORT, "none"): [0.3, -0.3, 0.0],
    (TRANSPORT, "bf16"): [0.5, 0.1, 0.3],
}


def test_every_codec_runs_beside_a_twin_that_differs_by_rounding():
    assert RUNS[:2] == [(TRANSPORT, "none", "none"), (OTHER_TRANSPORT, "none", "none")]
    assert RUNS[2:] == [(TRANSPORT, *pair) for pair in PAIRS[1:]]


def test_the_mean_over_seeds_has_a_margin():
    twin, bf16 = summary(_rows(CHANGES, 3))
    assert (twin["transport"], twin["mean_change_percent"], twin["spread_percent"]) == (
        OTHER_TRANSPORT,
        0.0,
        0.3,
    )
    assert (bf16["dispatch_wire"], bf16["mean_change_percent"], bf16["seeds"]) == ("bf16", 0.3, 3)
    assert bf16["margin_percent"] == pytest.approx(4.30 * 0.2 / 3**0.5, abs=1e-3)
    assert bf16["gradient_relative_error"] == 0.01


def test_one_seed_has_no_spread():
    twin, bf16 = summary(_rows(CHANGES, 1))
    assert (twin["spread_percent"], bf16["margin_percent"]) == (None, None)
    assert summary([]) == []


def test_an_interrupted_file_is_taken_up_after_its_last_whole_seed(tmp_path):
    file = tmp_path / "codecs.json"
    assert whole_seeds(None, 200) == whole_seeds(file, 200) == []
    names = ("seed", "transport", "dispatch_wire", "combine_wire", "eval_loss_change_percent")
    rows = [dict(zip(names, (seed, *run, 0.1), strict=True)) for seed in (0, 1) for run in RUNS][:-1]
    file.write_text(json.dumps({"machine": about(200), "rows": rows}))
    assert whole_seeds(file, 200) == rows[: len(RUNS)]
    lossless = {**rows[1], "eval_loss_change_percent": None}
    for broken in ([{}], [1], rows[1:], [{**rows[0], "seed": 1}], [rows[0], lossless]):
        file.write_text(json.dumps({"machine": about(200), "rows": broken}))
        with pytest.raises(ConfigError, match=r"json: .* holds no rows"):
            whole_seeds(file, 200)


@pytest.mark.parametrize(("held", "named"), [({"steps": 100}, "steps"), ({"code": "of yesterday"}, "code")])
def test_figures_of_other_code_or_length_are_not_mixed(tmp_path, held, named):
    file = tmp_path / "codecs.json"
    file.write_text(json.dumps({"machine": {**about(200), **held}, "rows": [{}]}))
    with pytest.raises(ConfigError, match=f"measured with {named} {held[named]};"):
        whole_seeds(file, 200)
