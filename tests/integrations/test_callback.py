"""`AdaptiveCallback` in a plain `transformers.Trainer`, on two ranks."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.distributed import DistributedConfig

import anabranch
from anabranch.errors import ConfigError
from anabranch.experts.adaptive import Observation
from anabranch.integrations.callback import AdaptiveCallback, LayerWatch, Seen, _summed, decoder_layer
from anabranch.integrations.transformers import LAYER_ATTRIBUTE, adaptive_layers
from anabranch.placement.base import Homes, Plan, max_over_mean
from anabranch.placement.choice import Choice, Exchange
from anabranch.training.origin import find_origin
from anabranch.transport.base import Traffic

FIGURES = (
    "max_mean_before", "max_mean_after", "guests", "token_bytes", "weight_bytes", "plan_ms", "step_ms", "joules",
)  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(toy_model, tmp_path_factory):
    """The toy model with eight experts and initial weights, its second layer dense."""
    folder = tmp_path_factory.mktemp("checkpoint")
    origin = find_origin(str(toy_model), None)
    origin.config.num_experts = 8
    origin.config.num_hidden_layers = 3
    origin.config.mlp_only_layers = [1]
    origin.write_initial(folder, seed=0)
    return folder


class Follows(TrainerCallback):
    """A reporter that comes after the callback, and a spy on the model's own layers."""

    def __init__(self):
        self.logs = []
        self.seen = []

    def on_train_begin(self, args, state, control, **kwargs):
        for layer in adaptive_layers(kwargs["model"]).values():
            layer.observers.append(self.seen.append)

    def on_step_begin(self, args, state, control, **kwargs):
        self.seen.clear()

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


def trainer_of(checkpoint, out, callbacks, **changes):
    anabranch.enable(**{"planner": "bounded", "epsilon": 0.0, "slots": 2} | changes)
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint,
        distributed_config=DistributedConfig(fsdp_size=2, ep_size=2, ep_implementation="anabranch"),
    )
    ids = torch.randint(0, 320, (16, 24), generator=torch.Generator().manual_seed(7))
    args = TrainingArguments(
        output_dir=str(out), max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True,
        log_level="error", dataloader_pin_memory=False,
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in ids]
    return Trainer(model=model, args=args, train_dataset=rows, callbacks=callbacks)


def train_twice(checkpoint, out):
    """The logs of both trainings, and what the ranks' layers saw in the last step."""
    balance, follows = AdaptiveCallback(), Follows()
    trainer = trainer_of(checkpoint, out, [balance, follows])
    trainer.train()
    # A second training watches each layer once: else every figure but the ratios would double.
    trainer.train()
    last, seen = balance.last, follows.seen[::2]  # the spy was hung up twice
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    observers = [len(layer.observers) for layer in adaptive_layers(trainer.model).values()]
    ours = [(o.plan.home_rows_R, o.plan.rows_R, o.plan.guests, o.token_bytes, o.weight_bytes) for o in seen]
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, ours)
    return follows.logs, history, last, observers, everyone


@pytest.fixture(scope="module")
def trained(ranks2, checkpoint, tmp_path_factory):
    return ranks2.run(train_twice, checkpoint, tmp_path_factory.mktemp("out"))


def test_logs_hold_the_figures_for_later_callbacks_and_in_the_history(trained):
    for logs, history, *_ in trained:
        stepped = [entry for entry in logs if "loss" in entry]
        assert len(stepped) == 4  # two trainings of two steps
        assert len(history) == 2  # of the second one
        for entry in (*stepped, *history):
            assert {f"balance/{name}" for name in FIGURES} <= entry.keys()
            assert entry["balance/step_ms"] > 0
            assert 1 <= entry["balance/max_mean_after"] <= entry["balance/max_mean_before"]


def test_the_figures_are_sums_over_ranks_layers_and_micro_batches(trained):
    _, _, last, _, everyone = trained[0]
    assert len(everyone[0]) == 4  # two adaptive layers, two micro-batches
    plans = everyone[0]
    assert last.max_mean_before == pytest.approx(sum(max_over_mean(rows) for rows, *_ in plans) / 4)
    assert last.max_mean_after == pytest.approx(sum(max_over_mean(rows) for _, rows, *_ in plans) / 4)
    assert last.guests == sum(guests for _, _, guests, *_ in plans) > 0
    for place, name in ((3, "token_bytes"), (4, "weight_bytes")):
        assert getattr(last, name) == sum(call[place] for rank in everyone for call in rank) > 0
    assert last.joules > 0


def test_layers_are_numbered_as_in_the_model_dense_ones_counted(trained):
    assert [layer.layer for layer in trained[0][2].layers] == [0, 2]
    # 2 sequences of 24 tokens a micro-batch, 2 experts a token: 96 rows a rank, twice.
    assert [layer.rows_mean for layer in trained[0][2].layers] == [192, 192]
    assert all(layer.fits for layer in trained[0][2].layers)


def test_a_second_training_does_not_watch_twice(trained):
    for _, _, _, observers, _ in trained:
        assert observers == [2, 2]  # the spy's, which it left in both trainings


