"""Which checkpoint a run goes on from, and which are removed."""

import pytest

from anabranch.errors import CheckpointError
from anabranch.training.checkpoints import (
    complete_checkpoints,
    difference,
    discard_after,
    keep_newest,
    latest_checkpoint,
    mark_complete,
)

IDENTITY = {"model": "tiny", "seed": 0}


@pytest.fixture
def folder(tmp_path):
    """Complete checkpoints of steps 5, 10 and 100, and one of step 105 that a dying run left unfinished."""
    for step in (100, 5, 10, 105):
        checkpoint = tmp_path / f"checkpoint-{step}"
        checkpoint.mkdir()
        (checkpoint / "model.safetensors").write_text("weights")
        if step != 105:
            mark_complete(checkpoint, step, IDENTITY)
    return tmp_path


def names(folder):
    return {path.name for path in folder.iterdir()}


def test_the_newest_complete_one_is_gone_on_from(folder):
    assert [path.name for path in complete_checkpoints(folder)] == [
        "checkpoint-5",
        "checkpoint-10",
        "checkpoint-100",
    ]
    assert latest_checkpoint(folder, IDENTITY) == folder / "checkpoint-100"


def test_without_a_complete_one_there_is_nothing_to_resume(tmp_path):
    (tmp_path / "checkpoint-5").mkdir()
    with pytest.raises(CheckpointError, match=r"^resume: .* no complete checkpoint; .*--overwrite"):
        latest_checkpoint(tmp_path, IDENTITY)


def test_a_checkpoint_of_another_run_is_refused_with_the_difference(folder):
    with pytest.raises(CheckpointError, match=r"checkpoint-100 is of another run: seed was 0, now 1;"):
        latest_checkpoint(folder, IDENTITY | {"seed": 1})


@pytest.mark.parametrize("mark", ["", "{}", "[]", '{"identity": 3}'])
def test_a_damaged_mark_is_told_with_the_way_out(folder, mark):
    (folder / "checkpoint-100" / "complete.json").write_text(mark)
    with pytest.raises(CheckpointError, match=r"complete.json is damaged; remove .*checkpoint-100 to go on"):
        latest_checkpoint(folder, IDENTITY)


def test_the_newest_are_kept_by_step_not_by_name(folder):
    keep_newest(folder, 2)
    assert names(folder) == {"checkpoint-10", "checkpoint-100", "checkpoint-105"}


def test_a_resumed_run_discards_what_it_writes_again(folder):
    discard_after(folder / "checkpoint-10")
    assert names(folder) == {"checkpoint-5", "checkpoint-10"}


def test_an_unfinished_checkpoint_is_discarded_even_before_the_resumed_one(folder):
    (folder / "checkpoint-7").mkdir()
    discard_after(folder / "checkpoint-100")
    assert names(folder) == {"checkpoint-5", "checkpoint-10", "checkpoint-100"}


def test_differences_are_named_on_both_sides():
    assert difference({"a": 1, "b": 2}, {"a": 1, "b": 2}) == ""
    assert (
        difference({"a": 1, "c": 3}, {"a": 2, "b": 2})
        == "a was 1, now 2, b was None, now 2, c was 3, now None"
    )
