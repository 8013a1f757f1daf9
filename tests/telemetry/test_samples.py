"""Samples of a made-up cluster for the tests of all who read them; and that they survive JSON, damage excepted."""

import json

import pytest

from anabranch.errors import ConfigError
from anabranch.telemetry.samples import CallSample, Samples


def made_up_samples(**changes):
    """Two nodes of two ranks; a link to another node is ten times as slow."""
    fields = {
        "hidden": 64,
        "experts": 16,
        "top_k": 4,
        "node_R": (0, 0, 1, 1),
        "row_bytes": 256,
        "dispatch_row_bytes": 66,
        "combine_row_bytes": 128,
        "expert_bytes": 98304,
        "link_ms": {
            "intra": {1 << 10: 0.25, 1 << 16: 0.5, 1 << 22: 9.0},
            "inter": {1 << 10: 0.5, 1 << 16: 3.0, 1 << 22: 170.0},
        },
        "one_way_ms": {1 << 22: 136.0},
        "alone_ms": {"inter": {1 << 22: 100.0}},
        "expert_alone_ms": {1024: 3.0},
        "expert_ms": {64: 0.5, 1024: 4.5, 8192: 36.0},
        "copy_ms_per_mb": 0.5,
        "plan_ms": {"static": 0.03125, "bounded": 0.0625, "exact": 0.0625},
        "call_ms": (
            CallSample("all_to_all", 1, 128, 30.0),
            CallSample("all_to_all", 1, 1024, 210.0),
            CallSample("transformers", 1, 128, 35.0),
            CallSample("transformers", 1, 1024, 260.0),
        ),
        **changes,
    }
    return Samples(**fields)


def test_samples_survive_json():
    samples = made_up_samples()
    again = Samples.from_json(json.loads(json.dumps(samples.to_json(), allow_nan=False)))
    assert again == samples
    assert isinstance(again.call_ms[0], CallSample)
    assert list(again.expert_ms) == [64, 1024, 8192]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("row_bytes", 0),
        ("node_R", []),
        ("node_R", ["here"]),
        ("node_R", [1, 1]),
        ("link_ms", {"intra": {}}),
        ("link_ms", {"intra": {"-1": 0.25}}),
        ("link_ms", {"beside": {"1": 1.0, "2": 2.0}}),
        ("link_ms", {"inter": {"1": 1.0, "2": -2.0}}),
        ("link_ms", {"inter": {"small": 1.0, "2": 2.0}}),
        ("link_ms", None),
        ("one_way_ms", {"1024": -1.0}),
        ("expert_ms", {"64": float("nan"), "128": 1.0}),
        ("expert_ms", {}),
        ("copy_ms_per_mb", float("inf")),
        ("plan_ms", {"static": -1.0}),
        ("call_ms", []),
        ("call_ms", [{"transport": "dedup", "chunks": 1, "tokens": 0, "ms": 1.0}]),
        ("call_ms", [{"transport": "dedup", "ms": 1.0}]),
    ],
)
def test_what_no_machine_measured_is_refused(field, value):
    content = {**made_up_samples().to_json(), field: value}
    with pytest.raises(ConfigError, match="samples"):
        Samples.from_json(content)


def test_a_missing_or_unknown_field_is_refused():
    content = made_up_samples().to_json()
    with pytest.raises(ConfigError, match="samples"):
        Samples.from_json({name: value for name, value in content.items() if name != "top_k"})
    with pytest.raises(ConfigError, match="samples"):
        Samples.from_json({**content, "weather": "rain"})
