"""Where training text comes from, and which of it is held out.

A *document* is one text between two end-of-text tokens: a .txt file, a row of a .jsonl or .parquet file, or
one source file of the Python standard library. Its name is the path relative to its source (and the row).
"""

import codecs
import hashlib
import json
import sysconfig
import tokenize
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from anabranch.errors import ConfigError, DataError

try:  # of the extra `data`
    import pyarrow
    import pyarrow.parquet
except ImportError:
    pyarrow = None

STDLIB = "stdlib"
VALIDATION_SHARE = 0.05
# Fewer documents than this are each cut in two: whole ones would be too coarse a split.
FEW_DOCUMENTS = 20


class Document(NamedTuple):
    name: str
    text: str


class Split(NamedTuple):
    """Documents to train on, and documents held out."""

    train: tuple[Document, ...]
    validation: tuple[Document, ...]


class _File(NamedTuple):
    """A file, its name in its source, and how to read at least so many bytes of it as documents."""

    path: Path
    name: str
    read: Callable[["_File", int], Iterator[Document]]


def read_documents(source: str | list[str], *, max_bytes: int) -> list[Document]:
    """At most `max_bytes` of UTF-8 text from the sources, in an order that only the files' names decide.

    source: paths of .txt, .jsonl (field "text") and .parquet (column "text") files or of folders of them, and
    the name `stdlib` for the sources of the running Python's standard library; a folder of that name is
    reached as ./stdlib. Files are taken in the order of a hash of their names, so that the cap leaves an even
    sample; the document that meets the cap is cut at a line. Rows without text are passed over, and so are
    the few files of the standard library that are made to be undecodable.

    Raises DataError for anything that cannot be read, naming the path; ConfigError for max_bytes < 1.
    """
    if max_bytes < 1:
        raise ConfigError(f"{max_bytes} given, must be at least 1", setting="max_bytes")
    sources = [source] if isinstance(source, str) else source
    files = [file for each in sources for file in _files(each)]
    files.sort(key=lambda file: (_hash(file.name, "order"), str(file.path)))
    documents: list[Document] = []
    left = max_bytes
    for file in files:
        for document in file.read(file, left):
            size = len(document.text.encode())
            documents.append(document if size <= left else Document(document.name, _cut(document.text, left)))
            left -= size
            if left <= 0:
                return documents
    if not documents:
        raise DataError(f"no source given: {sources}", setting="data")
    return documents


def split_documents(documents: Iterable[Document]) -> Split:
    """About 5 % of the documents for validation, by a hash of each one's name.

    A document's side does not depend on the others, so adding files moves none; only where no name's hash
    falls on the validation side does the nearest one go there. Of fewer than 20 documents the last 5 % of
    each one's text is held out instead, cut at a line.
    """
    known = list(documents)
    if len(known) < FEW_DOCUMENTS:
        cuts = [_last_lines(document.text) for document in known]
        heads = (Document(d.name, d.text[:cut]) for d, cut in zip(known, cuts, strict=True))
        tails = (Document(d.name, d.text[cut:]) for d, cut in zip(known, cuts, strict=True))
        return Split(*(tuple(d for d in side if d.text.strip()) for side in (heads, tails)))
    limit = max(VALIDATION_SHARE, min(_hash(document.name, "split") for document in known))
    held_out = [_hash(document.name, "split") <= limit for document in known]
    return Split(
        tuple(document for document, out in zip(known, held_out, strict=True) if not out),
        tuple(document for document, out in zip(known, held_out, strict=True) if out),
    )


