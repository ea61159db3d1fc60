"""Health: what needs somebody's attention, from what `status` says, each reason one line; none means all is well.

A probe asks for it, so a step that has not come yet is no trouble, and a stream that nobody reads is.
Pure: it looks at no store by itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from changeover.jobs.ledger.epochs import OLD
from changeover.jobs.reverse.path import CAPTURED, COMPLETED

if TYPE_CHECKING:
    from changeover.jobs.status import Status

LAG_BYTES = 16 << 20
"""How many bytes of WAL capture and replay may be behind, unless it is said otherwise; readiness asks for the same."""


def problems(status: Status, behind: int = LAG_BYTES) -> list[str]:
    """Return what needs attention (pure).

    Args:
        status: How the migration stands.
        behind: How many bytes of WAL a stream may be behind.

    Returns:
        Reasons, one line each; none means that all is well.
    """
    if status.state("finalize") == "done":
        return []
    reasons = [*status.broken, *_stopped(status), *_verdicts(status), *(str(one) for one in status.rogue)]
    prepared = status.state("prepare")
    if prepared != "done":
        reasons.append(prepared)
    if status.store == OLD or status.tenants:
        reasons = [*_capture(status, behind), *_replay(status, behind), *reasons]
    return [*reasons, *_reverse_path(status, behind)]


def _capture(status: Status, behind: int) -> list[str]:
    state, stream = status.state("capture"), status.stream
    why = f" ({stream['waiting']})" if stream["waiting"] else ""
    reasons = [] if state == "running" and not why else [f"capture: {state}{why}"]
    reasons += [one for one in (stream["alarm"], *stream["notes"]) if one]
    if stream["spool_end"] is None:
        reasons.append("no spool is in the work folder")
    elif stream["behind_bytes"] > behind:
        reasons.append(f"capture is {stream['behind_bytes']:,} bytes behind the source, more than {behind:,}")
    return reasons


def _replay(status: Status, behind: int) -> list[str]:
    return [
        f"{load['source']} in {load['target']} is {load['behind_bytes']:,} bytes behind the source, more than {behind:,}"
        for load in status.loads
        if load["state"] == "closed" and load["behind_bytes"] is not None and load["behind_bytes"] > behind
    ]


def _reverse_path(status: Status, behind: int) -> list[str]:
    """While the new store has authority over anything: what is written there comes back, if there is a path at all."""
    way = status.reverse_path
    if way is None or (status.store == OLD and not status.tenants) or way.lacking == COMPLETED:
        return []
    if way.lacking is not None:
        return [f"what is written to the new store does not come back to the old one: {way.lacking}"]
    reasons = [] if way.slot == "active" else [f"the new store's stream is {CAPTURED[way.slot]}"]
    reasons += [way.alarm] if way.alarm else []
    if way.behind_bytes is not None and way.behind_bytes > behind:
        reasons.append(f"the old store is {way.behind_bytes:,} bytes behind the new one, more than {behind:,}")
    return reasons + [f"{one.source} in {one.target} stands still: {one.stopped}" for one in way.loads if one.stopped]


def _stopped(status: Status) -> list[str]:
    """A table that is stopped, once however many targets it has."""
    return [f"{source} is stopped: {why}" for source, why in {(one["source"], one["stopped"]): 1 for one in status.loads} if why]


def _verdicts(status: Status) -> list[str]:
    return [
        f"the last verdict on {one['source']} in {one['target']} is {one['verdict']} (run {one['run']})"
        for one in status.verdicts
        if one["verdict"] != "equal"
    ]
