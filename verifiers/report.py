"""The report: verdicts as a terminal table, as JSON and as one HTML page.

All three say the same about the same verdicts: the word first, then tables and stores, positions, classes, columns,
samples, ranges and times. The page is one file without scripts or outside assets, opens from disk, and every value on
it is escaped. Nothing here looks at a store; what a verdict masks stays masked. Runs in the driver.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from changeover.position import format_lsn
from changeover.verifiers.compare.verdict import CLASSES, TYPE, Bound, Difference, RangeCount, Verdict

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

TEMPLATE = "report.html.j2"
NULL = "NULL"
"""How NULL is shown; in terminal and page it is set apart by style, for the text 'NULL' is another value."""


@dataclass(frozen=True)
class RunSummary:
    """What a run from preparation to verdict did; seconds, rows a second, and lag in bytes of WAL."""

    steps: tuple[tuple[str, float], ...] = ()
    rows: int | None = None
    rate: float | None = None
    lag: int | None = None
    changed_meanwhile: int | None = None
    mismatches: int | None = None

    def figures(self) -> Iterator[tuple[str, str]]:
        """Yield what is known as label and text.

        Returns:
            (label, text) of each figure that is known.
        """
        labels: dict[str, tuple[float | None, str]] = {
            "rows": (self.rows, "{:,}"),
            "rows a second": (self.rate, "{:,.0f}"),
            "bytes of WAL behind": (self.lag, "{:,}"),
            "changed during the copy": (self.changed_meanwhile, "{:,}"),
            "mismatches": (self.mismatches, "{:,}"),
        }
        return ((label, form.format(value)) for label, (value, form) in labels.items() if value is not None)


def word(verdicts: Sequence[Verdict]) -> str:
    """Return "equal" if every verdict says so, else "different"; there is no word for no verdicts."""
    if not verdicts:
        raise ValueError("a report needs at least one verdict: no verdict is not equal")
    return "equal" if all(verdict.equal for verdict in verdicts) else "different"


def write_html(path: Path, verdicts: Sequence[Verdict], summary: RunSummary | None = None) -> None:
    """Write the page; the folder is made where it is not there.

    Args:
        path: The page's file.
        verdicts: The verdicts, one a table and store.
        summary: Figures of the whole run; None leaves them out.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(to_html(verdicts, summary), encoding="utf-8")


