"""Training data: text in, windows of tokens out, in the same order every time.

Shape suffixes: T tokens of a stream, W windows, S tokens of a window.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from anabranch.errors import ConfigError, DataError
from anabranch.training.sources import read_documents, split_documents
from anabranch.training.tokens import TokenStream, load_or_encode, load_or_train_tokenizer


class PackedDataset(Dataset[dict[str, torch.Tensor]]):
    """A token stream cut into windows of `sequence_length`, without padding.

    Windows do not overlap; the tokens after the last whole one are left out. They come in an order that the
    seed shuffles, or in their own for seed None: take them one after the other (no shuffling sampler), and
    the count of windows taken is the position to resume from. Items are {"input_ids", "labels"}, both int64
    (S,) and equal, since a causal model shifts its labels itself; torch's default collation stacks them.

    Raises ConfigError for a sequence_length below 2, DataError for a stream shorter than a window.
    """

    def __init__(self, stream: TokenStream, *, sequence_length: int, seed: int | None) -> None:
        if sequence_length < 2:
            raise ConfigError(f"{sequence_length} given, must be at least 2", setting="sequence_length")
        windows = stream.ids_T.shape[0] // sequence_length
        if windows == 0:
            raise DataError(
                f"the text has {stream.ids_T.shape[0]} tokens, not one window of sequence_length="
                f"{sequence_length}: give more text, or lower sequence_length",
                setting="data",
            )
        self._stream = stream
        self._sequence_length = sequence_length
        self._seed = seed
        in_order_W = np.arange(windows)
        self._order_W = in_order_W if seed is None else np.random.default_rng(seed).permutation(in_order_W)

    def __len__(self) -> int:
        return len(self._order_W)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        start = int(self._order_W[index]) * self._sequence_length
        ids_S = torch.from_numpy(self._stream.ids_T[start : start + self._sequence_length].astype(np.int64))
        return {"input_ids": ids_S, "labels": ids_S.clone()}

    @property
    def fingerprint(self) -> str:
        """The same for the same windows in the same order: text, tokenizer, sequence_length and seed."""
        parts = f"{self._stream.digest}/{self._sequence_length}/{self._seed}"
        return hashlib.sha256(parts.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class TrainingData:
    """What a run trains and evaluates on. A resumed run checks that `fingerprint` is still the same."""

    tokenizer: PreTrainedTokenizerFast
    train: PackedDataset
    validation: PackedDataset
    fingerprint: str
    train_tokens: int
    validation_tokens: int


def build_data(
    source: str | list[str],
    *,
    vocab_size: int,
    sequence_length: int,
    seed: int,
    cache_dir: Path,
    max_bytes: int = 24_000_000,
    tokenizer: PreTrainedTokenizerFast | None = None,
) -> TrainingData:
    """Read, split, tokenise and pack text; tokenizer and tokens are cached in `cache_dir`.

    source: see `read_documents` ("stdlib", files, folders). tokenizer: a checkpoint's own; None trains one of
    vocab_size, from the training side only.
    seed shuffles the training windows; those of validation stay in order. Raises DataError for text that is
    missing, unreadable or too small, ConfigError for settings out of range.
    """
    split = split_documents(read_documents(source, max_bytes=max_bytes))
    train_texts = [document.text for document in split.train]
    if tokenizer is None:
        tokenizer = load_or_train_tokenizer(train_texts, vocab_size, cache_dir)
    train_stream = load_or_encode(train_texts, tokenizer, cache_dir)
    held_out = load_or_encode((document.text for document in split.validation), tokenizer, cache_dir)
    train = PackedDataset(train_stream, sequence_length=sequence_length, seed=seed)
    validation = PackedDataset(held_out, sequence_length=sequence_length, seed=None)
    both = f"{train.fingerprint}/{validation.fingerprint}"
    return TrainingData(
        tokenizer=tokenizer,
        train=train,
        validation=validation,
        fingerprint=hashlib.sha256(both.encode()).hexdigest()[:16],
        train_tokens=len(train) * sequence_length,
        validation_tokens=len(validation) * sequence_length,
    )
