"""The command line: every command calls one function of the library with the same words, and prints what it returns.

Exit codes: 0 done or equal, 1 the answer is no, 2 usage or spec error, 3 could not finish and a retry is safe, 130 interrupted.
An error is one sentence on standard error; `--json` prints one object on standard output and nothing else there. Commands that
need no Spark start no JVM.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click
import psycopg

from changeover import __version__
from changeover.errors import ChangeoverError, CouldNotFinish, Interrupted, SpecError, UsageError
from changeover.jobs.ledger import Ledger
from changeover.record import log_file
from changeover.spec import Spec, load

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

    from changeover.verifiers.verdict import Verdict

SPEC = click.argument("spec", type=click.Path())
JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")
DEBUG = click.option("--debug", is_flag=True, help="Log at debug level.")
TARGETS = click.option("--target", "targets", multiple=True, help="Only this target; may be given more than once.")


class Commands(click.Group):
    """A group whose commands end with our exit codes and one sentence, never with a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command and turn every failure into its sentence and exit code."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            fail(Interrupted(ctx.invoked_subcommand or "changeover"))
        except ChangeoverError as error:
            fail(error)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except Exception as error:
            fail(unforeseen(error))


def unforeseen(error: Exception, log: Path | None = None) -> CouldNotFinish:
    """Return one sentence for an error that no part of ours has named; `log` holds the whole of it."""
    said = str(error).strip().partition("\n")[0] or type(error).__name__
    details = f"; {log} has the details" if log else ""
    if not isinstance(error, psycopg.Error):
        return CouldNotFinish(f"unexpected {type(error).__name__}: {said}{details}")
    if error.sqlstate is None or error.sqlstate.startswith("57P"):  # no answer of a server, or its last one
        return CouldNotFinish(f"a database broke off ({said}): check the servers, then run the same command again{details}")
    return CouldNotFinish(f"a database refused a statement ({said}, SQLSTATE {error.sqlstate}){details}")


def fail(error: ChangeoverError) -> NoReturn:
    """Print the sentence and exit."""
    click.echo(f"changeover: {error}", err=True)
    sys.exit(error.exit_code)


@click.group(cls=Commands)
@click.version_option(__version__)
def main() -> None:
    """Move a live table to another store while the application keeps reading and writing."""


def answer(value: Any, as_json: bool, text: Callable[[], str]) -> None:
    """Print a command's answer: one JSON object, or text for a person."""
    click.echo(json.dumps(plain(value), default=str, ensure_ascii=False) if as_json else text())


