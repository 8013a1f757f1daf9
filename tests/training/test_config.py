"""A run's settings: what cannot work is refused by name, and what a resumed run must share is told apart."""

import json
from dataclasses import replace

import pytest

from anabranch.errors import CheckpointError, ConfigError
from anabranch.integrations.transformers import AdaptiveSettings
from anabranch.training.config import RunConfig


@pytest.fixture
def config(tmp_path):
    return RunConfig(out=str(tmp_path / "run"), cache=str(tmp_path / "cache"))


def test_the_defaults_work_and_write_nothing(config, tmp_path):
    config.check()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("setting", "value", "told"),
    [
        ("ranks", 0, "ranks: 0 is too small; use at least 1"),
        ("steps", 0, "steps: 0 is too small; use at least 1"),
        ("batch_size", -1, "batch_size: -1 is too small; use at least 1"),
        ("timeout_s", 0, "timeout_s: 0 is too small; use at least 1"),
        ("max_bytes", 0, "max_bytes: 0 is too small; use at least 1"),
        ("save_every", -1, "save_every: -1 is too small; use at least 0"),
        ("eval_every", -1, "eval_every: -1 is too small; use at least 0"),
        ("seed", -1, "seed: -1 is too small; use at least 0"),
        ("sequence_length", 1, "sequence_length: 1 is too small; use at least 2"),
        ("learning_rate", 0.0, "learning_rate: 0.0 is not a learning rate; use one between 0 and 10"),
        ("learning_rate", float("nan"), "learning_rate: nan is not"),
        ("dtype", "fp16", "dtype: 'fp16' is unknown; use float32 or bfloat16"),
        ("ep_size", 3, "ep_size: 3 does not divide ranks=2; use one of 1, 2"),
        ("ep_size", 0, "ep_size: 0 does not divide ranks=2; use one of 1, 2"),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(config, setting, value, told):
    with pytest.raises(ConfigError, match="^" + told.replace("(", r"\(")) as caught:
        replace(config, **{setting: value}).check()
    assert caught.value.setting == setting


def test_routing_is_recorded_between_at_least_two_ranks(config):
    replace(config, trace_every=1).check()
    for alone in ({"ranks": 1}, {"ep_size": 1}):
        with pytest.raises(ConfigError, match=r"^ranks: .*use at least 2"):
            replace(config, trace_every=1, **alone).check()


@pytest.mark.parametrize("setting", ["out", "cache"])
@pytest.mark.parametrize("below", [[], ["deeper", "still"]])
def test_a_file_in_place_of_a_folder_is_refused(config, tmp_path, setting, below):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ConfigError, match=f"^{setting}: {file} is a file; name a folder"):
        replace(config, **{setting: str(file.joinpath(*below))}).check()


def test_settings_come_back_from_json(config):
    whole = replace(
        config, data=("a.txt", "b"), experts=AdaptiveSettings("exact", 0.1, 3, "dedup"), ep_size=1
    )
    assert RunConfig.from_dict(json.loads(json.dumps(whole.to_dict()))) == whole


def test_the_group_is_all_ranks_unless_told(config):
    assert config.group_size == 2
    assert replace(config, ep_size=1).group_size == 1


@pytest.mark.parametrize(
    ("setting", "value"),
    [("model", "small"), ("data", ("x",)), ("ranks", 4), ("steps", 1), ("dtype", "bfloat16"), ("seed", 9)],
)
def test_another_model_data_or_schedule_is_another_run(config, setting, value):
    config.folder.claim(config.to_dict())
    replace(config, resume=True).check()
    with pytest.raises(
        CheckpointError, match=f"^resume: .*is of another run: {setting} was .*, now"
    ) as caught:
        replace(config, resume=True, **{setting: value}).check()
    assert caught.value.setting == "resume"


def test_the_planner_may_change_when_a_run_is_resumed(config):
    config.folder.claim(config.to_dict())
    replace(config, resume=True, experts=AdaptiveSettings("exact"), save_every=5, timeout_s=9).check()
