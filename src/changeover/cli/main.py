"""The command line: every command calls one function of `changeover.api` with the same words, and prints what it returns.

Exit codes: 0 done or equal, 1 the answer is no, 2 usage or spec error, 3 could not finish and a retry is safe, 130 interrupted.
An error is one sentence on standard error; `--json` prints one object on standard output and nothing else there. Commands that
need no Spark start no JVM.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from changeover import __version__, api
from changeover.cli.command import (
    DEBUG,
    HELP,
    JSON,
    LOG_FORMAT,
    SPEC,
    TARGETS,
    Commands,
    answer,
    opened,
    plain,
    running,
    spark_for,
    terminal_text,
)
from changeover.cli.flags import flags
from changeover.errors import ChangeoverError, UsageError
from changeover.jobs.health import LAG_BYTES

if TYPE_CHECKING:
    from changeover.verifiers.compare.verdict import Verdict


@click.group(cls=Commands, context_settings=HELP)
@click.version_option(__version__)
def main() -> None:
    """Move a live table to another store while the application keeps reading and writing."""


@main.command(section="Plan", example="changeover init env:OLD_DSN public.follows --output follows.toml")
@click.argument("dsn")
@click.argument("table")
@click.option("--output", default="-", help="Where to write; - is standard output.")
def init(dsn: str, table: str, output: str) -> None:
    """Write a spec from a live table.

    DSN is env:NAME, the environment variable that holds it.
    """
    if output != "-" and Path(output).exists():
        raise UsageError(f"init: {output} is there already: name another file, or remove it first")
    text = api.init(dsn, table)
    try:
        with click.open_file(output, "w", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise UsageError(f"init: {output} can't be written ({error.strerror}): name another file") from error


@main.command(section="Plan", example="changeover check follows.toml")
@SPEC
@JSON
def check(spec: str, as_json: bool) -> None:
    """Say whether the plan is safe.

    Looks at both sides, brings no row the whole way, and changes nothing. Exit code 1 means no.
    """
    loaded = opened(spec)
    preflight = api.check(loaded, lambda: api.spark_session(f"changeover:{loaded.name}"))  # no row, so no scratch folder is made
    notes = [*preflight.notes, *api.notes(loaded)]
    kinds = {"refused": preflight.reasons, "grant": preflight.grants, "note": notes}
    lines = [f"{kind}: {line}" for kind, sentences in kinds.items() for line in sentences]
    answer({"safe": not preflight.reasons, "reasons": preflight.reasons, "grants": preflight.grants, "notes": notes}, as_json,
           lambda: "\n".join([*lines, "unsafe" if preflight.reasons else "safe"]))  # fmt: skip
    sys.exit(1 if preflight.reasons else 0)


@main.command(section="Plan", example="changeover plan follows.toml")
@SPEC
@JSON
def plan(spec: str, as_json: bool) -> None:
    """Print the steps and their locks.

    They are those that `run` walks, with the locks that each takes in the old store.
    """
    opened(spec)
    steps = [{"step": step.name, "does": step.does, "locks": step.locks} for step in api.plan()]
    answer(
        {"steps": steps},
        as_json,
        lambda: "\n".join(f"{s['step']:9} {s['does']}\n{'':9} locks: {s['locks']}" for s in steps),
    )


@main.command(section="Move", example="changeover run follows.toml")
@SPEC
@JSON
@DEBUG
def run(spec: str, as_json: bool, debug: bool) -> None:
    """Do everything from check to verify.

    Run it again after whatever stopped it.
    """
    with running(spec, "run", debug) as loaded:
        walk = api.run(loaded, lambda: spark_for(loaded), say=lambda line: click.echo(line, err=True))
    different = any(not verdict.equal for verdict in walk.verdicts)
    answer({"seconds": walk.seconds, "verdicts": [v.document() for v in walk.verdicts]}, as_json,
           lambda: terminal_text(walk.verdicts))  # fmt: skip
    sys.exit(1 if different else 0)


@main.command(section="Plan", example="changeover prove follows.toml")
@SPEC
@JSON
def prove(spec: str, as_json: bool) -> None:
    """Replay the races on both servers.

    In a scratch schema, with tombstones and without; nothing of yours is touched.
    """
    from changeover.verifiers.races import as_table

    outcomes = api.prove(opened(spec))
    lost = [one.race for one in outcomes if one.with_tombstones]
    answer({"equal": not lost, "races": outcomes}, as_json, lambda: as_table(outcomes))
    sys.exit(1 if lost else 0)


@main.command(section="Move", example="changeover prepare follows.toml")
@SPEC
@click.option("--anew", is_flag=True, help="Begin a new epoch: empty the target tables, all chunks pending.")
@JSON
@DEBUG
def prepare(spec: str, anew: bool, as_json: bool, debug: bool) -> None:
    """Make the slot, the ledger and the targets.

    Publication, slot, kept snapshot, ledger, target tables and gates.
    """
    from changeover.position import format_lsn

    with running(spec, "prepare", debug) as loaded:
        made = api.prepare(loaded, spark_for(loaded), anew=anew)
    stream = made.stream
    document = {"l0": format_lsn(stream.l0), "slot": stream.slot, "snapshot": stream.snapshot, "epoch": stream.epoch}
    answer(document, as_json, lambda: f"prepared: slot {document['slot']} at {document['l0']}, epoch {document['epoch']}")


@main.command(section="Move", example="changeover capture follows.toml --log-format json")
@SPEC
@LOG_FORMAT
@JSON
@DEBUG
def capture(spec: str, log_format: str, as_json: bool, debug: bool) -> None:
    """Spool the change stream until stopped.

    The one long-lived service.
    """
    from changeover.position import format_lsn

    with running(spec, "capture", debug, log_format) as loaded:
        result = api.capture(loaded)
    answer(result, as_json, lambda: (
        f"captured: {result.events:,} changes of {result.transactions:,} transactions, durable up to {format_lsn(result.end_lsn)}"
        f"{'; interrupted: nothing is lost, the same command goes on from here' if result.interrupted else ''}"))  # fmt: skip
    sys.exit(130 if result.interrupted else 0)


@main.command(section="Move", example="changeover backfill follows.toml --target store")
@SPEC
@TARGETS
@JSON
@DEBUG
def backfill(spec: str, targets: tuple[str, ...], as_json: bool, debug: bool) -> None:
    """Load all pending chunks, close the tables."""
    from changeover.jobs.ledger.progress import progress

    with running(spec, "backfill", debug) as loaded, progress(loaded, loaded.name):
        loads = api.backfill(loaded, spark_for(loaded, "backfill", targets), targets or None)
    answer({"loads": loads}, as_json, lambda: "\n".join(
        f"{load.source} into {load.target}: {load.rows:,} rows in {load.chunks} chunks, {load.refused} refused by a tombstone,"
        f" {load.swept} swept" for load in loads))  # fmt: skip


@main.command(section="Move", example="changeover replay follows.toml --follow")
@SPEC
@TARGETS
@click.option("--follow", is_flag=True, help="Go on until stopped, with the log on standard error.")
@LOG_FORMAT
@JSON
@DEBUG
def replay(spec: str, targets: tuple[str, ...], follow: bool, log_format: str, as_json: bool, debug: bool) -> None:
    """Offer what was spooled until caught up."""
    from changeover.position import format_lsn

    with running(spec, "replay", debug, log_format if follow else None) as loaded:
        spark = spark_for(loaded, "replay", targets)
        replayed = api.replay(loaded, spark, follow=follow, targets=targets or None)
    answer(replayed, as_json, lambda: (
        f"replayed: {replayed.events:,} events, applied up to {format_lsn(replayed.applied)}"
        f"{'; interrupted: nothing is lost, the same command goes on from here' if replayed.interrupted else ''}"))  # fmt: skip
    sys.exit(130 if replayed.interrupted else 0)


@main.command(section="Move", example="changeover verify follows.toml --report report.html")
@SPEC
@TARGETS
@click.option("--report", type=click.Path(), help="Write the HTML report here.")
@JSON
@DEBUG
def verify(spec: str, targets: tuple[str, ...], report: str | None, as_json: bool, debug: bool) -> None:
    """Compare every row at one position.

    Exit code 1 means that rows differ, 3 that a table could not be checked.
    """
    verdicts: list[Verdict] = []
    unchecked: list[str] = []
    try:
        with running(spec, "verify", debug) as loaded:
            api.verify(loaded, spark_for(loaded, "verify", targets), targets=targets or None, on_verdict=verdicts.append)
            if report:
                api.write_report(Path(report), verdicts)
    except ChangeoverError as error:
        unchecked = [str(error)]
        raise
    finally:
        if verdicts:
            answer({"verdicts": [v.document() for v in verdicts], "could_not_check": unchecked}, as_json,
                   lambda: terminal_text(verdicts))  # fmt: skip
    sys.exit(0 if all(verdict.equal for verdict in verdicts) else 1)


main.add_command(flags)


@main.command(section="Look", example="changeover explain follows.toml 1 follows 7")
@SPEC
@click.argument("key", nargs=-1, required=True)
@click.option("--table", help="The table, where several have a key of as many columns.")
@JSON
def explain(spec: str, key: tuple[str, ...], table: str | None, as_json: bool) -> None:
    """Tell the story of one row.

    KEY is the target's: chunk, cell, spooled events, images, stage.
    """
    story = api.explain(opened(spec), key, table=table)
    answer(story, as_json, lambda: "\n".join(story.lines()))


@main.command(section="Look", example="changeover status follows.toml --check")
@SPEC
@click.option("--check", is_flag=True, help="Exit 1, with a line for each reason, where something needs attention: for a probe.")
@click.option("--max-behind", type=click.IntRange(min=0), default=LAG_BYTES, show_default=True, metavar="BYTES",
              help="How far capture and replay may be behind, in bytes of WAL.")  # fmt: skip
@JSON
def status(spec: str, check: bool, max_behind: int, as_json: bool) -> None:
    """Say where the migration is.

    Chunks, positions, lag, authority, verdicts.
    """
    progress = api.status(opened(spec))
    problems = api.problems(progress, max_behind)
    lines = [f"attention {line}" for line in problems] or ["healthy"] if check else list(progress.lines())
    answer({**plain(progress), "healthy": not problems, "problems": problems}, as_json, lambda: "\n".join(lines))
    sys.exit(1 if check and problems else 0)


@main.command(section="Look", example="changeover history follows.toml")
@SPEC
@JSON
def history(spec: str, as_json: bool) -> None:
    """Print all runs, newest first."""
    runs = api.history(opened(spec))
    rows = [{"at": at, "step": step, "outcome": outcome, **detail} for at, step, outcome, detail in runs]
    answer({"runs": rows}, as_json, lambda: "\n".join(
        f"{r['at']:%Y-%m-%d %H:%M:%S}  {r['step']:<9} {r['outcome']}{details(r)}" for r in rows))  # fmt: skip


def details(run: Mapping[str, Any]) -> str:
    """Return what a run put on record beside its outcome, as a line's end."""
    entries = []
    for name, value in run.items():
        if name not in ("at", "step", "outcome", "host", "pid") and value not in (None, [], ""):
            parts = value if isinstance(value, list) else [value]
            entries.append(f"{name} {'; '.join(map(nested, parts))}")
    return f": {', '.join(entries)}" if entries else ""