def plain(value: Any) -> Any:
    """Return dataclasses as dicts, for JSON."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def terminal_text(verdicts: Sequence[Verdict]) -> str:
    """Return verdicts as the terminal shows them."""
    from rich.console import Console

    from changeover.verifiers.report import print_terminal

    console = Console()
    with console.capture() as captured:
        print_terminal(verdicts, console=console)
    return captured.get().rstrip()


@contextmanager
def running(path: str, step: str, debug: bool) -> Iterator[Spec]:
    """Load the spec and log the run into a file of its own, an unforeseen error with its whole traceback."""
    spec = load(path)
    with log_file(spec, step, debug) as log:
        try:
            yield spec
        except ChangeoverError as error:
            logging.getLogger("changeover").error("%s", error)
            raise
        except Exception as error:
            logging.getLogger("changeover").exception("unforeseen")
            raise unforeseen(error, log) from error


def spark_for(spec: Spec, step: str | None = None, targets: Sequence[str] = ()) -> SparkSession:
    """Start Spark for a command; what a step needs first, and targets that are none, are said before Spark takes its seconds."""
    from changeover.session import spark_session

    for target in targets:
        if target not in spec.targets:
            raise SpecError(spec.path, "target", f"no target is named {target}: the targets are {', '.join(spec.targets)}")
    if step is not None:
        with Ledger.open(spec, step) as ledger:
            ledger.stream(step)
    return spark_session(f"changeover:{spec.name}")


@main.command()
@click.argument("dsn")
@click.argument("table")
@click.option("--output", default="-", help="Where to write; - is standard output.")
def init(dsn: str, table: str, output: str) -> None:
    """Write a spec from a live table; DSN is env:NAME, the environment variable that holds it."""
    from changeover.jobs.preflight import draft

    if output != "-" and Path(output).exists():
        raise UsageError(f"init: {output} is there already: name another file, or remove it first")
    text = draft(dsn, table)
    try:
        with click.open_file(output, "w", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise UsageError(f"init: {output} can't be written ({error.strerror}): name another file") from error


@main.command()
@SPEC
@JSON
def check(spec: str, as_json: bool) -> None:
    """Look at both sides, change nothing, and say whether the plan is safe."""
    from changeover.jobs.preflight import preflight

    found = preflight(load(spec))
    lines = [*(f"refused: {reason}" for reason in found.reasons), *(f"grant: {grant}" for grant in found.grants)]
    answer({"safe": not found.reasons, "reasons": found.reasons, "grants": found.grants}, as_json,
           lambda: "\n".join([*lines, "unsafe" if found.reasons else "safe"]))  # fmt: skip
    sys.exit(1 if found.reasons else 0)


@main.command()
@SPEC
@JSON
def plan(spec: str, as_json: bool) -> None:
    """Print the steps that `run` walks, with the locks that each takes in the old store."""
    from changeover.pipeline import STEPS

    load(spec)
    steps = [{"step": step.name, "does": step.does, "locks": step.locks} for step in STEPS]
    answer(
        {"steps": steps},
        as_json,
        lambda: "\n".join(f"{s['step']:9} {s['does']}\n{'':9} locks: {s['locks']}" for s in steps),
    )


@main.command()
@SPEC
@JSON
@DEBUG
def run(spec: str, as_json: bool, debug: bool) -> None:
    """Do everything from check to verify; run it again after whatever stopped it."""
    from changeover import pipeline

    with running(spec, "run", debug) as loaded:
        walk = pipeline.run(loaded, lambda: spark_for(loaded), say=lambda line: click.echo(line, err=True))
    different = any(not verdict.equal for verdict in walk.verdicts)
    answer({"seconds": walk.seconds, "verdicts": [v.document() for v in walk.verdicts]}, as_json,
           lambda: terminal_text(walk.verdicts))  # fmt: skip
    sys.exit(1 if different else 0)


@main.command()
@SPEC
@JSON
@DEBUG
def prepare(spec: str, as_json: bool, debug: bool) -> None:
    """Make publication, slot, kept snapshot, ledger, target tables and gates."""
    from changeover.pipeline import prepare as act
    from changeover.position import format_lsn

    with running(spec, "prepare", debug) as loaded:
        made = act(loaded, spark_for(loaded))
    told = {"l0": format_lsn(made.stream.l0), "slot": made.stream.slot, "snapshot": made.stream.snapshot}
    answer(told, as_json, lambda: f"prepared: slot {told['slot']} at {told['l0']}")


@main.command()
@SPEC
@JSON
@DEBUG
def capture(spec: str, as_json: bool, debug: bool) -> None:
    """Spool the change stream until stopped: the one long-lived service."""
    from changeover.jobs.capture import capture as act
    from changeover.position import format_lsn

    with running(spec, "capture", debug) as loaded:
        result = act(loaded)
    answer(result, as_json, lambda: (
        f"captured: {result.events:,} changes of {result.transactions:,} transactions, durable up to {format_lsn(result.end_lsn)}"
        f"{'; interrupted: nothing is lost, the same command goes on from here' if result.interrupted else ''}"))  # fmt: skip
    sys.exit(130 if result.interrupted else 0)


@main.command()
@SPEC
@TARGETS
@JSON
@DEBUG
def backfill(spec: str, targets: tuple[str, ...], as_json: bool, debug: bool) -> None:
    """Load all pending chunks and close the tables."""
    from changeover.jobs.backfill import backfill as act
    from changeover.jobs.progress import progress

    with running(spec, "backfill", debug) as loaded, progress(loaded, loaded.name):
        done = act(loaded, spark_for(loaded, "backfill", targets), targets or None)
    answer({"loads": done}, as_json, lambda: "\n".join(
        f"{one.source} into {one.target}: {one.rows:,} rows in {one.chunks} chunks, {one.refused} refused by a tombstone,"
        f" {one.swept} swept" for one in done))  # fmt: skip


@main.command()
@SPEC
@TARGETS
@click.option("--follow", is_flag=True, help="Go on until stopped.")
@JSON
@DEBUG
def replay(spec: str, targets: tuple[str, ...], follow: bool, as_json: bool, debug: bool) -> None:
    """Offer what was spooled until caught up."""
    from changeover.jobs.replay import replay as act
    from changeover.position import format_lsn

    with running(spec, "replay", debug) as loaded:
        spark = spark_for(loaded, "replay", targets)
        done = act(loaded, spark, follow=follow, targets=targets or None)
    answer(done, as_json, lambda: f"replayed: {done.events:,} events, applied up to {format_lsn(done.applied)}")


@main.command()
@SPEC
@TARGETS
@click.option("--report", type=click.Path(), help="Write the HTML report here.")
@JSON
@DEBUG
def verify(spec: str, targets: tuple[str, ...], report: str | None, as_json: bool, debug: bool) -> None:
    """Compare every row of both sides at one position."""
    from changeover.verifiers.report import write_html
    from changeover.verifiers.verify import verify as act

    with running(spec, "verify", debug) as loaded:
        verdicts = act(loaded, spark_for(loaded, "verify", targets), targets=targets or None)
        if report:
            write_html(Path(report), verdicts)
    answer({"verdicts": [v.document() for v in verdicts]}, as_json, lambda: terminal_text(verdicts))
    sys.exit(0 if all(verdict.equal for verdict in verdicts) else 1)


@main.command()
@SPEC
@click.argument("key", nargs=-1, required=True)
@JSON
def explain(spec: str, key: tuple[str, ...], as_json: bool) -> None:
    """Tell the story of one row by its target KEY: chunk, cell, spooled events, images, stage."""
    from changeover.verifiers.explain import explain as act

    told = act(load(spec), key)
    answer(told, as_json, lambda: "\n".join(told.lines()))


@main.command()
@SPEC
@JSON
def status(spec: str, as_json: bool) -> None:
    """Say where the migration is: chunks, positions, lag, authority, verdicts."""
    from changeover.jobs.status import status as act

    told = act(load(spec))
    answer(told, as_json, lambda: "\n".join(told.lines()))


@main.command()
@SPEC
@JSON
def history(spec: str, as_json: bool) -> None:
    """Print the record of all runs, newest first."""
    loaded = load(spec)
    with Ledger.open(loaded, "history") as ledger:
        ledger.stream("history")
        rows = [{"at": at, "step": step, "outcome": outcome, **detail} for at, step, outcome, detail in ledger.audits()]
    answer(
        {"runs": rows},
        as_json,
        lambda: "\n".join(f"{r['at']:%Y-%m-%d %H:%M:%S} {r['step']} {r['outcome']}" for r in rows),
    )


@main.command()
@SPEC
@JSON
def finalize(spec: str, as_json: bool) -> None:
    """End the migration: drop what is ours, never a table of yours."""
    from changeover.jobs.prepare import finalize as act
    from changeover.jobs.prepare import leftovers

    loaded = load(spec)
    removed, left = act(loaded), leftovers(loaded)
    _removed(removed, left, as_json)


@main.command()
@SPEC
@JSON
def abort(spec: str, as_json: bool) -> None:
    """Undo all that prepare made; the old store is as before."""
    from changeover.jobs.prepare import abort as act
    from changeover.jobs.prepare import leftovers

    loaded = load(spec)
    removed, left = act(loaded), leftovers(loaded)
    _removed(removed, left, as_json)


def _removed(removed: list[str], left: list[str], as_json: bool) -> None:
    last = f"left of ours in the old store: {', '.join(left) or 'nothing'}"
    answer({"removed": removed, "left": left}, as_json, lambda: "\n".join([*(f"removed: {one}" for one in removed), last]))


@main.group()
def flags() -> None:
    """Show and turn the migration flag, gated by the evidence."""


@flags.command()
@SPEC
@JSON
def show(spec: str, as_json: bool) -> None:
    """Go or no-go for the next step, with every reason."""
    from changeover.flags.cutover import show as act

    seen = act(load(spec))
    lines = [f"stage {seen.stage.value}, authority {seen.authority.store} (epoch {seen.authority.epoch})"]
    if seen.next is not None:
        lines += [
            f"next: {seen.next.value}: {'go' if seen.go else 'no-go'}",
            *(f"  {reason}" for reason in seen.reasons),
        ]
    told = {**plain(seen), "stage": seen.stage.value, "next": seen.next.value if seen.next else None, "go": seen.go}
    answer(told, as_json, lambda: "\n".join(lines))


@flags.command()
@SPEC
@click.option("--override", metavar="WHY", help="Go without the gate's evidence; the reason is logged.")
@JSON
def advance(spec: str, override: str | None, as_json: bool) -> None:
    """Go one stage up, if the gate's evidence holds."""
    from changeover.flags.cutover import advance as act

    _step(act(load(spec), override=override), as_json)


