"""The commands `changeover flags …`: the migration flag shown and turned, held to the evidence.

Each calls one function of `changeover.api` with the same words, and starts no JVM.
"""

from __future__ import annotations

import threading
from typing import Any

import click

from changeover import api
from changeover.cli.command import DEBUG, JSON, LOG_FORMAT, SPEC, Sections, answer, opened, plain, running
from changeover.errors import Interrupted
from changeover.files.runlog import JSON as AS_JSON


@click.group(cls=Sections, section="Hand over")
def flags() -> None:
    """Show and turn the migration flag.

    Held to the evidence.
    """


@flags.command(example="changeover flags show follows.toml")
@SPEC
@JSON
def show(spec: str, as_json: bool) -> None:
    """Go or no-go, with every reason."""
    from changeover.flags.cutover.moves import some

    seen = api.show(opened(spec))
    desired = f", the flag asks for {seen.desired.value}" if seen.desired is not seen.stage else ""
    lines = [f"stage {seen.stage.value}{desired}, authority {seen.authority.store} (epoch {seen.authority.epoch})"]
    if seen.apart is not None:
        epochs = ", ".join(map(str, seen.apart.epochs))
        lines.append(f"at the {seen.apart.store} store: {some(seen.apart.first, seen.apart.count)}, epoch {epochs}")
    if seen.next is not None:
        lines += [f"next: {seen.next.value}: {'go' if seen.go else 'no-go'}", *(f"  {reason}" for reason in seen.reasons)]
    if seen.back is not None:
        lines.append(f"back: {seen.back.value}: {_loses(seen.loses, 'would be lost')}")
    if seen.reverse_path is not None:
        lines.append(f"reverse path: {seen.reverse_path.line}")
    lines += [f"note: {one}" for one in seen.notes]
    lines += [f"rogue: {one}" for one in seen.rogue]
    stages = {name: stage.value if (stage := getattr(seen, name)) else None for name in ("stage", "desired", "next", "back")}
    answer({**plain(seen), **stages, "go": seen.go}, as_json, lambda: "\n".join(lines))


def _loses(writes: int, verb: str) -> str:
    return f"{writes:,} write{'s' * (writes > 1)} that never reached the old store {verb}" if writes else f"nothing {verb}"


TENANTS = click.option(
    "--tenant", "tenants", multiple=True, help="Only this tenant, between shadow and live; may be given more than once."
)


@flags.command(example="changeover flags advance follows.toml")
@SPEC
@TENANTS
@click.option("--override", metavar="WHY", help="Go without the evidence; the reason is logged.")
@JSON
def advance(spec: str, tenants: tuple[str, ...], override: str | None, as_json: bool) -> None:
    """Go one stage up, if the evidence holds."""
    _step(api.advance(opened(spec), override=override, tenants=tenants or None), as_json)


@flags.command(example="changeover flags rollback follows.toml")
@SPEC
@TENANTS
@JSON
def rollback(spec: str, tenants: tuple[str, ...], as_json: bool) -> None:
    """Go one stage down; asks for no evidence."""
    _step(api.rollback(opened(spec), tenants=tenants or None), as_json, back=True)


def _step(done: Any, as_json: bool, *, back: bool = False) -> None:
    from changeover.flags.cutover.moves import some

    told = {"from": done.before.value, "to": done.after.value, "epoch": done.epoch, "pause_seconds": done.pause_seconds}
    told |= {"lost": done.lost, "lacking": done.lacking} if back else {}
    told |= {"tenants": list(done.tenants), "unknown": list(done.unknown)} if done.tenants is not None else {}
    told |= {"notes": list(done.notes)} if done.notes else {}
    notes = "".join(f"\n{note}" for note in done.notes)
    pause = f", writers were held up {done.pause_seconds:.2f} s at most" if done.pause_seconds is not None else ""
    lost = f"; {_loses(done.lost, 'lost')}" if back else ""
    lost += (
        f" as far as routers know: their mirrors alone brought the old store up to date ({done.lacking})" if done.lacking else ""
    )
    whose = f"{some(done.tenants)}: " if done.tenants is not None else ""
    unknown = f"\nno row as yet, in either store, of {some(done.unknown)}" if done.unknown else ""
    answer(told, as_json, lambda: f"{whose}{told['from']} → {told['to']} (epoch {told['epoch']}{pause}){lost}{unknown}{notes}")


@flags.command(example="changeover flags watch follows.toml")
@SPEC
@LOG_FORMAT
@DEBUG
def watch(spec: str, log_format: str, debug: bool) -> None:
    """Follow a flag that is turned elsewhere.

    Asks for readiness, fences, writes the epoch; until stopped.
    """
    with running(spec, "flags-watch", debug, log_format if log_format == AS_JSON else None) as loaded:
        click.echo(f"watching the flag of {loaded.name}; Ctrl-C ends it")
        if api.watch(loaded, threading.Event(), say=click.echo):
            raise Interrupted("flags watch")
