"""A plan's file holds what train understands, and refuses by name what it cannot do."""

from dataclasses import replace

import pytest

from anabranch.errors import ConfigError
from anabranch.planner.launch import read_launch, train_settings, trainable, write_launch
from anabranch.planner.space import layouts
from anabranch.workload.hf_config import read_shape
from anabranch.workload.layout import Layout

RUNNABLE = Layout(4096, 64, 2, ep=8, dp=32, shard="full")


def test_settings_are_those_of_the_layout(tmp_path):
    settings = train_settings(RUNNABLE, "here/config.json", 700, "bounded")
    assert settings == {
        "model": "here/config.json", "ranks": 32, "ep_size": 8, "batch_size": 2, "sequence_length": 4096,
        "dtype": "bfloat16", "steps": 700, "planner": "bounded", "transport": "auto",
    }  # fmt: skip
    write_launch(tmp_path / "plan.json", settings, {})
    assert read_launch(tmp_path / "plan.json") == settings


@pytest.mark.parametrize(
    ("setting", "changes", "told"),
    [
        ("tp", {"tp": 2, "dp": 16}, "`anabranch train` has no tensor parallelism: tp must be 1"),
        ("pp", {"pp": 2, "dp": 16}, "`anabranch train` has no pipeline parallelism: pp must be 1"),
        ("cp", {"cp": 2, "dp": 16}, "has no context parallelism"),
        ("etp", {"etp": 2}, "has no tensor parallelism inside experts"),
        ("recompute", {"recompute": "full"}, "recomputes nothing"),
        ("shard", {"shard": "optimizer"}, "shards parameters over all ranks"),
        ("global_batch", {"global_batch": 128}, "use 64, dp x micro_batch, not 128"),
        ("precision", {"precision": "fp8"}, "computes in fp32 or bf16"),
    ],
)
def test_what_train_cannot_do_is_named(setting, changes, told):
    with pytest.raises(ConfigError, match=told) as error:
        train_settings(replace(RUNNABLE, **changes), "tiny", 1, "static")
    assert error.value.setting == setting


def test_trainable_is_what_settings_can_be_made_of():
    space = layouts(read_shape("OLMoE-1B-7B"), 8, seq_len=8192, global_batch=16, domain=8)
    able = trainable(space.columns)
    assert 0 < able.sum() < len(space)
    for row in range(0, len(space), 7):
        try:
            train_settings(space.layout(row), "tiny", 1, "static")
        except ConfigError:
            assert not able[row]
        else:
            assert able[row]


@pytest.mark.parametrize(
    ("content", "setting"),
    [
        ("{", "plan"),
        ("[]", "plan"),
        ('{"anabranch_plan": 99, "train": {}}', "plan"),
        ('{"anabranch_plan": 1, "train": {"rank": 2}}', "train.rank"),
        ('{"anabranch_plan": 1, "train": {"ranks": "2"}}', "train.ranks"),
        ('{"anabranch_plan": 1, "train": {"ranks": true}}', "train.ranks"),
    ],
)
def test_what_is_wrong_with_a_file_is_named(tmp_path, content, setting):
    file = tmp_path / "plan.json"
    file.write_text(content)
    with pytest.raises(ConfigError) as error:
        read_launch(file)
    assert error.value.setting == setting
    assert str(file) in str(error.value)


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"emit: .* cannot be written"):
        write_launch(tmp_path / "no" / "plan.json", {}, {})
