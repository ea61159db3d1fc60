"""The outcome: what a demo showed, as one JSON object, as a table for a person, and as the HTML report.

Every figure in it was counted or timed in the run that it tells of; none is estimated, and no secret is among them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from changeover.demo.tour import Figures, Tour
from changeover.verifiers import report
from changeover.verifiers.compare.verdict import Verdict

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Outcome:
    """What is left to tell once all steps are done; `application` is the last status of the application."""

    verdicts: tuple[Verdict, ...]
    stores: dict[str, str]
    rows: int
    stage: str
    figures: Figures
    seconds: dict[str, float]
    set_up: float
    application: dict[str, Any]
    report_file: Path
    place: Path
    kept: bool
    postmaster: int | None

    @classmethod
    def of(cls, tour: Tour, set_up: float, keep: bool) -> Outcome:
        """Gather what the steps left; the application has ended, or is ended here."""
        status = tour.application.end()
        place = tour.place
        stores = {
            "old": place.public_dsn("old"),
            "new": place.public_dsn("new"),
            "lake": str(place.lake),
        }
        return cls(
            tuple(tour.verdicts), stores, tour.shape.rows, tour.stage.value, tour.figures, dict(tour.seconds), set_up, status,
            place.report, place.root, keep, place.server.pid,
        )  # fmt: skip

    @property
    def mismatches(self) -> int:
        """Return how many shadow reads differed for good."""
        return int(self.application["router"]["comparisons"]["mismatched"])

    @property
    def longest_wait(self) -> float:
        """Return the longest wait of a writer at the fence, in seconds."""
        return float(self.application["router"]["longest_wait_seconds"])

    @property
    def exit_code(self) -> int:
        """Return 0 where both targets are equal and the application met no error, else 1."""
        clean = all(verdict.equal for verdict in self.verdicts) and not self.application["errors"] and not self.mismatches
        return 0 if clean and not self.figures.leftovers else 1

    def document(self) -> dict[str, Any]:
        """Return what `--json` prints; the DSNs name a file with the password, and hold no secret."""
        return {
            "verdicts": {verdict.target: verdict.word for verdict in self.verdicts},
            "stores": self.stores,
            "rows": self.rows,
            "writes_during": self.application["writes"],
            "changed_meanwhile": self.figures.changed_meanwhile,
            "came_back": self.figures.came_back,
            "seconds": self.seconds,
            "stage": self.stage,
            "mismatches": self.mismatches,
            "errors": self.application["errors"],
            "longest_wait_seconds": self.longest_wait,
            "report": str(self.report_file),
        }

    def write_report(self) -> None:
        """Write the HTML report."""
        summary = report.RunSummary(
            steps=tuple(self.seconds.items()),
            rows=self.figures.backfilled,
            rate=self.figures.rate,
            lag=self.figures.lag,
            changed_meanwhile=self.figures.changed_meanwhile,
            mismatches=self.mismatches,
        )
        report.write_html(self.report_file, self.verdicts, summary)

    def show(self, console: Console) -> None:
        """Print the verdicts, the summary, and where to go on."""
        from rich.table import Table

        report.print_terminal(self.verdicts, console=console)
        table = Table("summary", "", show_header=False)
        for label, text in self.lines():
            table.add_row(label, text)
        console.print(table)
        console.print(f"report: {self.report_file}", markup=False, highlight=False, soft_wrap=True)
        for line in self.next_commands() if self.kept else ():
            console.print(line, markup=False, highlight=False, soft_wrap=True)

    def lines(self) -> list[tuple[str, str]]:
        """Return the summary as label and text."""
        app, router, left = self.application, self.application["router"], self.figures.leftovers
        reads = router["comparisons"]
        return [
            ("rows", f"{self.figures.backfilled:,} in the snapshot"),
            ("rate", f"{self.figures.rate:,.0f} rows/s into both targets"),
            ("lag once caught up", f"{self.figures.lag:,} bytes of WAL"),
            ("writes meanwhile", f"{app['writes']:,}: {app['inserts']:,} follows, {app['updates']:,} updates,"
             f" {app['deletes']:,} unfollows, {app['transient']:,} taken back at once"),
            ("reverse replication", f"{self.figures.came_back:,} changes of the new store came back to the old one"),
            ("shadow reads", f"{reads['compared']:,} compared, {self.mismatches} mismatched, {reads['inconclusive']} inconclusive"),
            ("changed during the copy", f"{self.figures.changed_meanwhile:,} rows, which came right"),
            ("errors of the application", f"{app['errors']}" + (f" ({app['last_error']})" if app["errors"] else "")),
            ("longest wait of a writer", f"{self.longest_wait:.2f} s at the fence; any write {app['longest_write']:.2f} s"),
            *([("left in the old store", ", ".join(left) or "nothing of ours")] if left is not None else []),
            ("time", f"{sum(self.seconds.values()):.1f} s for all steps, and {self.set_up:.1f} s of set-up"),
        ]  # fmt: skip

    def next_commands(self) -> list[str]:
        """Return what to try on the servers that were kept."""
        spec = self.place / "follows.toml"
        differing = next((difference for verdict in self.verdicts for difference in verdict.sample), None)
        about = [f"changeover explain {spec} {' '.join(map(str, differing.key.values()))}"] if differing else []
        commands = [
            f". {self.place / 'demo.env'}",
            'psql "$OLD_DSN" -c "SELECT * FROM follows LIMIT 5"',
            'psql "$NEW_DSN" -c "SELECT * FROM associations LIMIT 5"',
            *about,
            f"changeover status {spec}",
            f"changeover history {spec}",
            f"kill -INT {self.postmaster} && sleep 2 && rm -r {self.place}",
        ]
        return ["kept; the next commands to try, the last one ends it:", *(f"  {command}" for command in commands)]
