"""The folder of a run: who may write there, and what is removed."""

import json

import pytest

from anabranch.errors import CheckpointError, ConfigError
from anabranch.training.folder import RunFolder, require_folder, write_json

IDENTITY = {"model": "tiny", "data": ["stdlib"]}


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path / "run")


def check(folder, *, resume=False, overwrite=False, identity=IDENTITY):
    folder.check(identity, resume=resume, overwrite=overwrite)


def finish(folder, *, stopped_early):
    write_json(folder.summary, {"stopped_early": stopped_early, "steps": 3})


def test_a_run_starts_in_a_new_or_empty_folder(folder):
    check(folder)
    folder.path.mkdir()
    check(folder)


def test_a_run_is_not_replaced_unasked(folder):
    folder.claim(IDENTITY)
    with pytest.raises(ConfigError, match=r"^out: .* already holds a run; .*--overwrite.*--resume"):
        check(folder)
    check(folder, overwrite=True)
    check(folder, resume=True)


def test_a_folder_of_something_else_is_refused_even_to_overwrite(folder):
    """A model folder has a config.json too: it must never be taken for a run."""
    folder.path.mkdir()
    (folder.path / "config.json").write_text("{}")
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match=r"^out: .* not of a run; name a new or empty folder"):
            check(folder, overwrite=overwrite)


def test_nothing_is_resumed_where_there_is_no_run(folder):
    with pytest.raises(ConfigError, match=r"^out: .* holds no run; start one without --resume"):
        check(folder, resume=True)
    with pytest.raises(ConfigError, match=r"^resume: resume and overwrite contradict"):
        check(folder, resume=True, overwrite=True)


@pytest.mark.parametrize("content", ["", "{", "[1]", "3"])
def test_a_damaged_run_file_is_told(folder, content):
    folder.claim(IDENTITY)
    folder.run_file.write_text(content)
    with pytest.raises(CheckpointError, match=r"^resume: .*run.json is damaged .*--overwrite"):
        check(folder, resume=True)


def test_a_run_is_finished_once_its_summary_says_so(folder):
    assert folder.finished() is None
    assert not folder.resumable
    folder.claim(IDENTITY)
    assert folder.finished() is None
    assert not folder.resumable
    finish(folder, stopped_early=True)
    assert folder.finished() is None
    finish(folder, stopped_early=False)
    assert folder.finished() == {"stopped_early": False, "steps": 3}
    assert folder.resumable


def test_a_complete_checkpoint_can_be_gone_on_from(folder):
    folder.claim(IDENTITY)
    (folder.checkpoints / "checkpoint-5").mkdir(parents=True)
    assert not folder.resumable
    (folder.checkpoints / "checkpoint-5" / "complete.json").write_text("{}")
    assert folder.resumable


def test_claiming_removes_the_old_run_and_nothing_else(folder):
    folder.claim(IDENTITY)
    written = [folder.metrics, folder.trace, folder.summary, folder.comparison]
    for file in (*written, folder.path / "notes.txt"):
        file.write_text("x")
    for inner in (folder.tensorboard, folder.checkpoints, folder.model):
        (inner / "deep").mkdir(parents=True)
    folder.claim({"model": "small"})
    assert {path.name for path in folder.path.iterdir()} == {"run.json", "notes.txt"}
    assert json.loads(folder.run_file.read_text()) == {"model": "small"}


def test_scratch_is_outside_the_folder_and_needs_no_new_one(tmp_path):
    assert RunFolder(tmp_path / "a" / "b" / "run").scratch == tmp_path / ".run.starting"
    assert not (tmp_path / "a").exists()


def test_json_is_written_whole_or_not_at_all(tmp_path):
    file = tmp_path / "x.json"
    write_json(file, {"a": 1})
    with pytest.raises(ValueError, match="nan"):
        write_json(file, {"a": float("nan")})
    assert json.loads(file.read_text()) == {"a": 1}


def test_a_folder_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("anabranch.training.folder.os.access", lambda path, mode: path != tmp_path)
    with pytest.raises(ConfigError, match=f"^out: {tmp_path} cannot be written; name another folder"):
        require_folder("out", tmp_path / "new" / "run")