def warn_of_slots(checkpoint, out):
    """The first rank's four experts get all rows; one guest takes a quarter of them, half is needed."""
    balance = AdaptiveCallback()
    trainer = trainer_of(checkpoint, out, [balance], slots=1)
    for layer in trainer.model.model.layers:
        if hasattr(layer.mlp, "gate"):
            layer.mlp.gate.register_forward_hook(_all_to_the_first_rank)
    told = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("anabranch.integrations.callback.warnings.warn", lambda text, **_: told.append(text))
        trainer.train()
    return told, [layer.fits for layer in balance.last.layers]


def _all_to_the_first_rank(module, inputs, outputs):
    logits, weights, ids = outputs
    return logits, weights, (torch.arange(ids.numel()) % 4).view_as(ids)


def test_slots_too_few_are_told_once_on_rank_0(ranks2, checkpoint, tmp_path):
    first, other = ranks2.run(warn_of_slots, checkpoint, tmp_path)
    text = "anabranch: slots are too few to bring every rank under the cap; raise slots, or epsilon"
    assert first == ([text], [False, False])
    assert other == ([], [False, False])


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("model.layers.3.mlp.experts", 3),
        ("model.layers.12.block_sparse_moe.experts", 12),
        ("backbone.layers.1.mixer.experts", 1),
        ("experts", 0),
    ],
)
def test_the_layer_is_the_first_number_of_the_name(name, number):
    assert decoder_layer(name) == number


def model_of_one_layer():
    """A model that looks adaptive, and its layer's observers."""
    layer = SimpleNamespace(observers=[])
    model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.Identity(), torch.nn.Identity()])})
    setattr(model["layers"][1], LAYER_ATTRIBUTE, layer)
    return model, layer.observers


def test_a_watch_hangs_on_each_layer_once_even_after_a_training_that_failed():
    watch = LayerWatch()
    (old, old_observers), (new, new_observers) = model_of_one_layer(), model_of_one_layer()
    watch.attach(old)
    watch.attach(old)
    old_observers[0]("seen")
    assert watch.seen == [Seen(1, "seen")]
    assert len(old_observers) == 1
    watch.attach(new)
    assert (len(old_observers), len(new_observers), watch.seen) == (0, 1, [])
    watch.detach()
    assert new_observers == []


def begin_unaware(model):
    """The Trainer's arguments as they are on CPUs without use_cpu: one process, no data of its own."""
    try:
        AdaptiveCallback().on_train_begin(SimpleNamespace(world_size=1), None, None, model=model)
    except ConfigError as error:
        return str(error)
    return None


def test_a_trainer_that_would_give_all_ranks_the_same_data_is_refused(ranks2):
    told = ranks2.run(begin_unaware, torch.nn.Linear(1, 1))
    assert all(text.startswith("use_cpu: the Trainer knows of one rank, there are 2") for text in told)
    assert begin_unaware(torch.nn.Linear(1, 1)) is None


def sum_over_groups():
    """Two groups of two ranks: one levels 10 and 2 rows to 6 and 6 with a guest, one has 4 and 8, unlevelled."""
    rank = dist.get_rank()
    homes = Homes.contiguous(2, 2)
    routed = np.array([[5, 1], [5, 1]]) if rank < 2 else np.array([[2, 4], [2, 4]])
    placed = np.array([[6, 0], [4, 2]]) if rank < 2 else np.diag([4, 8])
    plan = Plan(routed, placed, homes, 6)
    choice = Choice(plan, Exchange("dedup"), "exact")
    tokens, weights = Traffic(10**10, rank), Traffic(10 * rank, 0)
    seen = [Seen(3, Observation(choice, torch.zeros(6, 1), tokens, weights, 0.5 * rank))]
    return _summed(seen, 20.0, float(rank), "estimate")


def test_groups_that_share_experts_are_summed_up(ranks4):
    for rank, step in enumerate(ranks4.run(sum_over_groups)):
        (layer,) = step.layers
        assert (layer.layer, layer.rows_before_max, layer.rows_after_max, layer.rows_mean) == (3, 10, 8, 6)
        assert (step.max_mean_before, step.max_mean_after) == (10 / 6, 8 / 6)
        assert not layer.fits  # in the second group
        assert (step.guests, step.token_bytes, step.weight_bytes) == (1, 4 * 10**10 + 6, 60)
        assert (step.joules, step.plan_ms) == (6.0, 0.5 * rank)


def test_no_adaptive_layer_is_no_imbalance():
    step = _summed([], 20.0, 1.5, "rapl")
    assert (step.max_mean_before, step.max_mean_after, step.guests, step.layers) == (1.0, 1.0, 0, ())
    assert (step.joules, step.step_ms) == (1.5, 20.0)


@pytest.mark.parametrize(
    ("whole_machine", "local_rank", "expected"), [(True, "0", 4.0), (True, "1", 0.0), (False, "1", 4.0)]
)
def test_one_rank_tells_what_its_whole_machine_used(monkeypatch, whole_machine, local_rank, expected):
    readings = iter([1.0, 5.0])
    meter = SimpleNamespace(source="rapl", whole_machine=whole_machine, joules=lambda: next(readings))
    monkeypatch.setattr("anabranch.integrations.callback.open_meter", lambda asked: meter)
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    balance = AdaptiveCallback()
    balance.on_step_begin(None, None, None)
    balance.on_step_end(None, None, None, model=torch.nn.Linear(1, 1))
    assert balance.last.joules == expected
