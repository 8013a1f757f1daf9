"""Windows of tokens: each token once, in an order that the seed decides, with a fingerprint to resume by."""

import re

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from anabranch.errors import ConfigError, DataError
from anabranch.training.data import PackedDataset, build_data
from anabranch.training.tokens import TokenStream

STREAM = TokenStream(np.arange(1003, dtype=np.uint16), "digest")


@pytest.fixture
def folder(tmp_path):
    """Thirty documents of real enough prose."""
    for n in range(30):
        lines = (f"river {n:02} meets channel {n * m % 37} at mile {m}\n" for m in range(60))
        (tmp_path / f"{n}.txt").write_text("".join(lines))
    return tmp_path


def build(folder, **changes):
    asked = {"vocab_size": 300, "sequence_length": 32, "seed": 1, "cache_dir": folder / "cache", **changes}
    return build_data(str(folder), **asked)


def starts(dataset):
    return [int(dataset[index]["input_ids"][0]) for index in range(len(dataset))]


def test_a_window_is_consecutive_tokens_and_its_own_labels():
    item = PackedDataset(STREAM, sequence_length=10, seed=None)[3]
    assert set(item) == {"input_ids", "labels"}
    assert item["input_ids"].dtype == item["labels"].dtype == torch.int64
    assert item["input_ids"].tolist() == item["labels"].tolist() == list(range(30, 40))
    item["labels"][0] = -100
    assert item["input_ids"][0] == 30


def test_every_whole_window_comes_once_shuffled_by_the_seed():
    in_order = PackedDataset(STREAM, sequence_length=10, seed=None)
    assert starts(in_order) == list(range(0, 1000, 10))
    orders = [starts(PackedDataset(STREAM, sequence_length=10, seed=seed)) for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2]) == starts(in_order) != orders[0]


def test_default_collation_stacks_windows():
    loader = DataLoader(PackedDataset(STREAM, sequence_length=10, seed=1), batch_size=4)
    batches = [batch["input_ids"].shape for batch in loader]
    assert batches == [(4, 10)] * 25


def test_the_fingerprint_changes_with_text_length_and_seed_alone():
    def fingerprint(digest="digest", sequence_length=10, seed=1):
        stream = TokenStream(STREAM.ids_T, digest)
        return PackedDataset(stream, sequence_length=sequence_length, seed=seed).fingerprint

    assert fingerprint() == fingerprint()
    others = [fingerprint(digest="other"), fingerprint(sequence_length=11), fingerprint(seed=2)]
    assert len({fingerprint(), *others}) == 4


def test_a_stream_shorter_than_a_window_is_refused():
    with pytest.raises(DataError, match="the text has 1003 tokens, not one window of sequence_length=1004"):
        PackedDataset(STREAM, sequence_length=1004, seed=1)


def test_a_window_of_one_token_is_refused():
    with pytest.raises(ConfigError, match="sequence_length: 1 given"):
        PackedDataset(STREAM, sequence_length=1, seed=1)


def test_training_and_validation_share_no_document(folder):
    data = build(folder)
    assert data.train_tokens == 32 * len(data.train)
    assert data.validation_tokens == 32 * len(data.validation) > 0
    rivers = []
    for side in (data.train, data.validation):
        windows = (data.tokenizer.decode(side[index]["input_ids"]) for index in range(len(side)))
        rivers.append({river for window in windows for river in re.findall(r"river (\d\d) meets", window)})
    assert 20 < len(rivers[0]) < 30
    assert len(rivers[0]) + len(rivers[1]) == 30
    assert rivers[0].isdisjoint(rivers[1])


def test_the_fingerprint_is_of_the_data_not_of_where_it_is_cached(folder):
    data = build(folder)
    assert build(folder).fingerprint == data.fingerprint
    assert build(folder, cache_dir=folder / "other").fingerprint == data.fingerprint
    for change in [{"seed": 2}, {"vocab_size": 310}, {"sequence_length": 31}, {"max_bytes": 50_000}]:
        assert build(folder, **change).fingerprint != data.fingerprint


def test_changed_text_has_another_fingerprint(folder):
    before = build(folder).fingerprint
    file = folder / "7.txt"
    file.write_text(file.read_text().replace("river 07", "River 07", 1))
    assert build(folder).fingerprint != before


def test_the_standard_library_trains(tmp_path):
    asked = {
        "vocab_size": 512,
        "sequence_length": 64,
        "seed": 0,
        "cache_dir": tmp_path,
        "max_bytes": 1_000_000,
    }
    data = build_data("stdlib", **asked)
    assert data.train_tokens > 200_000
    assert data.validation_tokens > 64
    assert len(data.tokenizer) == 512
