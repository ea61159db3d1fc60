"""Status: where a migration is, step by step, from the ledger, the spool and the stores; starts no JVM.

It looks and changes nothing, and has an answer in every state: before the copy, with a slot that is gone, after `finalize`. What
it says of a position is what the ledger says: every event below it was offered. Rows are counted for each target by itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from changeover.errors import FolderFailed, StepOrder
from changeover.jobs.capture.rogue import Rogue, rogue
from changeover.jobs.capture.service import WAITING
from changeover.jobs.guarantee import assumptions
from changeover.jobs.guarantee.assumptions import Asked, Moment
from changeover.jobs.ledger import epochs, lease
from changeover.jobs.ledger.epochs import NEW, OLD
from changeover.jobs.ledger.ledger import Ledger
from changeover.jobs.ledger.records import CLOSED, Load, Stream
from changeover.jobs.reverse import path as reverse
from changeover.jobs.source.changes import change_source
from changeover.jobs.spool.table import spool_of
from changeover.position import format_lsn, parse_lsn
from changeover.session import application_name, connect, speaking_to
from changeover.spec import Spec
from changeover.stores import open_store
from changeover.stores.base.interface import TargetTable
from changeover.tenants import listed

HEARD_SECONDS = 10.0
"""Age of a heartbeat up to which its router counts as alive."""


@dataclass(frozen=True)
class Status:
    """The steps with their state, each load with its chunks and position, the stream, the stage, and the newest verdicts.

    Bytes are of the old store's write-ahead log. `behind_bytes` of a load is what lies between it
    and the old store's end. It is None once the new store has all authority, because replay then
    rests. While tenants are at both stores, `reverse_path` has the other direction's.
    """

    name: str
    steps: list[dict[str, Any]]
    loads: list[dict[str, Any]]
    stream: dict[str, Any]
    stage: str | None
    routers: dict[str, int]
    store: str
    epoch: int
    tenants: list[str]
    """Those whose authority is at the other store."""
    verdicts: list[dict[str, Any]]
    reverse_path: reverse.State | None
    rogue: list[Rogue]
    broken: list[str]
    """What the stream rests on and does not hold any more (`assumptions`)."""

    def state(self, step: str) -> str:
        """Return the state of a step.

        Args:
            step: The step's name.

        Returns:
            Its state, in the words of the page.
        """
        return str(next(one["state"] for one in self.steps if one["step"] == step))

    def lines(self) -> Iterator[str]:
        """Return the page for a person.

        Yields:
            Lines for a person.
        """
        yield self.name
        for step in self.steps:
            yield f"  {step['step']:<9} {step['state']}{f' ({_short(at)})' if (at := step['at']) else ''}"
            yield from (f"    {line}" for line in self._details(step["step"]))
        routers = ", ".join(f"{count} at {stage}" for stage, count in self.routers.items()) or "none was heard lately"
        yield f"  flag      {self.stage or 'never switched'}; the {self.store} store has authority (epoch {self.epoch})"
        if self.tenants:
            count, other = len(self.tenants), NEW if self.store == OLD else OLD
            yield f"    the {other} store has it over {count:,} tenant{'s' * (count > 1)}: {listed(self.tenants)}"
        yield f"    routers: {routers}"
        if self.reverse_path is not None:
            yield f"  reverse   {self.reverse_path.line}"
            yield from (f"    {line}" for line in _reverse_lines(self.reverse_path))
        yield from (f"  rogue     {one}" for one in self.rogue)
        yield from (f"  broken    {one}" for one in self.broken)

    def _details(self, step: str) -> list[str]:
        if step == "capture" and self.stream["source_lsn"]:
            lines = (self.stream["waiting"], _stream_line(self.stream), self.stream["alarm"], *self.stream["notes"])
            return [line for line in lines if line]
        if step == "backfill":
            return [_load_line(load) for load in self.loads]
        if step == "replay":
            return [_replay_line(load) for load in self.loads]
        if step == "verify":
            return [f"{v['source']} in {v['target']}: {v['verdict']} ({_short(v['at'])}, run {v['run']})" for v in self.verdicts]
        return []


def _short(at: datetime) -> str:
    return f"{at:%Y-%m-%d %H:%M:%S}"


def _stream_line(stream: Mapping[str, Any]) -> str:
    spooled = f"spooled up to {stream['spool_end']}, {stream['behind_bytes']:,} bytes behind" if stream["spool_end"] else "no spool"
    kept = f"{stream['kept_wal_bytes']:,} bytes of WAL kept" if stream["kept_wal_bytes"] is not None else "no WAL kept"
    if stream["log_bytes"] is not None:
        kept = f"the trigger log has {stream['log_bytes']:,} bytes"
    return f"{spooled} the source at {stream['source_lsn']}, {kept}"


def _load_line(load: Mapping[str, Any]) -> str:
    stopped = f"; stopped: {load['stopped']}" if load["stopped"] else ""
    return (
        f"{load['source']} in {load['target']}: {load['state']}, {load['chunks_loaded']} of {load['chunks']} chunks,"
        f" {load['rows']:,} rows, {load['refused']:,} refused by a tombstone, {load['swept']:,} swept{stopped}"
    )


def _replay_line(load: Mapping[str, Any]) -> str:
    behind = "at rest" if load["behind_bytes"] is None else f"{load['behind_bytes']:,} bytes behind"
    kept = f", about {load['row_versions']:,} row versions" if load["row_versions"] else ""
    return f"{load['source']} in {load['target']}: {load['events']:,} events, up to {load['applied']}, {behind}{kept}"


def _reverse_lines(state: reverse.State) -> list[str]:
    stopped = [f"; stands still: {load.stopped}" if load.stopped else "" for load in state.loads]
    return ([state.alarm] if state.alarm else []) + [
        f"{load.source} in {load.target}: {load.events:,} events, up to {format_lsn(load.applied)}{why}"
        for load, why in zip(state.loads, stopped, strict=True)
    ]


def status(spec: Spec) -> Status:
    """Look at the ledger, the spool and the slot (driver; changes nothing).

    Args:
        spec: The migration's spec.

    Returns:
        How the migration stands.

    Raises:
        StepOrder: Prepare did not run.
        ServerUnavailable: A server can't be reached.
    """
    with Ledger.open(spec, "status") as ledger:
        known = ledger.stream("status")
        prepared, finalized = ledger.milestones()
        alive = lease.is_held(ledger.connection, spec.name, "capture")
        stream = _stream(spec, known, _why_not(ledger), alive)
        authority, changes = ledger.authority(), ledger.authorities()
        row_versions = _row_versions(spec)
        rests = finalized or epochs.at(changes, OLD) is None
        loads = _loads(ledger, None if rests else stream["source_lsn"], row_versions)
        verdicts = _newest_verdicts(ledger)
        now = ledger.now()
        heard = [beat.stage for beat in ledger.heartbeats() if (now - beat.at).total_seconds() <= HEARD_SECONDS]
        return Status(
            spec.name, _steps(ledger, loads, verdicts, stream, (prepared, finalized)), loads, stream, ledger.stage(),
            dict(Counter(heard)), authority.store, authority.epoch, epochs.apart(changes), verdicts,
            None if finalized else reverse.state(spec, ledger), [] if finalized else rogue(spec, ledger), broken(spec, ledger),
        )  # fmt: skip


def broken(spec: Spec, ledger: Ledger) -> list[str]:
    """Return what the stream rests on and does not hold any more, as sentences: what a watch of capture would find (looks only)."""
    with connect(spec.source.dsn.resolve(), application_name(spec.name, "status")) as old:
        return assumptions.sentences(Moment.WATCH, Asked(spec, old, ledger))


def _why_not(ledger: Ledger) -> str | None:
    """Return for what capture waits, or why its last run failed, as far as that is on record; else None."""
    at, _, outcome, detail = next(iter(ledger.audits("capture")), (None, "", "", {}))
    if outcome not in (WAITING, "failed") or at is None:
        return None
    return f"{'waiting' if outcome == WAITING else 'ended'} since {_short(at)}: {detail.get('error', 'no reason given')}"


def _stream(spec: Spec, known: Stream, why: str | None, alive: bool) -> dict[str, Any]:
    """Return the state of the slot or the trigger log, the spool's end, and how far both are behind; what is gone is None.

    A slot that rests between two connections of a capture that is `alive` is as good as active; where that waits, it says so.
    """
    dsn = spec.source.dsn.resolve()
    with connect(dsn, application_name(spec.name, "status")) as old, speaking_to(dsn, "reading the slot"):
        state = change_source(spec).state(old)
    here, slot = state.position, state.reading
    if slot == "inactive" and alive:
        slot = "waiting" if why else "active"
    notes: list[str] = []
    end: int | None = None
    try:
        spool = spool_of(spec, known.epoch)
        end = max(spool.end(), known.l0)
        notes = [f"{relation}: {note} (at {format_lsn(lsn)})" for relation, lsn, note in spool.notes()]
    except StepOrder:  # finalized, or the work folder is elsewhere
        pass
    except FolderFailed as error:
        notes = [str(error)]
    return {
        "slot": slot, "alarm": state.alarm, "notes": notes, "waiting": why, "log_bytes": state.log_bytes,
        "source_lsn": here, "kept_wal_bytes": state.kept_bytes, "spool_end": None if end is None else format_lsn(end),
        "behind_bytes": None if end is None else max(0, parse_lsn(here) - end),
    }  # fmt: skip


def _row_versions(spec: Spec) -> dict[tuple[str, str], int]:
    """Return about how many versions each target keeps beside each table; what is not collected yet, or can't be."""
    counts = {}
    for target in spec.targets.values():
        with open_store(spec, target, "status") as store:
            for table in spec.tables:
                counts[table.source, target.name] = store.row_versions(TargetTable(*table.target_name, (), table.key))
    return counts


