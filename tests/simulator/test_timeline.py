"""The replay of a step: schedules, waiting, and its makespan against the vectorised components."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.costs.training.calibration import load_calibration
from anabranch.costs.training.setup import Setup
from anabranch.errors import ConfigError
from anabranch.hardware.catalog import load_catalog
from anabranch.simulator.histogram import natural_histogram
from anabranch.simulator.replay import WAITING, Meet, Receive, Send, Work, replay
from anabranch.simulator.schedule import Pass, passes
from anabranch.simulator.skew import Group, Placed, Policy, place
from anabranch.simulator.slowdown import PublishedPrices, balanced
from anabranch.simulator.timeline import ATTENTION, ONCE, ROWS, Timeline
from anabranch.workload.hf_config import read_shape
from anabranch.workload.layout import Layout

CALIBRATION = load_calibration()
CLUSTER = load_catalog().cluster("trn2.48xlarge:4")
QWEN = read_shape("Qwen3-30B-A3B")
LAYOUTS = [
    {"ep": 16, "dp": 64, "global_batch": 256},
    {"ep": 4, "pp": 4, "dp": 16, "global_batch": 256},
    {"ep": 4, "pp": 4, "vp": 3, "dp": 16, "global_batch": 256},
    {"ep": 2, "pp": 8, "dp": 8, "global_batch": 64, "recompute": "full"},
]


def prices(**fields: object) -> PublishedPrices:
    layout = Layout(seq_len=4096, **fields)  # pyright: ignore[reportArgumentType]
    return PublishedPrices(Setup(QWEN, CLUSTER, layout), CALIBRATION)


def placed(of: PublishedPrices, policy: str) -> list[Placed]:
    return place(natural_histogram(128), Group.of(QWEN, of.setup.layout), Policy(policy))


@pytest.mark.parametrize("fields", LAYOUTS)
def test_a_balanced_replay_takes_what_the_components_say(fields: dict[str, int]) -> None:
    """Within 3 %: sends between stages hide, and what comes once a step has no bubble."""
    of = prices(**fields)
    group = Group.of(QWEN, of.setup.layout)
    step = Timeline(of, [balanced(group, 128)]).replay
    assert step.makespan_s == pytest.approx(of.balanced_s(group), rel=0.03)


@pytest.mark.parametrize("policy", ["static", "bounded"])
@pytest.mark.parametrize("fields", LAYOUTS[:3])
def test_a_skewed_replay_takes_what_the_components_say(fields: dict[str, int], policy: str) -> None:
    """Within 5 %: the components know the mean over layers, a pipeline waits for its slowest stage."""
    of = prices(**fields)
    layers = placed(of, policy)
    assert Timeline(of, layers).replay.makespan_s == pytest.approx(of.step_s(layers, policy), rel=0.05)


def test_every_component_has_its_place() -> None:
    alone = {"expert_weights", "exchange", "data", "head", "logits", "pipeline"}
    assert {*ATTENTION, *ROWS, *ONCE, *alone} == prices(ep=16, dp=64, global_batch=64).parts_s().keys()


def test_ranks_wait_for_the_fullest_one() -> None:
    of = prices(ep=16, dp=64, global_batch=64)
    static, exact = (Timeline(of, placed(of, policy)).replay for policy in ("static", "exact"))
    assert static.seconds(WAITING) > 0.05 * static.makespan_s > 20 * exact.seconds(WAITING)
    assert static.makespan_s > exact.makespan_s


def test_lanes_are_busy_or_wait_all_the_time() -> None:
    of = prices(ep=4, pp=4, dp=16, global_batch=64)
    step = Timeline(of, placed(of, "static")).replay
    for lane in range(step.lanes):
        ends = 0.0
        for span in (span for span in step.spans if span.lane == lane):
            assert span.start_s == pytest.approx(ends, abs=1e-9)
            ends = span.start_s + span.seconds
        assert ends == pytest.approx(step.makespan_s)


def test_the_trace_is_one_that_chrome_reads(tmp_path: Path) -> None:
    of = prices(ep=2, pp=2, dp=32, global_batch=64)
    timeline = Timeline(of, placed(of, "static"))
    timeline.write_trace(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert {e["args"]["name"] for e in events if e["ph"] == "M"} == {"stage 0", "stage 1", "rank 0", "rank 1"}
    spans = [e for e in events if e["ph"] == "X"]
    assert len(spans) == len(timeline.replay.spans)
    assert max(e["ts"] + e["dur"] for e in spans) == pytest.approx(1e6 * timeline.replay.makespan_s)
    assert {"dispatch forward", "experts backward", "gradients", WAITING} <= {e["name"] for e in spans}


def test_too_much_to_replay_is_said_before() -> None:
    of = prices(ep=16, dp=64, global_batch=64 * 64 * 64)
    with pytest.raises(ConfigError, match=r"^micro_batches: "):
        Timeline(of, placed(of, "static"))
    assert Timeline(of, placed(of, "static"), micro_batches=2).replay.makespan_s > 0


@given(st.integers(1, 6), st.integers(1, 3), st.integers(1, 4))
def test_every_micro_batch_goes_forward_then_backward_through_every_chunk(
    stages: int, chunks: int, groups: int
) -> None:
    chunks = chunks if stages > 1 else 1
    micros = stages * groups
    for stage in range(stages):
        order = passes(stage, stages, chunks, micros)
        assert sorted(order) == sorted(
            Pass(f, c, m) for f in (True, False) for c in range(chunks) for m in range(micros)
        )
        assert all(order.index(p._replace(forward=True)) < order.index(p) for p in order if not p.forward)


@given(st.integers(2, 5), st.integers(1, 3), st.integers(1, 3), st.floats(0.5, 3.0))
def test_the_bubble_is_the_schedules_own(stages: int, chunks: int, groups: int, ratio: float) -> None:
    """(pp - 1) / (vp m) of the work (Narayanan et al. 2021), without time on the way."""
    micros = stages * groups

    def program(stage: int):
        for one in passes(stage, stages, chunks, micros):
            place, step = one.chunk * stages + stage, 1 if one.forward else -1
            if 0 <= place - step < stages * chunks:
                yield Receive((one.forward, place, one.micro))
            yield Work("pass", 1.0 if one.forward else ratio)
            if 0 <= place + step < stages * chunks:
                yield Send((one.forward, place + step, one.micro), 0.0)

    work = chunks * micros * (1.0 + ratio)
    bubble = (stages - 1) / (chunks * micros)
    assert replay([program(s) for s in range(stages)]).makespan_s == pytest.approx(work * (1 + bubble))


def test_a_meeting_begins_with_the_last_and_ends_for_all() -> None:
    found = replay([[Work("a", s), Meet("m", ("m",), (0, 1), 2.0), Work("b", 1.0)] for s in (1.0, 3.0)])
    assert [tuple(span) for span in found.spans if span.lane == 0] == [
        (0, "a", 0.0, 1.0), (0, WAITING, 1.0, 2.0), (0, "m", 3.0, 2.0), (0, "b", 5.0, 1.0)
    ]  # fmt: skip
    assert found.seconds(WAITING) == 1.0


def test_lanes_that_wait_for_ever_are_our_mistake() -> None:
    with pytest.raises(AssertionError, match="for ever"):
        replay([[Receive(("never",))]])


def test_stages_may_differ_by_a_layer() -> None:
    """47 layers on 4 stages: the replay follows the fullest stage."""
    of = prices(ep=4, pp=4, dp=16, global_batch=256)
    uneven = replace(of, setup=replace(of.setup, shape=replace(QWEN, layers=47)))
    group = Group.of(QWEN, of.setup.layout)
    step = Timeline(uneven, [balanced(group, 128)]).replay
    assert 1.0 < step.makespan_s / uneven.balanced_s(group) < 1.06