def _hash(name: str, purpose: str) -> float:
    """A number in [0, 1) that is the same on every machine. The purposes do not correlate."""
    digest = hashlib.sha256(f"{purpose}\0{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _last_lines(text: str) -> int:
    """Where the last 5 % of a text begin: at a line if there is one."""
    at = int(len(text) * (1 - VALIDATION_SHARE))
    return text.rfind("\n", 0, at) + 1 or at


def _cut(text: str, size: int) -> str:
    """The first `size` bytes of a text, at a line if there is one, at a character else."""
    head = text.encode()[:size].decode(errors="ignore")
    return head[: head.rfind("\n") + 1 or len(head)]


def _files(source: str) -> list[_File]:
    if source == STDLIB:
        return _stdlib_files()
    path = Path(source)
    if path.is_dir():
        found = [_File(p, p.relative_to(path).as_posix(), _READERS[p.suffix]) for p in _under(path)]
        if not found:
            raise DataError(f"{path}: no {_SUFFIXES} file in this folder", setting="data")
        return found
    if not path.exists():
        raise DataError(f"{path}: no such file or folder; `{STDLIB}` needs none", setting="data")
    if path.suffix not in _READERS:
        raise DataError(
            f"{path}: cannot read {path.suffix or 'this'} files: give {_SUFFIXES}", setting="data"
        )
    return [_File(path, path.name, _READERS[path.suffix])]


def _under(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.suffix in _READERS and path.is_file()]


def _stdlib_files() -> list[_File]:
    root = Path(sysconfig.get_paths()["stdlib"])
    installed = {"site-packages", "dist-packages"}
    paths = [path for path in root.rglob("*.py") if installed.isdisjoint(path.relative_to(root).parts)]
    if not paths:
        raise DataError(f"{root}: this Python has no .py sources of its library; give files", setting="data")
    return [_File(path, path.relative_to(root).as_posix(), _read_stdlib) for path in paths]


def _read_stdlib(file: _File, most_bytes: int) -> Iterator[Document]:
    try:
        with tokenize.open(file.path) as opened:  # honours the coding line
            text = opened.read()
    except (SyntaxError, UnicodeDecodeError):  # fixtures of the tests of the decoder itself
        return
    if text.strip():
        yield Document(file.name, text)


def _read_text(file: _File, most_bytes: int) -> Iterator[Document]:
    try:
        with file.path.open("rb") as opened:
            content = opened.read(most_bytes + 1)
    except OSError as error:
        raise _unreadable(file, str(error), "check its permissions") from error
    if b"\0" in content:
        raise _unreadable(file, "it is binary, not text", "remove it, or give its text as UTF-8")
    try:
        # Not final where the cap ends the reading: that may be inside a character.
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(content, final=len(content) <= most_bytes)
    except UnicodeDecodeError as error:
        problem = f"byte {error.start} is not UTF-8"
        raise _unreadable(file, problem, "convert it, for example with `iconv -t UTF-8`") from error
    if not text.strip():
        raise _unreadable(file, "it is empty", "remove it")
    yield Document(file.name, text)


def _read_jsonl(file: _File, most_bytes: int) -> Iterator[Document]:
    empty = True
    try:
        with file.path.open("rb") as opened:
            for number, line in enumerate(opened, 1):
                text = _text_of(file, number, line) if line.strip() else ""
                if text.strip():
                    empty = False
                    yield Document(f"{file.name}:{number}", text)
    except OSError as error:
        raise _unreadable(file, str(error), "check its permissions") from error
    if empty:
        raise _unreadable(file, "it has no text", "remove it")


def _text_of(file: _File, number: int, line: bytes) -> str:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise _unreadable(file, f"line {number} is not UTF-8", "convert it to UTF-8") from error
    except json.JSONDecodeError as error:
        raise _unreadable(file, f"line {number} is not JSON ({error})", "one JSON object a line") from error
    text = row.get("text") if isinstance(row, dict) else None
    if not isinstance(text, str):
        raise _unreadable(file, f'line {number} has no text field "text"', 'rename the field to "text"')
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise _unreadable(file, f"line {number} escapes half a character (a lone surrogate)", "remove it")
    return text


def _read_parquet(file: _File, most_bytes: int) -> Iterator[Document]:
    if pyarrow is None:
        raise _unreadable(file, "pyarrow is missing", "pip install 'anabranch[data]'")
    empty = True
    try:
        with pyarrow.parquet.ParquetFile(file.path) as table:
            types = {field.name: str(field.type) for field in table.schema_arrow}
            if types.get("text") not in ("string", "large_string"):
                problem = f'no text column "text" among {", ".join(types)}'
                raise _unreadable(file, problem, 'rename the column to "text"')
            batches = table.iter_batches(batch_size=1024, columns=["text"])
            rows = (text for batch in batches for text in batch.column(0).to_pylist())
            for number, text in enumerate(rows, 1):
                if text and text.strip():
                    empty = False
                    yield Document(f"{file.name}:{number}", text)
    except (pyarrow.ArrowException, OSError) as error:
        raise _unreadable(file, f"not a whole Parquet file ({error})", "write it again") from error
    if empty:
        raise _unreadable(file, "it has no text", "remove it")


def _unreadable(file: _File, problem: str, remedy: str) -> DataError:
    return DataError(f"{file.path}: {problem}; {remedy}", setting="data")


_READERS: dict[str, Callable[[_File, int], Iterator[Document]]] = {
    ".txt": _read_text,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
_SUFFIXES = ", ".join(_READERS)