@flags.command()
@SPEC
@JSON
def rollback(spec: str, as_json: bool) -> None:
    """Go one stage down; asks no gate."""
    from changeover.flags.cutover import rollback as act

    _step(act(load(spec)), as_json)


def _step(done: Any, as_json: bool) -> None:
    told = {"from": done.before.value, "to": done.after.value, "epoch": done.epoch, "pause_seconds": done.pause_seconds}
    pause = f", writers were held up {done.pause_seconds:.2f} s at most" if done.pause_seconds is not None else ""
    answer(told, as_json, lambda: f"{told['from']} → {told['to']} (epoch {told['epoch']}{pause})")


@flags.command()
@SPEC
@DEBUG
def watch(spec: str, debug: bool) -> None:
    """Follow a flag that is turned elsewhere: ask the gate, fence, write the epoch; until stopped."""
    from changeover.flags.cutover import watch as act

    with running(spec, "flags-watch", debug) as loaded:
        act(loaded, threading.Event())


@main.command(context_settings={"ignore_unknown_options": True, "help_option_names": []})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def demo(arguments: tuple[str, ...]) -> None:
    """Run the main job on an embedded PostgreSQL and a local Delta table."""
    from changeover.demo import main as act

    act(args=list(arguments), prog_name="changeover demo")


if __name__ == "__main__":
    main()
