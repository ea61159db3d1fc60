"""Readiness: the evidence without which a stage is not left upwards. No data and inconclusive are not success.

Each rule is one function of what the ledger and the old store say; it returns a sentence for what does not hold. The same list is
what `flags show` prints, so that a person sees beforehand what `flags advance` will ask.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from ldclient.migrations.types import Origin, Stage

from changeover.errors import NotReady
from changeover.flags.history import mirrored_since, switches
from changeover.flags.observed import Observations, observations
from changeover.flags.rights import Rights, rights
from changeover.flags.stages import ORDER, TABLE, needs_fence, next_stage
from changeover.jobs.capture.rogue import Rogue, rogue
from changeover.jobs.guarantee import assumptions
from changeover.jobs.guarantee.assumptions import Asked
from changeover.jobs.health import LAG_BYTES
from changeover.jobs.ledger.ledger import Ledger
from changeover.jobs.ledger.records import CLOSED, HEARTBEAT_SECONDS, Heartbeat, Load, VerdictRow
from changeover.jobs.reverse.path import State, state
from changeover.jobs.source.changes import change_source
from changeover.jobs.transform.tenancy import flag_of
from changeover.position import format_lsn, parse_lsn
from changeover.session import application_name, connect
from changeover.spec import Spec

VERDICT_HOURS = 24.0
COMPARISONS = 100
"""Reads that must have been compared at a stage that compares before it is left upwards: fewer say nothing."""


@dataclass(frozen=True)
class Evidence:
    """What is known at one moment, read once so that all rules speak of the same.

    `everybodys` is the stage at which processes act, where the step from `before` to `after` is of some tenants alone.
    """

    now: datetime
    before: Stage
    after: Stage
    verdicts: Sequence[VerdictRow]
    loads: Sequence[Load]
    heartbeats: Sequence[Heartbeat]
    observations: Observations
    stage_since: datetime | None
    mirrored_since: int | None
    source_lsn: int
    capture_active: bool
    sources: tuple[str, ...]
    target: str
    reverse_path: State | None = None
    rogue: tuple[Rogue, ...] = ()
    everybodys: Stage | None = None
    stopped: Mapping[str, str] = field(default_factory=dict)
    """Why each table is stopped that is, or will be at the next look."""
    rights: Rights = field(default_factory=Rights)
    mirrors: bool = False
    """Whether the application mirrors its writes itself, as the spec says."""
    recorded_mirror: str | None = None
    """What mirrors, as the ledger has it, where that is something else than in the spec."""
    replaying: bool = True
    """Whether a replay runs, by its session with the ledger."""
    stages: Collection[Stage] = ORDER
    """Those that the flag has."""

    @property
    def acting(self) -> Stage:
        """Return the stage at which processes act."""
        return self.everybodys or self.before

    def enters(self, stage: Stage) -> bool:
        """Return whether the step comes to a stage, or passes it in a flag that lacks it.

        Args:
            stage: The stage.

        Returns:
            Whether it lies above the stage before, and not above the one after.
        """
        return ORDER.index(self.before) < ORDER.index(stage) <= ORDER.index(self.after)

    @property
    def digest(self) -> str:
        """Return a hash of the evidence, for the audit log."""
        digested = [self.before.value, self.after.value, [(v.run, v.verdict) for v in self.verdicts],
                [(b.process, b.stage, dict(b.counters)) for b in self.heartbeats]]  # fmt: skip
        return hashlib.sha256(json.dumps(digested, sort_keys=True, default=str).encode()).hexdigest()[:16]


def collect(
    spec: Spec, ledger: Ledger, before: Stage, after: Stage, everybodys: Stage | None = None, *, stages: Collection[Stage] = ORDER
) -> Evidence:
    """Read the evidence for a step between two stages, of everybody or of some tenants (driver; starts no JVM).

    Args:
        spec: The migration's spec.
        ledger: The migration's ledger.
        before: The stage before the step.
        after: The stage after the step.
        everybodys: The stage of everybody else, where the step is that of some tenants.
        stages: The stages that the flag has.

    Returns:
        The evidence, positions as LSNs in bytes.

    Raises:
        ServerUnavailable: The old store or the ledger can't be reached.
        SecretMissing: The environment variable of a DSN is not set.
    """
    with connect(spec.source.dsn.resolve(), application_name(spec.name, "readiness")) as old:
        source = change_source(spec).state(old)
        altered = assumptions.altered(Asked(spec, old, ledger))
    past = switches(ledger)
    prepared = (ledger.milestones()[0], ledger.stream("readiness").l0) if ledger.exists() else ()
    return Evidence(
        now=ledger.now(), before=before, after=after, verdicts=ledger.verdicts(), loads=ledger.loads(),
        heartbeats=ledger.heartbeats(), observations=observations(ledger.authorities()), stage_since=past[0].at if past else None,
        mirrored_since=mirrored_since(past, *prepared), source_lsn=parse_lsn(source.position),
        capture_active=source.reading == "active",
        sources=tuple(t.source for t in spec.tables), target=flag_of(spec).target, reverse_path=state(spec, ledger),
        rogue=tuple(rogue(spec, ledger)), everybodys=everybodys,
        rights=rights(spec) if takes_over(before, after) else Rights(),
        stopped={**altered, **(ledger.stopped() if ledger.exists() else {})}, mirrors=spec.mirrors,
        replaying=ledger.is_connected("replay"),
        recorded_mirror=recorded if ledger.exists() and (recorded := ledger.mirror()) != flag_of(spec).mirror else None,
        stages=stages,
    )  # fmt: skip


def _nothing_stopped(e: Evidence) -> list[str]:
    """While the old store has authority over anything, no table stands still before the end of its stream."""
    if Origin.OLD not in e.observations.stores:
        return []
    return [f"{source} goes no further: {why}: `changeover prepare --anew SPEC`" for source, why in sorted(e.stopped.items())]


def takes_over(before: Stage, after: Stage) -> bool:
    """Return whether a step hands authority to the new store (pure).

    Args:
        before: The stage before the step.
        after: The stage after the step.

    Returns:
        True where the new store takes the writes afterwards and the old one did before.
    """
    return TABLE[before].writes is Origin.OLD and TABLE[after].writes is Origin.NEW


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
    """Return the counters of a process's mirrors, to one store or to both.

    Args:
        beat: The last heartbeat of a process.
        origin: The store that is mirrored to; None is both.

    Returns:
        The counters, one mapping a mirror.
    """
    names = [f"mirror_{store.value}" for store in Origin if origin in (None, store)]
    return [beat.counters[name] for name in names if name in beat.counters]


def _processes_present(e: Evidence) -> list[str]:
    heard = [b for b in e.heartbeats if b.alive(e.now)]
    if not heard:
        return [f"no router was heard in the last {HEARTBEAT_SECONDS:g} seconds: start the application"]
    return [f"process {b.process} is at {b.stage}, not {e.acting.value}" for b in heard if b.stage != e.acting.value]


def _lag_small(e: Evidence) -> list[str]:
    """Replay and capture keep up; not asked any more once the new store has authority over everything."""
    if Origin.OLD not in e.observations.stores:
        return []
    reasons = [] if e.capture_active else ["capture is not running: start `changeover capture`"]
    for load in e.loads:
        behind = e.source_lsn - load.applied
        if load.target == e.target and behind > LAG_BYTES:
            reasons.append(f"{load.source} in {e.target} is {behind:,} bytes of WAL behind (at {format_lsn(load.applied)})")
    return reasons


def _streams_run(e: Evidence) -> list[str]:
    """Before both stores are to get every write: what brings it runs, where nothing else does."""
    if not e.enters(Stage.DUALWRITE) or e.mirrors or e.replaying:
        return []
    return ["replay is not running, which brings every write to the new store: start `changeover replay --follow`"]


def _mirror_agreed(e: Evidence) -> list[str]:
    """What mirrors is the same in the spec, on record and in every process: the way back rests on it."""
    reasons = [] if e.recorded_mirror is None else [
        f"flag.mirror is on record as {e.recorded_mirror!r}, and is another one in the spec: run `changeover replay` with this spec"
    ]  # fmt: skip
    heard = [beat for beat in e.heartbeats if beat.alive(e.now) and beat.counters.get("mirrors", e.mirrors) is not e.mirrors]
    wants = "mirrors, and the spec says that the streams do" if not e.mirrors else "does not mirror, and the spec says that it does"
    return reasons + [f"process {beat.process} {wants}: deploy it with this spec" for beat in heard]


def _way_back(e: Evidence) -> list[str]:
    """Before the new store takes over: what is written to it will reach the old one, or nobody can go back without losing it."""
    way = e.reverse_path
    if e.mirrors or not takes_over(e.before, e.after) or e.after is Stage.COMPLETE or way is None or way.lacking is None:
        return []
    return [
        f"nothing would keep the old store up to date after the step, and a rollback would lose every write: {way.lacking};"
        ' mend that, or set flag.mirror to "application"'
    ]


def _replay_past_dualwrite(e: Evidence) -> list[str]:
    """Before reads are compared: what was written to the old store alone, before the mirror began, must be in the new one."""
    if not e.enters(Stage.SHADOW) or e.enters(Stage.DUALWRITE):  # a flag without dualwrite begins both at once
        return []
    if e.mirrored_since is None:
        return [
            "where dualwrite began is not on record: switch the flag by `changeover flags`, or let `changeover flags watch` run"
        ]
    return [
        f"{load.source} in {e.target} is replayed up to {format_lsn(load.applied)}, and dualwrite began at"
        f" {format_lsn(e.mirrored_since)}: what was written before is not all there yet, let `changeover replay` go on"
        for load in e.loads
        if load.target == e.target and load.applied < e.mirrored_since
    ]


def _comparisons_clean(e: Evidence) -> list[str]:
    """Reads compared at this stage, by all processes since its switch, of tenants that stand apart too: enough, and no mismatch."""
    if not TABLE[e.acting].compares:
        return []
    since = [beat for beat in e.heartbeats if e.stage_since is None or beat.at >= e.stage_since]
    counts = [beat.counters.get("comparisons", {}).get("at_stage", {}) for beat in since]
    at_stage = [count for count in counts if count.get("stage") == e.acting.value]
    names = ("compared", "mismatched", "inconclusive")
    compared, mismatched, open_ = (sum(int(c.get(name, 0)) for c in at_stage) for name in names)
    besides = f", and {open_} stayed inconclusive" if open_ else ""
    reasons = [] if compared >= COMPARISONS else [
        f"only {compared} reads were compared at {e.acting.value}{besides}: {COMPARISONS} are asked for"
    ]  # fmt: skip
    if open_ > compared:
        reasons.append(f"{open_} reads stayed inconclusive at {e.acting.value}, more than the {compared} that were compared")
    return reasons + ([
        f"{mismatched} of {compared} reads compared at {e.acting.value} mismatched: find out why, then go back by"
        " `changeover flags rollback` and up again, which counts anew"
    ] if mismatched else [])  # fmt: skip


def _mirror_whole(e: Evidence) -> list[str]:
    """Before the old store stops receiving: nothing that was written since authority moved was lost on its way there."""
    if e.after is not Stage.COMPLETE or (e.reverse_path is not None and e.reverse_path.lacking is None):
        return []
    gone = lost(e.heartbeats, e.observations.epochs(Origin.NEW), e.now)
    return [f"{gone} mirrored writes to the old store failed, were dropped, or died with their process"] if gone else []


def lost(heartbeats: Sequence[Heartbeat], epochs: Collection[int], now: datetime) -> int:
    """Return how many writes of rows under some epochs of the new store never reached the old one (pure).

    That is what a rollback over the fence loses. What a dead process had queued when it was last
    heard counts too. Tenants that moved together share an epoch: of one of them alone these are no
    fewer than its own.

    Args:
        heartbeats: The last heartbeat of each process.
        epochs: The epochs under which the rows were written.
        now: The ledger's own time.

    Returns:
        The number of writes.
    """
    return sum(
        int(mirror.get("lost", {}).get(str(epoch), 0))
        + (int(mirror.get("queued", {}).get(str(epoch), 0)) if not beat.alive(now) else 0)
        for beat in heartbeats
        for mirror in mirrors(beat, Origin.OLD)
        for epoch in epochs
    )


def _reverse_open(e: Evidence) -> list[str]:
    """While the new store has authority over anything: what is written to it reaches the old one, if there is a path at all."""
    way = e.reverse_path
    if Origin.NEW not in e.observations.stores or way is None or way.watched_from is None:
        return []
    if way.lacking is not None:
        return [f"what is written to the new store does not come back to the old one: {way.lacking}"]
    reasons = [] if way.slot == "active" else ["the new store's stream is not captured: start `changeover capture`"]
    behind = way.behind_bytes or 0
    return reasons + ([f"the old store is {behind:,} bytes of WAL behind the new one: let `changeover replay` go on"]
                      if behind > LAG_BYTES else [])  # fmt: skip


def _nothing_rogue(e: Evidence) -> list[str]:
    """Nobody has written to the store without authority, or both stores were found equal since."""
    return [str(finding) for finding in e.rogue]


def _application_may_write(e: Evidence) -> list[str]:
    """Before the new store takes over: the application's roles can use it, and what is mirrored back."""
    return e.rights.reasons


RULES: tuple[Callable[[Evidence], list[str]], ...] = (
    _nothing_stopped, _loads_closed, _verdict_fresh, _processes_present, _lag_small, _streams_run, _mirror_agreed,
    _replay_past_dualwrite, _comparisons_clean, _mirror_whole, _way_back, _reverse_open, _nothing_rogue, _application_may_write,
)  # fmt: skip


def objections(evidence: Evidence, *, reads: bool = False) -> list[str]:
    """Return every reason against the step; none means go.

    Args:
        evidence: The evidence for the step.
        reads: Whether reads alone go, which can be taken back without a way back.

    Returns:
        The reasons, each a sentence.
    """
    if next_stage(evidence.before, evidence.stages) is not evidence.after:
        return [f"{evidence.before.value} to {evidence.after.value} is not one step up"]
    return [reason for rule in RULES if not (reads and rule is _way_back) for reason in rule(evidence)]


def require(evidence: Evidence) -> None:
    """Raise NotReady with every reason against the step.

    Args:
        evidence: The evidence for the step.

    Raises:
        NotReady: There is a reason against the step; every one is named.
    """
    reasons = objections(evidence)
    if reasons:
        raise NotReady(evidence.after.value, tuple(reasons))
