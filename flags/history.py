"""History: the switches of the flag on record, from which stage to which, when, and at which position the mirror began.

Every switch by `flags advance` and `flags rollback`, and every switch made elsewhere that `flags watch`
saw, is a row of the ledger's audit. What is asked of a stage is asked of the time since its switch.
These rows say whether there is reverse replication; the flag does not, because anybody may switch
it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from ldclient.migrations.types import Stage

from changeover.flags.stages import TABLE
from changeover.jobs.ledger.ledger import Ledger
from changeover.position import format_lsn, parse_lsn

STEP, TENANTS, READS = "flags", "tenants", "reads"
"""Under which step a switch for everybody is on record, under which one for some tenants, and under which one reads alone."""

ADVANCED, ROLLED_BACK, FOLLOWED = "advanced", "rolled back", "followed"
SWITCHED = frozenset({ADVANCED, ROLLED_BACK, FOLLOWED})
"""Outcomes that say that the flag was switched; the others say that it was not."""


@dataclass(frozen=True)
class Switch:
    """One switch; `mirror_lsn` is the old store's position once every process mirrored, where the switch began that."""

    at: datetime
    before: Stage
    after: Stage
    mirror_lsn: int | None


def switches(ledger: Ledger) -> list[Switch]:
    """Return the switches on record, newest first.

    Args:
        ledger: The migration's ledger.

    Returns:
        The switches, positions as LSNs in bytes.
    """
    entries = [(at, detail) for at, _, outcome, detail in ledger.audits(STEP) if outcome in SWITCHED and "from" in detail]
    return [Switch(at, Stage(d["from"]), Stage(d["to"]), parse_lsn(d["mirror_lsn"]) if d.get("mirror_lsn") else None)
            for at, d in entries]  # fmt: skip


def stage(ledger: Ledger) -> Stage | None:
    """Return the stage that is on record.

    Args:
        ledger: The migration's ledger.

    Returns:
        Where the last switch led, None before the first.
    """
    recorded = ledger.stage()
    return Stage.from_str(recorded) if recorded is not None else None


def record(ledger: Ledger, outcome: str, before: Stage, after: Stage, mirror_lsn: int | None, more: Mapping[str, Any]) -> None:
    """Put a switch on record.

    Args:
        ledger: The migration's ledger.
        outcome: How the switch ended, as the record says it.
        before: The stage before.
        after: The stage after.
        mirror_lsn: The old store's LSN, in bytes, once every process mirrored; None where the
            switch did not begin that.
        more: What else goes on record, as JSON takes it.
    """
    entry = {"from": before.value, "to": after.value, **more}
    with ledger.connection.transaction():
        ledger.audit(STEP, outcome, entry if mirror_lsn is None else {**entry, "mirror_lsn": format_lsn(mirror_lsn)})
        ledger.record_flag(after.value, 0)


def record_tenants(ledger: Ledger, outcome: str, before: Stage, after: Stage, more: Mapping[str, Any]) -> None:
    """Put a switch for some tenants on record, which is none of the flag's stage: everybody else stays where they are.

    Args:
        ledger: The migration's ledger.
        outcome: How the switch ended, as the record says it.
        before: The stage before.
        after: The stage after.
        more: What else goes on record, as JSON takes it.
    """
    ledger.audit(TENANTS, outcome, {"from": before.value, "to": after.value, **more})


def record_reads(ledger: Ledger, outcome: str, percent: int, more: Mapping[str, Any]) -> None:
    """Put on record which contexts' reads may move before the writes: from then on routers act on it, until the next switch.

    Args:
        ledger: The migration's ledger.
        outcome: How it ended, as the record says it.
        percent: The percentage of contexts; 0 ends it.
        more: What else goes on record, as JSON takes it.
    """
    with ledger.connection.transaction():
        ledger.audit(READS, outcome, {**more, "percent": percent})
        ledger.record_flag(None, percent)


def mirrored_since(switches: Sequence[Switch], prepared: datetime | None = None, l0: int = 0) -> int | None:
    """Return where the mirror began that runs now, None where that is not on record; `switches` is newest first (pure).

    A mirror that ran already when the tables were prepared, as it may when they are begun anew, runs since `l0` of their
    stream.
    """
    began = None
    for switch in switches:
        if not TABLE[switch.after].mirrors:
            break
        began = switch
    if began is not None and prepared is not None and began.at < prepared:
        return l0
    return began.mirror_lsn if began is not None else None


def completed(switches: Sequence[Switch]) -> bool:
    """Return whether the last stage was ever reached: the old store lacks writes since, wherever the flag points now (pure).

    Args:
        switches: The switches on record.

    Returns:
        True once complete was reached.
    """
    return any(switch.after is Stage.COMPLETE for switch in switches)
