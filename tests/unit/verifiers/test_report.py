"""The report: terminal, JSON and page say the same, and a value on them is never markup."""

from __future__ import annotations

import io
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from changeover.verifiers import report
from changeover.verifiers.compare.verdict import CLASSES, CheckResult, Difference, Positions, Range, RangeCount, Recheck, Verdict
from changeover.verifiers.report import RunSummary

EVIL = '<script>alert("1")</script> & [bold]x[/bold]'
HALVES = (RangeCount(Range(0, None, ("5", "a")), 2, 1), RangeCount(Range(1, ("5", "a"), None), 1))
EQUAL = Verdict(
    run="r1", table="public.follows", target="new", positions=Positions(0x16B374D848, "16/B374D900"),
    checked_at="2026-11-21T12:00:00Z", seconds=2.25, key=("id",), source_rows=3, target_rows=3, equal_rows=3,
    counts=dict.fromkeys(CLASSES, 0), columns={}, duplicates={}, sample=(), source_ranges=HALVES,
    target_ranges=(RangeCount(Range(0, None, None), 3),), difference_rows=0, kept=0,
)  # fmt: skip
DIFFERENT = replace(
    EQUAL, target="lake", positions=Positions(0x16B374D848, "version 7"), equal_rows=2, difference_rows=12, kept=10,
    counts=dict.fromkeys(CLASSES, 1), columns={"name": 1}, duplicates={"target": 1},
    sample=(
        Difference("mismatched", {"id": "1"}, ("name",), {"id": "1", "name": EVIL}, {"id": "1", "name": None}),
        Difference("missing", {"id": "2"}, (), {"id": "2", "name": ""}, None),
        Difference("extra", {"id": "3"}, (), None, {"id": "3"}),
    ),
    checks=(CheckResult("sums", False, 1, 1, "41 and 42"),), recheck=Recheck(5, 2, 2, 1),
)  # fmt: skip
SUMMARY = RunSummary((("backfill", 12.5), ("verify", 0.25)), 200_000, 16_000.4, 0, 3, 0)


class Tags(HTMLParser):
    """Collects what a browser would make of the page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.names: list[str] = []
        self.text = ""
        self.assets: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.assets += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text += data


def terminal(*verdicts: Verdict, summary: RunSummary | None = None) -> str:
    out = io.StringIO()
    report.print_terminal(verdicts, summary, Console(file=out, width=200))
    return out.getvalue()


def test_one_different_verdict_makes_the_whole_different() -> None:
    assert report.word([EQUAL]) == "equal"
    assert report.word([EQUAL, DIFFERENT]) == "different"


def test_no_verdict_is_not_equal() -> None:
    with pytest.raises(ValueError, match="no verdict is not equal"):
        report.word([])


def test_the_page_says_all_and_loads_nothing() -> None:
    tags = Tags(report.to_html([EQUAL, DIFFERENT], SUMMARY))
    for expected in (
        "different", "public.follows", "16/B374D848", "version 7", "mismatched", "41 and 42", "10 of 12 differing rows",
        "2 in flight", "(5, a) to +∞", "200,000", "changed during the copy", "backfill", "12.5 s", "250 ms",
    ):  # fmt: skip
        assert expected in tags.text
    assert tags.assets == []
    assert "script" not in tags.names


def test_a_value_is_text_wherever_it_is_shown() -> None:
    tags = Tags(report.to_html([DIFFERENT]))
    assert EVIL in tags.text
    assert "<script>" not in report.to_html([DIFFERENT])
    assert EVIL in terminal(DIFFERENT)


def test_keys_that_were_judged_again_are_told_beside_rows_that_were_counted_before() -> None:
    counted = replace(EQUAL, target_rows=4, recheck=Recheck(1, ahead=1))
    assert "both stores are written, so keys that differed were judged again: 1" in terminal(counted)
    assert "judged again" not in terminal(EQUAL, replace(EQUAL, recheck=Recheck()))


def test_equal_keys_never_exceed_the_rows_of_a_side() -> None:
    """A row that was on its way when the sides were counted is equal when it is judged again, and in no count of rows."""
    in_flight = replace(EQUAL, source_rows=3, target_rows=2, equal_rows=4, recheck=Recheck(2, in_flight=2))
    assert report.equal_keys(in_flight) == 2
    assert "2 keys equal, 2 more when judged again," in " ".join(Tags(report.to_html([in_flight])).text.split())
    assert "3 keys equal, as of" in " ".join(Tags(report.to_html([EQUAL])).text.split())


def test_null_absent_and_empty_look_different() -> None:
    page = report.to_html([DIFFERENT])
    for word in ("NULL", "absent", "empty text"):
        assert f'<span class="null">{word}</span>' in page
    literal = replace(DIFFERENT, sample=(Difference("missing", {"id": "1"}, (), {"id": "1", "name": "NULL"}, None),))
    assert '<span class="value">NULL</span>' in report.to_html([literal])


def test_the_terminal_says_the_word_first() -> None:
    text = terminal(EQUAL, DIFFERENT, summary=SUMMARY)
    assert text.startswith("different\n")
    assert "mismatched by name (1)" in text
    assert "check sums: different: 41 and 42" in text
    assert "10 of 12 differing rows are kept" in text
    assert "run: backfill 12.5 s, verify 250 ms, rows 200,000" in text
    assert terminal(EQUAL).startswith("equal\n")


def test_the_page_is_written_where_there_was_no_folder(tmp_path: Path) -> None:
    report.write_html(tmp_path / "reports" / "r1.html", [EQUAL])
    assert (tmp_path / "reports" / "r1.html").read_text(encoding="utf-8").startswith("<!doctype html>")


@pytest.mark.parametrize(("value", "text"), [(0.0042, "4 ms"), (1, "1.0 s"), (119.94, "119.9 s"), (180, "3.0 min")])
def test_durations(value: float, text: str) -> None:
    assert report.seconds(value) == text
