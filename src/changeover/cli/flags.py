"""The commands `changeover flags …`: the migration flag shown and switched, held to the evidence.

Each calls one function of `changeover.api` with the same words, and starts no JVM.
"""

from __future__ import annotations

import threading
from typing import Any

import click

from changeover import api
from changeover.cli.command import DEBUG, JSON, LOG_FORMAT, SPEC, Sections, answer, opened, plain, running
from changeover.errors import Interrupted, UsageError
from changeover.files.runlog import JSON as AS_JSON


@click.group(cls=Sections, section="Hand over")
def flags() -> None:
    """Show and switch the migration flag.

    Held to the evidence.
    """


@flags.command(example="changeover flags show follows.toml")
@SPEC
@JSON
def show(spec: str, as_json: bool) -> None:
    """Go or no-go, with every reason."""
    from changeover.flags.cutover.moves import some

    shown = api.show(opened(spec))
    desired = f", the flag asks for {shown.desired.value}" if shown.desired is not shown.stage else ""
    lines = [f"stage {shown.stage.value}{desired}, authority {shown.authority.store} (epoch {shown.authority.epoch})"]
    if shown.apart is not None:
        epochs = ", ".join(map(str, shown.apart.epochs))
        lines.append(f"at the {shown.apart.store} store: {some(shown.apart.first, shown.apart.count)}, epoch {epochs}")
    if shown.next is not None:
        lines += [f"next: {shown.next.value}: {'go' if shown.go else 'no-go'}", *(f"  {reason}" for reason in shown.reasons)]
    if shown.back is not None:
        lines.append(f"back: {shown.back.value}: {_loses(shown.loses, 'would be lost')}")
    if shown.reverse_path is not None:
        lines.append(f"reverse path: {shown.reverse_path.line}")
    if shown.reads:
        known = shown.recorded_reads > 0
        lines.append(f"reads: {shown.reads} % of contexts " + (READ_NEW if known else "are served live, which is not on record: "
                     f"they read the old store until `changeover flags advance --reads {shown.reads}`"))  # fmt: skip
    if shown.mismatched:
        lines.append(f"reads: {len(shown.mismatched)} that mismatched are on record, the newest is {shown.mismatched[0]}")
    lines += [f"note: {line}" for line in shown.notes]
    lines += [f"rogue: {line}" for line in shown.rogue]
    stages = {name: stage.value if (stage := getattr(shown, name)) else None for name in ("stage", "desired", "next", "back")}
    answer({**plain(shown), **stages, "go": shown.go}, as_json, lambda: "\n".join(lines))


def _loses(writes: int | None, verb: str) -> str:
    if writes is None:
        return f"every write since the new store has authority {verb}"
    return f"{writes:,} write{'s' * (writes > 1)} that never reached the old store {verb}" if writes else f"nothing {verb}"


READ_NEW = "read the new store before writes go there"

READS = click.option(
    "--reads", type=click.IntRange(0, 100), metavar="PERCENT", help="Only reads, of so many contexts, at shadow; writes stay."
)

TENANTS = click.option(
    "--tenant", "tenants", multiple=True, help="Only this tenant, between shadow and live; may be given more than once."
)


@flags.command(example="changeover flags advance follows.toml")
@SPEC
@TENANTS
@READS
@click.option("--override", metavar="WHY", help="Go without the evidence; the reason is logged.")
@JSON
def advance(spec: str, tenants: tuple[str, ...], reads: int | None, override: str | None, as_json: bool) -> None:
    """Go one stage up, if the evidence holds."""
    _step(api.advance(opened(spec), override=override, tenants=tenants or None, reads=_alone(reads, tenants)), as_json)


@flags.command(example="changeover flags rollback follows.toml")
@SPEC
@TENANTS
@READS
@JSON
def rollback(spec: str, tenants: tuple[str, ...], reads: int | None, as_json: bool) -> None:
    """Go one stage down; asks for no evidence."""
    _step(api.rollback(opened(spec), tenants=tenants or None, reads=_alone(reads, tenants)), as_json, back=True)


def _alone(reads: int | None, tenants: tuple[str, ...]) -> int | None:
    if reads is not None and tenants:
        raise UsageError("--reads and --tenant are given: a tenant's reads move with its rows, so name one of the two")
    return reads


def _step(step: Any, as_json: bool, *, back: bool = False) -> None:
    from changeover.flags.cutover.moves import some

    document = {"from": step.before.value, "to": step.after.value, "epoch": step.epoch, "pause_seconds": step.pause_seconds}
    document |= {"lost": step.lost, "lacking": step.lacking} if back else {}
    document |= {"tenants": list(step.tenants), "unknown": list(step.unknown)} if step.tenants is not None else {}
    document |= {"notes": list(step.notes)} if step.notes else {}
    if step.reads is not None:
        text = "\n".join((f"{step.reads} % of contexts {READ_NEW}", *step.notes))
        answer({**document, "reads": step.reads}, as_json, lambda: text)
        return
    notes = "".join(f"\n{note}" for note in step.notes)
    pause = f", writers were held up {step.pause_seconds:.2f} s at most" if step.pause_seconds is not None else ""
    lost = f"; {_loses(step.lost, 'lost')}" if back else ""
    if step.lacking:
        known = " as far as routers know: their mirrors alone" if step.lost is not None else ", since nothing"
        lost += f"{known} brought the old store up to date ({step.lacking})"
    names = f"{some(step.tenants)}: " if step.tenants is not None else ""
    unknown = f"\nno row as yet, in either store, of {some(step.unknown)}" if step.unknown else ""
    stages = f"{step.before.value} → {step.after.value} (epoch {step.epoch}{pause})"
    answer(document, as_json, lambda: f"{names}{stages}{lost}{unknown}{notes}")


@flags.command(example="changeover flags watch follows.toml")
@SPEC
@LOG_FORMAT
@DEBUG
def watch(spec: str, log_format: str, debug: bool) -> None:
    """Follow a flag that is switched elsewhere.

    Asks for readiness, fences, writes the epoch; until stopped.
    """
    with running(spec, "flags-watch", debug, log_format if log_format == AS_JSON else None) as loaded:
        click.echo(f"watching the flag of {loaded.name}; Ctrl-C ends it")
        if api.watch(loaded, threading.Event(), say=click.echo):
            raise Interrupted("flags watch")
