"""Documents come in a fixed order under a cap, and what cannot be read is named with its remedy."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from anabranch.errors import ConfigError, DataError
from anabranch.training import sources
from anabranch.training.sources import Document, read_documents, split_documents

PLENTY = 1_000_000


def write(folder, **files):
    """Files by stem and suffix: a_txt becomes a.txt."""
    for name, content in files.items():
        (folder / ".".join(name.rsplit("_", 1))).write_bytes(
            content if isinstance(content, bytes) else content.encode()
        )
    return str(folder)


def parquet(path, **columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return str(path)


def texts(*args, max_bytes=PLENTY):
    return {document.name: document.text for document in read_documents(*args, max_bytes=max_bytes)}


def test_a_text_file_is_a_document(tmp_path):
    source = write(tmp_path, a_txt="café\n")
    assert texts(source + "/a.txt") == {"a.txt": "café\n"}


def test_a_byte_order_mark_is_not_text(tmp_path):
    assert texts(write(tmp_path, a_txt=b"\xef\xbb\xbfone")) == {"a.txt": "one"}


def test_rows_of_jsonl_and_parquet_are_documents_and_those_without_text_are_passed_over(tmp_path):
    write(tmp_path, a_jsonl='{"text": "one"}\n\n{"text": " "}\n{"text": "two", "id": 2}')
    parquet(tmp_path / "b.parquet", text=["three", None, "", "four"], id=[1, 2, 3, 4])
    expected = {"a.jsonl:1": "one", "a.jsonl:4": "two", "b.parquet:1": "three", "b.parquet:4": "four"}
    assert texts(str(tmp_path)) == expected


def test_a_folder_gives_its_known_files_at_any_depth(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    write(tmp_path / "deep" / "er", a_txt="one")
    write(tmp_path, b_txt="two", c_md="not this")
    assert texts(str(tmp_path)) == {"deep/er/a.txt": "one", "b.txt": "two"}


def test_several_sources_are_one(tmp_path):
    source = write(tmp_path, a_txt="one", b_txt="two")
    assert texts([source + "/a.txt", source + "/b.txt"]) == {"a.txt": "one", "b.txt": "two"}


def test_the_order_depends_on_names_alone(tmp_path):
    orders = []
    for content, folder in [("x\n", tmp_path / "one"), ("other\n", tmp_path / "two")]:
        folder.mkdir()
        write(folder, **{f"{name}_txt": content for name in "abcdefgh"})
        orders.append([document.name for document in read_documents(str(folder), max_bytes=PLENTY)])
    assert orders[0] == orders[1] != sorted(orders[0])


def test_the_cap_ends_at_a_line(tmp_path):
    source = write(tmp_path, a_txt="één\ntwee\ndrie\n")
    assert texts(source, max_bytes=6) == {"a.txt": "één\n"}
    assert texts(source, max_bytes=12) == {"a.txt": "één\ntwee\n"}
    assert texts(source, max_bytes=16) == {"a.txt": "één\ntwee\ndrie\n"}
    # Without a line to end at, at a character.
    assert texts(source, max_bytes=3) == {"a.txt": "é"}


def test_the_cap_counts_over_files(tmp_path):
    source = write(tmp_path, **{f"{name}_txt": "12345678\n" for name in "abcdef"})
    capped = read_documents(source, max_bytes=30)
    assert [len(document.text) for document in capped] == [9, 9, 9, 3]
    assert [d.name for d in capped] == [d.name for d in read_documents(source, max_bytes=PLENTY)][:4]


def test_the_standard_library_is_a_source():
    documents = read_documents("stdlib", max_bytes=2_000_000)
    assert sum(len(document.text.encode()) for document in documents) <= 2_000_000
    assert len(documents) > 50
    assert all(document.name.endswith(".py") for document in documents)
    assert not any("site-packages" in document.name for document in documents)
    assert documents == read_documents("stdlib", max_bytes=2_000_000)


def test_the_undecodable_fixtures_of_the_standard_library_are_passed_over(tmp_path, monkeypatch):
    (tmp_path / "site-packages").mkdir()
    write(tmp_path / "site-packages", foreign_py="1")
    write(tmp_path, good_py="x = 1\n", bad_py=b"# coding: nonsense\n", worse_py=b"\xff", empty_py="")
    write(tmp_path, latin_py="# coding: latin-1\nx = 'é'\n".encode("latin-1"))
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    assert texts("stdlib") == {"good.py": "x = 1\n", "latin.py": "# coding: latin-1\nx = 'é'\n"}


def test_a_python_without_library_sources_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(DataError, match=r"no \.py sources of its library; give files"):
        texts("stdlib")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"text\0text", "it is binary, not text; remove it"),
        ("a.txt", "café".encode("latin-1"), "byte 3 is not UTF-8; convert it"),
        ("a.txt", b"", "it is empty; remove it"),
        ("a.txt", b" \n", "it is empty; remove it"),
        ("a.jsonl", b"", "it has no text"),
        ("a.jsonl", b'{"text": "one"}\n{"tex', "line 2 is not JSON"),
        ("a.jsonl", b'{"content": "one"}\n', 'line 1 has no text field "text"; rename the field'),
        ("a.jsonl", b'{"text": 7}\n', 'line 1 has no text field "text"'),
        ("a.jsonl", b'["one"]\n', 'line 1 has no text field "text"'),
        ("a.jsonl", b'{"text": "\xff"}\n', "line 1 is not UTF-8"),
        ("a.jsonl", b'{"text": "\\ud83d"}\n', "line 1 escapes half a character"),
        ("a.parquet", b"not parquet", "not a whole Parquet file"),
        ("a.md", b"text", "cannot read .md files: give .txt, .jsonl, .parquet"),
        ("a", b"text", "cannot read this files"),
    ],
)
def test_an_unreadable_file_is_named_with_its_remedy(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as refused:
        texts(str(path))
    assert str(refused.value).startswith(f"data: {path}: ")
    assert message in str(refused.value)


@pytest.mark.parametrize("columns", [{"content": ["one"]}, {"text": [7]}])
def test_a_parquet_file_without_a_text_column_is_named_with_its_columns(tmp_path, columns):
    path = parquet(tmp_path / "a.parquet", **columns)
    with pytest.raises(DataError, match=f'no text column "text" among {next(iter(columns))}'):
        texts(path)


def test_a_parquet_file_of_empty_rows_is_refused(tmp_path):
    path = parquet(tmp_path / "a.parquet", text=["", None, " "])
    with pytest.raises(DataError, match="it has no text"):
        texts(path)


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    path = parquet(tmp_path / "a.parquet", text=["one"])
    monkeypatch.setattr(sources, "pyarrow", None)
    with pytest.raises(DataError, match=r"pyarrow is missing; pip install 'anabranch\[data\]'"):
        texts(path)


def test_a_missing_path_and_an_empty_folder_are_refused(tmp_path):
    with pytest.raises(DataError, match="nowhere: no such file or folder; `stdlib` needs none"):
        texts(str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match=r"no \.txt, \.jsonl, \.parquet file in this folder"):
        texts(str(tmp_path))
    with pytest.raises(DataError, match="no source given"):
        texts([])


def test_a_cap_below_one_byte_is_refused():
    with pytest.raises(ConfigError, match="max_bytes: 0 given"):
        texts("stdlib", max_bytes=0)


def documents(count):
    return [Document(f"folder/{n}.txt", f"text {n}") for n in range(count)]


def test_about_five_percent_of_many_documents_are_held_out():
    split = split_documents(documents(2000))
    assert 60 < len(split.validation) < 140
    assert sorted(split.train + split.validation) == sorted(documents(2000))


def test_adding_documents_moves_none_to_the_other_side():
    few, many = split_documents(documents(500)), split_documents(documents(1000))
    assert set(few.validation) == set(many.validation) & set(documents(500))


def test_some_document_is_always_held_out():
    known = [d for d in documents(200) if d not in split_documents(documents(200)).validation][:20]
    split = split_documents(known)
    assert (len(split.train), len(split.validation)) == (19, 1)


def test_few_documents_are_each_cut_at_a_line():
    text = "".join(f"line {n:03}\n" for n in range(100))
    split = split_documents([Document("a", text), Document("b", "x" * 100)])
    assert [document.text for document in split.train] == [text[: 95 * 9], "x" * 95]
    assert [document.text for document in split.validation] == [text[95 * 9 :], "x" * 5]


def test_json_lines_survive_a_round_trip(tmp_path):
    lines = ["one\ntwo", "\u2028three", "🙂"]
    write(tmp_path, a_jsonl="\n".join(json.dumps({"text": line}) for line in lines))
    assert list(texts(str(tmp_path)).values()) == lines
