"""The report is one whole page: every tag closed, every picture well-formed and within its frame, nothing fetched."""

import re
import xml.etree.ElementTree as ElementTree
from html import unescape
from html.parser import HTMLParser

import pytest

from anabranch.costs.training.calibration import load_calibration
from anabranch.errors import ConfigError
from anabranch.hardware.catalog import load_catalog
from anabranch.planner import svg
from anabranch.planner.answer import Question, answer
from anabranch.planner.outcome import Terms
from anabranch.planner.report import report, write_report
from anabranch.planner.search import Request
from anabranch.workload.hf_config import read_shape

VOID = {"meta"}
SVG = "{http://www.w3.org/2000/svg}"
LETTERS = {"words": 7.5, "small": 6.8}  # pixels of a letter of 12 and of 11 px, in a wide font


class Pages(HTMLParser):
    """Complains about a tag that closes another one."""

    def __init__(self):
        super().__init__()
        self.open, self.seen = [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def made():
    catalog, shape = load_catalog(), read_shape("DeepSeek-V3")
    terms = Terms(catalog.figure("pue"), catalog.figure("electricity"))

    def make(*clusters, compared=False, model="<b>DeepSeek</b>"):
        skew = {degree: 1.0 + degree / 64 for degree in (2, 8, 64)}
        requests = [Request(shape, catalog.cluster(one), 1e12, 4096, 2048, skew=skew) for one in clusters]
        pair = (requests[0], requests[1]) if compared else None
        question = Question(
            model, requests[0], terms, "a test", frozenset({"tokens"}), tuple(requests[1:]), pair
        )
        return answer(question, load_calibration())

    return make


@pytest.fixture(scope="module")
def compared(made):
    return made("p5.48xlarge:64", "trn2.48xlarge:64", compared=True)


def pictures(page):
    return [ElementTree.fromstring(text) for text in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]


def test_the_page_is_whole_and_fetches_nothing(compared):
    page = report(compared)
    parser = Pages()
    parser.feed(page)
    assert parser.open == []
    tags = {tag for tag, _ in parser.seen}
    assert not tags & {"script", "link", "img", "iframe", "object"}
    assert not any(name in ("src", "href") for _, attributes in parser.seen for name in attributes)
    assert set(re.findall(r"https?://[^\s\"<)]+", re.sub(r"<td>.*?</td>", "", page))) == {
        "http://www.w3.org/2000/svg"
    }
    assert "prefers-color-scheme: dark" in page
    assert "<b>DeepSeek" not in page


def test_every_picture_is_well_formed_and_inside_its_frame(compared):
    found = pictures(report(compared))
    assert len(found) == 5
    for picture in found:
        _, _, width, height = map(float, picture.get("viewBox").split())
        assert picture.get("aria-label")
        for text in picture.iter(f"{SVG}text"):
            reach = {"start": (0, 1), "middle": (-0.5, 0.5), "end": (-1, 0)}[text.get("text-anchor")]
            wide = LETTERS[text.get("class")] * len(text.text)
            left, right = (float(text.get("x")) + end * wide for end in reach)
            assert -1 <= left <= right <= width + 1, text.text
            assert 8 <= float(text.get("y")) <= height
        for box in picture.iter(f"{SVG}rect"):
            assert float(box.get("x")) + float(box.get("width")) <= width
            assert float(box.get("y")) + float(box.get("height")) <= height


def test_the_page_says_all_that_the_answer_holds(compared):
    page = unescape(report(compared))
    for one in compared.assumptions:
        assert one.name in page and one.source in page and one.value in page
    for line in [*compared.unmeasured, compared.comparison.verdict, *compared.comparison.conditions_told]:
        assert line in page
    for part in (*compared.parts_s, *("MFU", "price", "skew"), *("p5.48xlarge:32", "trn2.48xlarge:64")):
        assert part in page


def test_without_a_price_or_a_comparison_the_page_has_neither(made):
    page = report(made("dgx-h100:64"))
    assert len(pictures(page)) == 4
    assert "$" not in re.sub(r"<td>.*?</td>", "", page)
    assert "no price" in page


def test_a_file_that_cannot_be_written_is_named(compared, tmp_path):
    write_report(compared, tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == report(compared)
    with pytest.raises(ConfigError, match=r"^html: .* cannot be written"):
        write_report(compared, tmp_path / "no" / "report.html")


@pytest.mark.parametrize("most", [0.031, 0.99, 1.0, 1.01, 7.3, 19.9, 4.2e6])
def test_ticks_are_few_round_and_within(most):
    at = svg.ticks(most)
    assert 3 <= len(at) <= 10
    assert at[0] > 0 and at[-1] <= most * (1 + 1e-9)
    assert float(f"{at[0]:.1g}") == pytest.approx(at[0])


def test_bars_are_as_long_as_their_amounts():
    rows = [svg.Span(name, 0.0, amount, "", str(amount)) for name, amount in (("a", 1.0), ("b", 4.0))]
    picture = ElementTree.fromstring(svg.spans(rows, "bars"))
    widths = [float(box.get("width")) for box in picture.iter(f"{SVG}rect")]
    assert widths[1] / widths[0] == pytest.approx(4, rel=1e-3)


def test_swings_lie_around_their_middle():
    rows = [svg.Span("a", 2.0, 6.0, "2", "6", "wide"), svg.Span("b", 3.0, 4.0, "3", "4", "narrow")]
    picture = ElementTree.fromstring(svg.spans(rows, "swings", (3.0, "3")))
    line = float(next(picture.iter(f"{SVG}line")).get("x1"))
    wide, narrow = picture.iter(f"{SVG}rect")
    assert line == pytest.approx(float(wide.get("x")) + float(wide.get("width")) / 4, abs=0.2)
    assert line == pytest.approx(float(narrow.get("x")), abs=0.2)


def test_a_line_ends_at_the_upper_edge():
    axes = svg.Axes(1.0, 1.0, "x", "y", str, str)
    line = [(x / 10, 2 * x / 10) for x in range(11)]
    picture = ElementTree.fromstring(
        svg.chart(axes, [svg.Dot(0.9, 3.0, "far")], "chart", [svg.Line(line, "steep", "one")], line)
    )
    drawn = [
        tuple(map(float, at.split(","))) for at in next(picture.iter(f"{SVG}polyline")).get("points").split()
    ]
    assert len(drawn) == 6
    assert min(y for _, y in drawn) == pytest.approx(axes.y(1.0), abs=0.1)
    assert float(next(picture.iter(f"{SVG}circle")).get("cy")) == pytest.approx(axes.y(1.0), abs=0.1)
