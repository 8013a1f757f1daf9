"""From the Trainer's events to records, traces and an orderly stop."""

import math
import os
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from transformers import TrainerControl, TrainerState

from anabranch.experts.adaptive import Observation
from anabranch.integrations.callback import Seen, StepBalance
from anabranch.placement.base import Homes, Plan
from anabranch.placement.choice import Choice, Exchange
from anabranch.telemetry.record import LayerRecord
from anabranch.training.recorder import OrderlyStop, StepRecorder, TraceRecorder
from anabranch.transport.base import Traffic
from anabranch.workload.trace import load_trace

LAYER = LayerRecord(3, 9, 8, 7.5, 1, 10, 20, 0.1, True)
BALANCE = StepBalance(1.2, 1.1, 3, 400, 500, 0.5, 20.0, 6.0, "estimate", (LAYER,))
ON_CPU = SimpleNamespace(device=torch.device("cpu"))


class Kept:
    """A sink that keeps what it is given."""

    def __init__(self):
        self.written = []

    def write(self, record, layers=()):
        self.written.append((record, layers))


@pytest.fixture
def recorder():
    return StepRecorder(SimpleNamespace(last=BALANCE), [Kept(), Kept()], 256)


def log(recorder, step, **logs):
    recorder.on_log(None, TrainerState(global_step=step), TrainerControl(), logs=logs)


def begin(recorder):
    recorder.on_step_begin(None, TrainerState(), TrainerControl())


def test_a_record_waits_for_its_evaluation(recorder):
    log(recorder, 1, loss=5.0, learning_rate=0.1, grad_norm=2.0)
    assert recorder.eval_loss is None
    assert recorder.sinks[0].written == []
    log(recorder, 1, eval_loss=4.5)
    assert recorder.eval_loss == 4.5
    begin(recorder)
    ((record, layers),) = recorder.sinks[0].written
    assert recorder.sinks[1].written == recorder.sinks[0].written
    assert (record.step, record.loss, record.eval_loss, record.grad_norm) == (1, 5.0, 4.5, 2.0)
    assert (record.tokens, record.tokens_per_s) == (256, 256 / 0.020)
    assert (record.guests, record.token_bytes, record.weight_bytes, record.joules) == (3, 400, 500, 6.0)
    assert layers == (LAYER,)
    assert recorder.records == [record]
    assert recorder.eval_loss is None


def test_each_step_is_written_once(recorder):
    for step in (1, 2):
        log(recorder, step, loss=5.0)
        begin(recorder)
    begin(recorder)
    recorder.flush()
    assert [record.step for record, _ in recorder.sinks[0].written] == [1, 2]


def test_other_logs_and_a_late_evaluation_are_passed_over(recorder):
    log(recorder, 1, train_runtime=3.0)
    log(recorder, 1, eval_loss=4.0)
    recorder.flush()
    assert recorder.records == []


def test_a_norm_that_was_not_taken_is_not_zero(recorder):
    log(recorder, 1, loss=5.0)
    recorder.flush()
    assert math.isnan(recorder.records[0].grad_norm)


def test_earlier_records_come_first_and_are_not_written_again(recorder):
    log(recorder, 1, loss=5.0)
    recorder.flush()
    sink = Kept()
    resumed = StepRecorder(SimpleNamespace(last=BALANCE), [sink], 256, recorder.records)
    log(resumed, 2, loss=4.0)
    resumed.flush()
    assert [record.loss for record in resumed.records] == [5.0, 4.0]
    assert [record.step for record, _ in sink.written] == [2]


def end_of_step(stop, step, of=10):
    control = TrainerControl(should_evaluate=True)
    stop.on_step_end(ON_CPU, TrainerState(global_step=step, max_steps=of), control)
    return control


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_run_after_its_step_with_a_checkpoint(number):
    before = signal.getsignal(number)
    with OrderlyStop() as stop:
        assert not end_of_step(stop, 3).should_training_stop
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)  # impatience changes nothing
        control = end_of_step(stop, 4)
        assert control.should_save
        assert control.should_training_stop
        assert not control.should_evaluate
        assert stop.stopped
    assert signal.getsignal(number) is before


def test_a_run_at_its_last_step_finishes():
    with OrderlyStop() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert not end_of_step(stop, 10).should_training_stop
        assert not stop.stopped


def test_handlers_come_back_when_the_run_fails():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(RuntimeError), OrderlyStop():
        raise RuntimeError
    assert signal.getsignal(signal.SIGINT) is before


def stop_where_one_rank_is_asked():
    with OrderlyStop() as stop:
        quiet = end_of_step(stop, 1).should_save
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return quiet, end_of_step(stop, 2).should_save, stop.stopped


def test_all_ranks_stop_after_the_same_step(ranks2):
    assert ranks2.run(stop_where_one_rank_is_asked) == [(False, True, True)] * 2


COUNTS_RE = np.array([[3, 1, 0, 0], [0, 1, 1, 2]])
IDS_SK = torch.tensor([[0, 0], [0, 1]])


def observe(recorder, layer):
    plan = Plan(COUNTS_RE, COUNTS_RE, Homes.contiguous(4, 2), 4)
    choice = Choice(plan, Exchange("dedup"), "static")
    seen = Observation(choice, IDS_SK, Traffic(0, 0), Traffic(0, 0), 0.0)
    recorder._watch.seen.append(Seen(layer, seen))


def end_of_traced_step(recorder, step, *, rank):
    state = TrainerState(global_step=step, is_world_process_zero=rank == 0)
    model = SimpleNamespace(config=SimpleNamespace(model_type="toy"))
    recorder.on_step_end(None, state, TrainerControl(), model=model)


def test_micro_batches_are_numbered_within_their_step_and_layer(tmp_path):
    recorder = TraceRecorder(tmp_path / "routing.npz", every=2, ids=False)
    for step in range(1, 5):
        recorder.on_step_begin(None, TrainerState(), TrainerControl())
        for layer in (1, 4, 1, 4):
            observe(recorder, layer)
        end_of_traced_step(recorder, step, rank=0)
    recorder.save()
    trace = load_trace(tmp_path / "routing.npz")
    assert trace.step_N.tolist() == [2] * 4 + [4] * 4
    assert trace.layer_N.tolist() == [1, 4, 1, 4] * 2
    assert trace.micro_N.tolist() == [0, 0, 1, 1] * 2
    assert (trace.counts_NRE == COUNTS_RE).all()
    assert trace.metadata["model_type"] == "toy"
    assert (trace.metadata["experts"], trace.metadata["top_k"], trace.metadata["ranks"]) == (4, 2, 2)
    assert trace.metadata["tokens_per_rank"] == 2


def test_only_rank_0_writes_and_only_what_was_seen(tmp_path):
    TraceRecorder(tmp_path / "nothing.npz", every=1, ids=False).save()
    other = TraceRecorder(tmp_path / "routing.npz", every=1, ids=False)
    observe(other, 0)
    end_of_traced_step(other, 1, rank=1)
    other.save()
    assert list(tmp_path.iterdir()) == []
