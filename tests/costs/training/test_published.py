"""Reading the table of published measurements."""

import csv

import pytest

from anabranch.costs.training.published import TABLE, read_published
from anabranch.errors import DataError

ROWS, UNUSABLE = read_published()
BY_ID = {row.id: row for row in ROWS}


def write(tmp_path, **changes):
    """A table of the shipped table's first row, with cells changed."""
    with TABLE.open(newline="") as file:
        row = next(csv.DictReader(file))
    path = tmp_path / "table.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, row | changes)
        writer.writeheader()
        writer.writerow(row | changes)
    return path


def test_every_shipped_row_is_read():
    assert len(ROWS) == 273 and not UNUSABLE


def test_a_rate_is_turned_into_a_step_and_back():
    row = BY_ID["V0580"]  # torchtitan, Llama 3 8B on 8 H100: 6,667 tokens/s a GPU, 16 sequences of 8,192
    assert row.quantity == "tokens_s_per_dev"
    assert row.step_s == pytest.approx(16 * 8192 / 8 / 6667)
    assert row.in_quantity(row.step_s) == pytest.approx(6667)


@pytest.mark.parametrize(
    ("name", "close"), [("V0036", 0.01), ("V0091", 0.01), ("V0279", 0.01), ("V0307", 0.02)]
)
def test_our_flops_are_those_that_sources_count(name, close):
    """Rows that state both tokens/s and TFLOP/s: their ratio is FLOPs of a token."""
    with TABLE.open(newline="") as file:
        cells = next(row for row in csv.DictReader(file) if row["id"] == name)
    setup = BY_ID[name].setup
    stated = float(cells["tflops_per_dev"]) * 1e12 / float(cells["tokens_s_per_dev"])
    assert 3 * setup.shape.forward_flops(setup.layout.seq_len).total == pytest.approx(stated, rel=close)


def test_parameters_are_those_that_rows_state():
    with TABLE.open(newline="") as file:
        stated = {row["id"]: float(row["params_B"]) for row in csv.DictReader(file)}
    for row in ROWS:
        assert row.setup.shape.params / 1e9 == pytest.approx(stated[row.id], rel=0.06), row.id


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"hardware": "Abacus"}, "hardware: no system is known as 'Abacus'"),
        ({"n_devices": "7"}, "do not divide 7 devices"),
        ({"layers": "many"}, "layers: 'many' is no number"),
        ({"heads": "0"}, "heads: 0 must be at least 1"),
        ({"GBS": "0"}, "GBS: 0 must be at least 1"),
        ({"GBS": "99999999999"}, "global_batch"),
        ({"hardware": "A100-80GB"}, "precision"),
        ({"step_time_s": "", "tokens_s_per_dev": "", "tflops_per_dev": ""}, "neither step time"),
        ({"step_time_s": "0"}, "step_time_s: 0 must be above 0"),
    ],
)
def test_a_row_that_cannot_be_simulated_has_a_reason(tmp_path, changes, reason):
    rows, unusable = read_published(write(tmp_path, **changes))
    assert not rows and reason in unusable[0].reason


def test_a_line_that_is_too_short_is_one_row_less(tmp_path):
    path = write(tmp_path)
    path.write_text("\ufeff" + path.read_text() + "X1,foo\n", encoding="utf-8")
    rows, unusable = read_published(path)
    assert [row.id for row in rows] == ["V0036"] and unusable[0].id == "X1"


def test_a_file_without_the_columns_is_refused(tmp_path):
    (tmp_path / "table.csv").write_text("id,model\n1,x\n")
    with pytest.raises(DataError, match="lacks the columns layers"):
        read_published(tmp_path / "table.csv")
    with pytest.raises(DataError, match="nothing"):
        read_published(tmp_path / "nothing.csv")
