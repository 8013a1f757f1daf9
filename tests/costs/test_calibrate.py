import json

import pytest
from tests.telemetry.test_samples import made_up_samples

from anabranch.costs.calibrate import Calibration
from anabranch.errors import ConfigError


def test_what_was_stored_is_loaded(tmp_path):
    calibration = Calibration(tmp_path / "new" / "folder")
    assert calibration.load("a") is None
    calibration.store("a", made_up_samples())
    calibration.store("b", made_up_samples(hidden=32))
    calibration.store("b", made_up_samples(hidden=16))
    assert calibration.load("a") == made_up_samples()
    assert calibration.load("b").hidden == 16
    assert sorted(path.name for path in calibration.folder.iterdir()) == [
        "samples-3-a.json",
        "samples-3-b.json",
    ]


def _damage(text):
    content = json.loads(text)
    yield text[: len(text) // 2]
    yield ""
    yield "[1, 2]"
    yield json.dumps({**content, "version": 0})
    yield json.dumps({**content, "key": "another"})
    yield json.dumps({**content, "samples": None})
    yield json.dumps({**content, "samples": {**content["samples"], "expert_ms": {}}})
    yield "\udcff"


@pytest.mark.parametrize("kind", range(8))
def test_a_damaged_file_is_ignored_and_replaced(tmp_path, kind):
    calibration = Calibration(tmp_path)
    calibration.store("a", made_up_samples())
    path = calibration.path("a")
    damaged = list(_damage(path.read_text()))[kind]
    path.write_bytes(damaged.encode("utf-8", "surrogateescape"))
    with pytest.warns(RuntimeWarning, match="measured anew"):
        assert calibration.load("a") is None
    calibration.store("a", made_up_samples())
    assert calibration.load("a") == made_up_samples()


def test_a_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cache"):
        Calibration(tmp_path / "file").store("a", made_up_samples())


def test_a_failed_write_leaves_the_old_file(tmp_path):
    calibration = Calibration(tmp_path)
    calibration.store("a", made_up_samples())
    bad = made_up_samples()
    object.__setattr__(bad, "copy_ms_per_mb", float("nan"))
    with pytest.raises(ValueError, match="JSON"):
        calibration.store("a", bad)
    assert calibration.load("a") == made_up_samples()
    assert len(list(tmp_path.iterdir())) == 1
