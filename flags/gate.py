"""The gate: the evidence without which a stage is not left upwards. No data and inconclusive are not success.

Each rule is one function of what the ledger and the old store say; it returns a sentence for what does not hold. The same list is
what `flags show` prints, so that a person sees beforehand what `flags advance` will ask.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from ldclient.migrations.types import Origin, Stage

from changeover.flags.stages import ORDER, TABLE, needs_fence
from changeover.jobs.entries import CLOSED, Authority, Heartbeat, Load, VerdictRow
from changeover.jobs.ledger import Ledger
from changeover.position import format_lsn, parse_lsn
from changeover.session import application_name, connect
from changeover.spec import Spec

VERDICT_HOURS = 24.0
LAG_BYTES = 16 * 1024 * 1024
HEARTBEAT_SECONDS = 10.0
COMPARISONS = 100
"""Shadow reads that must have been compared before authority moves: fewer say nothing."""


@dataclass(frozen=True)
class Evidence:
    """What is known at one moment, read once so that all rules speak of the same."""

    now: datetime
    before: Stage
    after: Stage
    verdicts: Sequence[VerdictRow]
    loads: Sequence[Load]
    heartbeats: Sequence[Heartbeat]
    authority: Authority
    stage_since: datetime | None
    source_lsn: int
    capture_active: bool
    sources: tuple[str, ...]
    target: str

    @property
    def digest(self) -> str:
        """Return a hash of the evidence, for the audit log."""
        told = [self.before.value, self.after.value, [(v.run, v.verdict) for v in self.verdicts],
                [(b.process, b.stage, dict(b.counters)) for b in self.heartbeats]]  # fmt: skip
        return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()[:16]


def collect(spec: Spec, ledger: Ledger, before: Stage, after: Stage) -> Evidence:
    """Read the evidence for a step between two stages (driver; starts no JVM)."""
    assert spec.flag is not None
    with connect(spec.source.dsn.resolve(), application_name(spec.name, "gate")) as old:
        row = old.execute(
            "SELECT pg_current_wal_insert_lsn()::text,"
            " coalesce((SELECT active FROM pg_replication_slots WHERE slot_name = %s), false)",
            [spec.slot],
        ).fetchone()
    assert row is not None
    steps = [at for at, _, outcome, _ in ledger.audits("flags") if outcome in ("advanced", "rolled back")]
    return Evidence(
        now=datetime.now(UTC), before=before, after=after, verdicts=ledger.verdicts(), loads=ledger.loads(),
        heartbeats=ledger.heartbeats(), authority=ledger.authority(), stage_since=steps[0] if steps else None,
        source_lsn=parse_lsn(row[0]), capture_active=row[1], sources=tuple(t.source for t in spec.tables),
        target=spec.flag.target,
    )  # fmt: skip


def _loads_closed(e: Evidence) -> list[str]:
    return [f"{load.source} is not loaded into {load.target} yet" for load in e.loads
            if load.target == e.target and load.state != CLOSED]  # fmt: skip


def _verdict_fresh(e: Evidence) -> list[str]:
    """A full diff that is equal, newer than the limit and than the last failed dual write; at a fence, of this stage."""
    reasons = []
    for source in e.sources:
        newest = next((v for v in e.verdicts if (v.source, v.target) == (source, e.target)), None)
        if newest is None:
            reasons.append(f"{source} was never verified in {e.target}: run `changeover verify`")
            continue
        if newest.verdict != "equal":
            reasons.append(f"the last verdict on {source} in {e.target} is {newest.verdict} (run {newest.run})")
        if e.now - newest.at > timedelta(hours=VERDICT_HOURS):
            reasons.append(f"the last verdict on {source} is older than {VERDICT_HOURS:g} hours: run `changeover verify`")
        failed = last_failure(e.heartbeats)
        if failed and failed > newest.at:
            reasons.append(f"a dual write failed at {failed:%H:%M:%S}, after the last verdict: run `changeover verify`")
        if needs_fence(e.before, e.after) and e.stage_since and newest.at < e.stage_since:
            reasons.append(f"the last verdict on {source} is from before the stage {e.before.value}: run `changeover verify`")
    return reasons


def last_failure(heartbeats: Sequence[Heartbeat]) -> datetime | None:
    """Return when a router's mirror last failed or dropped a write."""
    times = [
        datetime.fromisoformat(last[0])
        for beat in heartbeats
        for mirror in mirrors(beat)
        for last in (mirror.get("last_failure"), mirror.get("last_drop"))
        if last
    ]
    return max(times, default=None)


def mirrors(beat: Heartbeat, origin: Origin | None = None) -> list[dict[str, Any]]:
    """Return the counters of a process's mirrors, to one store or to both."""
    names = [f"mirror_{one.value}" for one in Origin if origin in (None, one)]
    return [beat.counters[name] for name in names if name in beat.counters]


def _processes_present(e: Evidence) -> list[str]:
    alive = [b for b in e.heartbeats if (e.now - b.at).total_seconds() <= HEARTBEAT_SECONDS]
    if not alive:
        return ["no router was heard in the last 10 seconds: start the application"]
    return [f"process {b.process} is at {b.stage}, not {e.before.value}" for b in alive if b.stage != e.before.value]


def _lag_small(e: Evidence) -> list[str]:
    """Replay and capture keep up; not asked any more once the new store has authority."""
    if e.authority.store == "new":
        return []
    reasons = [] if e.capture_active else ["capture is not running: start `changeover capture`"]
    for load in e.loads:
        behind = e.source_lsn - load.applied
        if load.target == e.target and behind > LAG_BYTES:
            reasons.append(f"{load.source} in {e.target} is {behind:,} bytes of WAL behind (at {format_lsn(load.applied)})")
    return reasons


def _comparisons_clean(e: Evidence) -> list[str]:
    """Shadow reads of all processes: enough of them, and none that mismatched."""
    if not TABLE[e.before].compares or not needs_fence(e.before, e.after):
        return []
    counts = [beat.counters.get("comparisons", {}) for beat in e.heartbeats]
    compared, mismatched = (sum(int(c.get(name, 0)) for c in counts) for name in ("compared", "mismatched"))
    reasons = [] if compared >= COMPARISONS else [f"only {compared} shadow reads were compared: {COMPARISONS} are asked for"]
    return reasons + ([f"{mismatched} of {compared} shadow reads mismatched"] if mismatched else [])


def _mirror_whole(e: Evidence) -> list[str]:
    """Before the old store stops receiving: nothing is queued for it, and nothing failed since authority moved."""
    if e.after is not Stage.COMPLETE:
        return []
    counts = [mirror for beat in e.heartbeats for mirror in mirrors(beat, Origin.OLD)]
    lost = sum(int(c.get("failed", 0)) + int(c.get("dropped", 0)) for c in counts)
    return [f"{lost} mirrored writes to the old store failed or were dropped"] if lost else []


RULES: tuple[Callable[[Evidence], list[str]], ...] = (
    _loads_closed, _verdict_fresh, _processes_present, _lag_small, _comparisons_clean, _mirror_whole,
)  # fmt: skip


def objections(evidence: Evidence) -> list[str]:
    """Return every reason against the step; none means go."""
    if ORDER.index(evidence.after) != ORDER.index(evidence.before) + 1:
        return [f"{evidence.before.value} to {evidence.after.value} is not one step up"]
    return [reason for rule in RULES for reason in rule(evidence)]
