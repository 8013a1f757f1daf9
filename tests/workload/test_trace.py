"""A trace comes back as it was recorded, and a damaged file names what is wrong with it."""

import json

import numpy as np
import pytest

from anabranch.errors import TraceError
from anabranch.workload.routing import routing_counts, routing_ids
from anabranch.workload.trace import TraceWriter, load_trace

SIZES = {"ranks": 2, "experts": 8, "tokens": 16, "top_k": 2, "max_mean": 1.5}
RUN = {"model_type": "mixtral", "experts": 8, "top_k": 2, "ranks": 2, "tokens_per_rank": 16}


def record(path, *, with_ids=False, name="W4", steps=3):
    with TraceWriter(path, **RUN) as writer:
        for step in range(steps):
            for layer in range(2):
                asked = {**SIZES, "step": step, "seed": layer}
                ids_RSK = routing_ids(name, **asked) if with_ids else None
                counts_RE = routing_counts(name, **asked)
                writer.append(layer=layer, step=step, micro=0, counts_RE=counts_RE, ids_RSK=ids_RSK)
    return path


def damage(path, **changes):
    """Rewrite some fields of a trace; None removes one."""
    with np.load(path) as file:
        arrays = {**{name: file[name] for name in file.files}, **changes}
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


def metadata(**changes):
    known = {**RUN, "created": "2026-11-23T00:00:00+00:00", "anabranch_version": "0.1.0"}
    return np.array(json.dumps({**known, **changes}))


def test_counts_places_and_metadata_come_back(tmp_path):
    trace = load_trace(record(tmp_path / "new" / "trace.npz"))
    assert trace.counts_NRE.dtype == np.int64
    assert np.array_equal(trace.counts_NRE[3], routing_counts("W4", **SIZES, step=1, seed=1))
    assert trace.layer_N.tolist() == [0, 1] * 3
    assert trace.step_N.tolist() == [0, 0, 1, 1, 2, 2]
    assert trace.micro_N.tolist() == [0] * 6
    assert trace.metadata.items() >= RUN.items()
    assert trace.ids is None
    with pytest.raises(TraceError, match="counts only"):
        trace.ids_of(0)


def test_token_ids_come_back_by_source_rank(tmp_path):
    trace = load_trace(record(tmp_path / "trace.npz", with_ids=True))
    expected_RSK = routing_ids("W4", **SIZES, step=2, seed=1)
    assert len(expected_RSK[0]) != len(expected_RSK[1])
    for got_SK, expected_SK in zip(trace.ids_of(5), expected_RSK, strict=True):
        assert np.array_equal(got_SK, expected_SK)


def test_summary_has_mean_and_worst_max_mean_of_each_layer(tmp_path):
    with TraceWriter(tmp_path / "trace.npz", **RUN) as writer:
        for layer, rows in [(4, 8), (1, 8), (4, 12)]:
            counts_RE = np.zeros((2, 8), dtype=np.int64)
            counts_RE[:, 1], counts_RE[:, 6] = rows, 16 - rows
            writer.append(layer=layer, step=0, micro=0, counts_RE=counts_RE)
    assert load_trace(tmp_path / "trace.npz").summary() == [(1, 1, 1.0, 1.0), (4, 2, 1.25, 1.5)]


def test_a_run_without_records_is_a_trace_without_records(tmp_path):
    trace = load_trace(record(tmp_path / "trace.npz", steps=0))
    assert trace.counts_NRE.shape == (0, 2, 8)
    assert trace.summary() == []


def test_saving_again_keeps_all_records_and_leaves_nothing_else_behind(tmp_path):
    writer = TraceWriter(tmp_path / "trace.npz", **RUN)
    for step in range(2):
        writer.append(layer=0, step=step, micro=0, counts_RE=routing_counts("W1", **SIZES))
        writer.save()
        assert load_trace(writer.path).step_N.tolist() == list(range(step + 1))
    assert [file.name for file in tmp_path.iterdir()] == ["trace.npz"]


def test_an_exception_keeps_the_trace_of_before(tmp_path):
    path = record(tmp_path / "trace.npz")
    before = path.read_bytes()
    with pytest.raises(RuntimeError, match="rank died"), TraceWriter(path, **RUN) as writer:
        writer.append(layer=0, step=0, micro=0, counts_RE=routing_counts("W1", **SIZES))
        raise RuntimeError("rank died")
    assert path.read_bytes() == before


def test_a_failed_write_keeps_the_trace_of_before(tmp_path, monkeypatch):
    path = record(tmp_path / "trace.npz")
    before = path.read_bytes()

    def full_disk(file, **arrays):
        file.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(np, "savez_compressed", full_disk)
    with pytest.raises(OSError, match="no space left"):
        record(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["trace.npz"]


COUNTS = np.zeros((6, 2, 8), dtype=np.int32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema_version": None}, "field 'schema_version' is missing"),
        ({"schema_version": np.array(2)}, "field 'schema_version' is 2, this version reads 1"),
        ({"schema_version": np.array([1])}, "field 'schema_version' is int64 of 1 dimensions"),
        ({"counts": None}, "field 'counts' is missing"),
        ({"counts": COUNTS.astype(float)}, "field 'counts' is float64 of 3 dimensions, not integers"),
        ({"counts": COUNTS[:, :1]}, r"field 'counts' has shape \(6, 1, 8\), not \(N, 2, 8\)"),
        ({"counts": COUNTS - 2}, "field 'counts' must be rows of whole tokens"),
        ({"counts": COUNTS + np.eye(1, 8, dtype=int)}, "field 'counts' must be rows of whole tokens"),
        ({"layer": np.zeros(5, int)}, "field 'layer' has 5 records, counts has 6"),
        ({"micro": None}, "field 'micro' is missing"),
        ({"metadata": np.array("{")}, "field 'metadata' is not JSON"),
        ({"metadata": np.array("[]")}, "field 'metadata' is not a JSON object"),
        ({"metadata": metadata(top_k="2")}, "field 'metadata.top_k' is '2', not int"),
        ({"metadata": metadata(ranks=0)}, "field 'metadata.ranks' is 0, must be at least 1"),
        ({"metadata": metadata(model_type=None)}, "field 'metadata.model_type' is None, not str"),
        ({"metadata": np.array({}, dtype=object)}, "field 'metadata' cannot be read"),
        ({"ids": np.zeros((3, 2), int)}, r"field 'ids' has shape \(3, 2\), counts make it \(192, 2\)"),
        ({"ids": np.full((192, 2), 8)}, "field 'ids' must lie between 0 and 7"),
        ({"ids": np.zeros((192, 2), int)}, "field 'ids' does not add up to counts"),
    ],
)
def test_a_damaged_field_is_named_with_its_file(tmp_path, changes, message):
    path = damage(record(tmp_path / "trace.npz"), **changes)
    with pytest.raises(TraceError, match=message) as refused:
        load_trace(path)
    assert str(path) in str(refused.value)


def test_a_flipped_byte_is_noticed(tmp_path):
    path = record(tmp_path / "trace.npz")
    content = bytearray(path.read_bytes())
    content[content.index(b"counts.npy") + 60] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(TraceError, match="field 'counts' cannot be read"):
        load_trace(path)


def test_a_file_that_was_cut_short_or_is_missing_is_refused(tmp_path):
    path = record(tmp_path / "trace.npz")
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(TraceError, match="or cut short"):
        load_trace(path)
    with pytest.raises(TraceError, match="no such file"):
        load_trace(tmp_path / "other.npz")