def to_html(verdicts: Sequence[Verdict], summary: RunSummary | None = None) -> str:
    """Return the page."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "lsn": format_lsn,
        "bound": bound,
        "number": "{:,}".format,
        "seconds": seconds,
        "equal_keys": equal_keys,
    }
    template = environment.from_string(resources.files(__package__).joinpath(TEMPLATE).read_text(encoding="utf-8"))
    return template.render(
        word=word(verdicts), verdicts=verdicts, summary=summary, classes=CLASSES, cells=cells, longest=_longest(summary)
    )


def print_terminal(verdicts: Sequence[Verdict], summary: RunSummary | None = None, console: Console | None = None) -> None:
    """Print the word, a line a table and store, and for each different one its classes, columns and sample.

    Args:
        verdicts: The verdicts, one a table and store.
        summary: Figures of the whole run; None leaves them out.
        console: Where it prints; None is standard output.
    """
    from rich.console import Console

    console = console or Console()
    style = "bold green" if word(verdicts) == "equal" else "bold red"
    console.print(f"[{style}]{word(verdicts)}[/]")
    console.print(_overview(verdicts))
    for verdict in verdicts:
        for part in _details(verdict):
            console.print(part)
    if summary:
        figures = [*((step, seconds(time)) for step, time in summary.steps), *summary.figures()]
        console.print("run: " + ", ".join(f"{label} {text}" for label, text in figures), markup=False, highlight=False)


def _overview(verdicts: Sequence[Verdict]) -> RenderableType:
    from rich.table import Column, Table
    from rich.text import Text

    table = Table(Column("table", overflow="fold"), "store", "verdict", "rows", "keys that differ", "as of", "took")
    for verdict in verdicts:
        table.add_row(
            Text(verdict.table),
            Text(verdict.target),
            Text(verdict.word, style="green" if verdict.equal else "red"),
            f"{verdict.source_rows:,}\n{verdict.target_rows:,}",
            "\n".join(f"{count:,} {kind}" for kind in (*CLASSES, TYPE) if (count := verdict.counts.get(kind, 0))) or "none",
            Text(str(verdict.positions).replace(", ", "\n")),
            seconds(verdict.seconds),
        )
    return table


def _details(verdict: Verdict) -> Iterator[RenderableType]:
    """User data goes through Text: nothing in a value is markup."""
    from rich.table import Table
    from rich.text import Text

    name = f"{verdict.table} in {verdict.target}"
    for change in verdict.types:
        yield Text(f"{name}: {change}", style="red")
    for check in verdict.checks:
        answer = "equal" if check.equal else f"different: {check.first_difference}"
        yield Text(f"{name}: check {check.name}: {answer}")
    if verdict.recheck.rechecked:
        # each side's rows were counted before, so the numbers may differ where nothing else does
        yield Text(f"{name}: both stores are written, so keys that differed were judged again: {verdict.recheck.rechecked:,}")
    if verdict.truncated:
        yield Text(f"{name}: {verdict.kept:,} of {verdict.difference_rows:,} differing rows are kept")
    if verdict.columns:
        yield Text(f"{name}: mismatched by " + ", ".join(f"{c} ({n:,})" for c, n in verdict.columns.items()))
    if not verdict.sample:
        return
    sample = Table("class", "key", "column", "source", "target", title=f"{name}: a sample", title_justify="left")
    for difference in verdict.sample:
        for number, (column, source, target) in enumerate(cells(difference)):
            head = (Text(difference.kind), _pairs(difference.key)) if number == 0 else (Text(""), Text(""))
            sample.add_row(*head, Text(column), _value(source), _value(target))
    yield sample


def _pairs(values: Mapping[str, str | None]) -> Any:
    from rich.text import Text

    return Text(", ".join(f"{name}={NULL if value is None else value}" for name, value in values.items()))


def _value(given: tuple[bool, str | None]) -> Any:
    from rich.text import Text

    present, value = given
    if not present:
        return Text("absent", style="dim italic")
    return Text(NULL, style="dim italic") if value is None else Text(value)


def cells(difference: Difference) -> list[tuple[str, tuple[bool, str | None], tuple[bool, str | None]]]:
    """Return a row a column of what a sample shows of a key: name, and for each side whether it is there and its value.

    Of a pair the columns that differ; of a row without a partner all but the key.
    """
    row = difference.source or difference.target or {}
    names = difference.columns or tuple(name for name in row if name not in difference.key) or tuple(difference.key)
    return [(name, _cell(difference.source, name), _cell(difference.target, name)) for name in names]


def _cell(values: Mapping[str, str | None] | None, name: str) -> tuple[bool, str | None]:
    return (False, None) if values is None else (True, values[name])


def bound(range_count: RangeCount) -> str:
    """Return a range's bounds as text."""

    def part(given: Bound, infinite: str) -> str:
        return infinite if given is None else "(" + ", ".join(given) + ")"

    return f"{part(range_count.range.lower, '-∞')} to {part(range_count.range.upper, '+∞')}"


def seconds(value: float) -> str:
    """Return a duration as text."""
    if value < 1:
        return f"{value * 1000:.0f} ms"
    return f"{value:.1f} s" if value < 120 else f"{value / 60:.1f} min"


def equal_keys(verdict: Verdict) -> int:
    """Return how many keys were equal as both sides were read (pure).

    Keys that were in flight and met when judged again are told apart. The rows of a side were counted before, and such a key
    may be among none of them.

    Args:
        verdict: What was found about one table in one target.

    Returns:
        A number of keys, at most the rows of either side.
    """
    return verdict.equal_rows - verdict.recheck.in_flight


def _longest(summary: RunSummary | None) -> float:
    return max((time for _, time in summary.steps), default=0.0) if summary else 0.0