def nested(part: Any) -> str:
    """Return a part of what a run put on record."""
    return f"({', '.join(f'{name} {value}' for name, value in part.items())})" if isinstance(part, dict) else str(part)


@main.command(section="End", example="changeover finalize follows.toml")
@SPEC
@JSON
def finalize(spec: str, as_json: bool) -> None:
    """End the migration: drop what is ours.

    Never a table of yours.
    """
    loaded = opened(spec)
    removed, left = api.finalize(loaded), api.leftovers(loaded)
    _removed(removed, left, list(api.kept(loaded).lines()), as_json)


@main.command(section="End", example="changeover purge follows.toml")
@SPEC
@JSON
def purge(spec: str, as_json: bool) -> None:
    """Remove rows that are kept after the end.

    Differences, samples, scratch, old files of a lake.
    """
    removed = list(api.purge(opened(spec)).lines())
    answer({"removed": removed}, as_json, lambda: "\n".join(f"removed: {one}" for one in removed) or "no row is kept")


@main.command(section="End", example="changeover abort follows.toml")
@SPEC
@JSON
def abort(spec: str, as_json: bool) -> None:
    """Undo all that prepare made.

    The old store is as before.
    """
    loaded = opened(spec)
    removed, left = api.abort(loaded), api.leftovers(loaded)
    _removed(removed, left, list(api.kept(loaded).lines()), as_json)


def _removed(removed: list[str], left: list[str], rows: list[str], as_json: bool) -> None:
    last = [f"left of ours in the old store: {', '.join(left) or 'nothing'}"]
    last += [f"rows are still kept: {', '.join(rows)}: `changeover purge SPEC` removes them"] if rows else []
    document = {"removed": removed, "left": left, "kept": rows}
    answer(document, as_json, lambda: "\n".join([*(f"removed: {line}" for line in removed), *last]))


@main.command(section="Try", context_settings={"ignore_unknown_options": True, "help_option_names": []})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def demo(arguments: tuple[str, ...]) -> None:
    """Move a live table on this machine.

    From an embedded PostgreSQL to another database and a local Delta table.
    """
    from changeover.cli.demo import main as act

    act(args=list(arguments), prog_name="changeover demo")


if __name__ == "__main__":
    main()
