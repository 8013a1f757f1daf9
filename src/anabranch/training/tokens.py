"""From text to tokens: a byte-level BPE trained once, and the token stream of a text encoded once.

Both are kept in a cache folder under a hash of what they were made from, and put there by an atomic rename:
processes that make the same thing at once do the work twice, and the first one's stays. In a run of many
ranks let one rank go first.

Shape suffix: T tokens of a stream.
"""

import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from anabranch.errors import ConfigError

END_OF_TEXT = "<|endoftext|>"
# Merges are learned from this much of the text: enough for 16 thousand of them, and quick.
SAMPLE_BYTES = 4_000_000
# Texts are encoded in pieces of so many characters, cut at lines, and so many pieces at a time.
PIECE_CHARS, PIECES = 1 << 16, 64
# Bump when a change here makes other tokens of the same text.
_RECIPE = "byte-level-bpe-1"


class TokenStream(NamedTuple):
    """All tokens of the texts, each text followed by the end-of-text token, as a read-only memory map."""

    ids_T: NDArray[np.uint16] | NDArray[np.uint32]
    digest: str


def load_or_train_tokenizer(
    texts: Iterable[str], vocab_size: int, cache_dir: Path
) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most `vocab_size` tokens, trained on the first 4 MB of the texts, or cached.

    Any text can be encoded and comes back exactly. A small text may not have enough repeated pairs for
    `vocab_size` tokens; then there are fewer. <|endoftext|> begins, ends and pads. Raises ConfigError where
    vocab_size has no room for the 256 bytes and that token.
    """
    if vocab_size < 257:
        raise ConfigError(
            f"{vocab_size} given, must be at least 257: the bytes and one more", setting="vocab_size"
        )
    sample = list(_sample(texts))
    folder = cache_dir / f"tokenizer-{vocab_size}-{_digest([_RECIPE, str(vocab_size), *sample])}"
    if not folder.is_dir():
        special = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "pad_token": END_OF_TEXT}
        trained = PreTrainedTokenizerFast(tokenizer_object=_train(sample, vocab_size), **special)
        _put(trained, folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def load_or_encode(texts: Iterable[str], tokenizer: PreTrainedTokenizerFast, cache_dir: Path) -> TokenStream:
    """The texts' token stream, encoded or taken from cache: uint16 where every id fits, else uint32.

    An <|endoftext|> that a text itself contains is encoded as ordinary characters.
    """
    known = list(texts)
    encoder = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    digest = _digest([_RECIPE, encoder.to_str(), *known])
    path = cache_dir / f"stream-{digest}.npy"
    if not path.is_file():
        encoder.encode_special_tokens = True
        end = tokenizer.eos_token_id
        assert isinstance(end, int)
        dtype = np.uint16 if encoder.get_vocab_size() <= 1 << 16 else np.uint32
        ids_T = np.concatenate([np.zeros(0, dtype), *_encode(encoder, known, end, dtype)])
        cache_dir.mkdir(parents=True, exist_ok=True)
        temporary = _beside(path)
        try:
            with temporary.open("wb") as file:
                np.save(file, ids_T)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    return TokenStream(np.load(path, mmap_mode="r"), digest)


def _sample(texts: Iterable[str]) -> Iterator[str]:
    left = SAMPLE_BYTES
    for text in texts:
        content = text.encode()
        yield content[:left].decode(errors="ignore")
        left -= len(content)
        if left <= 0:
            return


def _train(sample: list[str], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample, trainer)
    return tokenizer


def _encode(
    encoder: Tokenizer, texts: list[str], end: int, dtype: type[np.uint16 | np.uint32]
) -> Iterator[NDArray[np.uint16 | np.uint32]]:
    pieces = (piece for text in texts for piece in _pieces(text))
    while some := list(islice(pieces, PIECES)):
        encodings = encoder.encode_batch_fast([text for text, _ in some], add_special_tokens=False)
        for encoding, (_, last) in zip(encodings, some, strict=True):
            yield np.array([*encoding.ids, end] if last else encoding.ids, dtype)


def _pieces(text: str) -> Iterator[tuple[str, bool]]:
    """The text in pieces, and of each whether it is the last."""
    start = 0
    while len(text) - start > PIECE_CHARS:
        most = start + PIECE_CHARS
        stop = text.rfind("\n", start, most) + 1 or most
        yield text[start:stop], False
        start = stop
    yield text[start:], True


def _digest(parts: Iterable[str]) -> str:
    """Of the parts and of where each ends."""
    digest = hashlib.sha256()
    for part in parts:
        content = part.encode()
        digest.update(len(content).to_bytes(8, "big"))
        digest.update(content)
    return digest.hexdigest()[:16]


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid4().hex}.tmp")


def _put(trained: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save, unless another process has been first."""
    temporary = _beside(folder)
    try:
        trained.save_pretrained(temporary)
        os.rename(temporary, folder)
    except OSError:
        if not folder.is_dir():
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