def _loads(ledger: Ledger, source_lsn: str | None, row_versions: Mapping[tuple[str, str], int]) -> list[dict[str, Any]]:
    return [
        {**load.__dict__, **_chunks(ledger, load), "applied": format_lsn(load.applied),
         "behind_bytes": None if source_lsn is None else max(0, parse_lsn(source_lsn) - load.applied),
         "row_versions": row_versions.get((load.source, load.target), 0)}
        for load in ledger.loads()
    ]  # fmt: skip


def _chunks(ledger: Ledger, load: Load) -> dict[str, int]:
    chunks = ledger.chunks(load.source, load.target)
    return {
        "chunks": len(chunks), "chunks_loaded": sum(chunk.loaded is not None for chunk in chunks),
        "rows": sum(chunk.rows or 0 for chunk in chunks),
    }  # fmt: skip


def _newest_verdicts(ledger: Ledger) -> list[dict[str, Any]]:
    newest: dict[tuple[str, str], dict[str, Any]] = {}
    for one in ledger.verdicts():
        entry = {"source": one.source, "target": one.target, "verdict": one.verdict, "at": one.at, "run": one.run}
        newest.setdefault((one.source, one.target), entry)
    return list(newest.values())


CAPTURE = {
    "active": "running", "waiting": "waiting", "inactive": "not running", "missing": "the slot is missing",
    "lost": "the slot has lost its WAL", "no log": "the trigger log is missing",
}  # fmt: skip


def _steps(
    ledger: Ledger, loads: list[dict[str, Any]], verdicts: list[dict[str, Any]], stream: Mapping[str, Any],
    milestones: tuple[datetime, datetime | None],
) -> list[dict[str, Any]]:  # fmt: skip
    """Return each step of the pipeline, and `finalize`, with its state and when it was last on record."""
    (prepared, finalized), begun = milestones, ledger.begun()
    last = {step: at for at, step, _, _ in reversed(ledger.audits())}
    closed, wanted = sum(load["state"] == CLOSED for load in loads), len(loads)
    loaded, planned = (sum(load[name] for load in loads) for name in ("chunks_loaded", "chunks"))
    behind = [load["behind_bytes"] for load in loads if load["behind_bytes"] is not None]
    words = {verdict["verdict"] for verdict in verdicts}
    states = {
        "prepare": ("done" if begun is None else f"epoch {begun} is begun: run `changeover prepare SPEC` to its end", prepared),
        "capture": ("ended" if finalized else CAPTURE[stream["slot"]], last.get("capture")),
        "backfill": ("done" if closed == wanted else f"{loaded} of {planned} chunks", last.get("backfill")),
        "replay": (f"{max(behind):,} bytes behind at most" if behind else "at rest", last.get("replay")),
        "verify": (", ".join(sorted(words)) or "never", max((verdict["at"] for verdict in verdicts), default=None)),
        "finalize": ("done" if finalized else "not yet", finalized),
    }  # fmt: skip
    return [{"step": step, "state": state, "at": at} for step, (state, at) in states.items()]
