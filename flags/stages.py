"""The stages of a migration: LaunchDarkly's six, in one table that says what each means for a read and for a write.

The keys are the SDK's own `Stage`, the stores its own `Origin`; there is no second vocabulary and no other place in which a
stage is asked for by name. The flag holds the desired stage, the ledger the observed authority: `effective` lets a desired
stage act only as far as the store that it needs has authority, and as the record goes. Everything here is pure and runs in the
application and in the command line.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from ldclient.migrations.types import Origin, Stage

from changeover.stores.postgres.gate import FENCED

__all__ = ["FENCED", "ORDER", "TABLE", "StageRule", "effective", "needs_fence", "next_stage", "other", "previous_stage"]


@dataclass(frozen=True)
class StageRule:
    """What a stage means: whose answer a read returns, where a write goes first, and what happens beside it.

    `compares` says that a read asks the other store too, off the caller's thread. `mirrors` says
    that both stores get every write: the other one by the stream, and by routers that mirror. `fence_before` says that the step
    up to this stage waits for a fence in the ledger, `fence_back` that the step down from it does.
    `reversible` says that there is a step down at all.
    """

    reads: Origin
    writes: Origin
    compares: bool
    mirrors: bool
    fence_before: bool
    fence_back: bool
    reversible: bool


TABLE: Mapping[Stage, StageRule] = MappingProxyType({
    # First stage, nothing below it: the new store is filled by backfill and replay alone.
    Stage.OFF: StageRule(
        Origin.OLD, Origin.OLD, compares=False, mirrors=False, fence_before=False, fence_back=False, reversible=False
    ),
    # off -> dualwrite: the tables are closed and replay keeps up; from here on both stores get every write.
    # dualwrite -> off: the other one is not asked to keep up any more; nothing is lost.
    Stage.DUALWRITE: StageRule(
        Origin.OLD, Origin.OLD, compares=False, mirrors=True, fence_before=False, fence_back=False, reversible=True
    ),
    # dualwrite -> shadow: a verdict "equal" is on record; reads now prove it under the application's own load.
    # shadow -> dualwrite: the comparisons mismatch, or cost too much; answers came from the old store all the time.
    Stage.SHADOW: StageRule(
        Origin.OLD, Origin.OLD, compares=True, mirrors=True, fence_before=False, fence_back=False, reversible=True
    ),
    # shadow -> live: authority moves to the new store. The old store refuses writes first, so a fence.
    # live -> shadow: rollback, authority moves back. The new store refuses writes first, so a fence as well.
    Stage.LIVE: StageRule(
        Origin.NEW, Origin.NEW, compares=True, mirrors=True, fence_before=True, fence_back=True, reversible=True
    ),
    # live -> rampdown: enough comparisons under new authority; the old store is still kept up to date.
    # rampdown -> live: a doubt about the new store's answers; comparing starts again.
    Stage.RAMPDOWN: StageRule(
        Origin.NEW, Origin.NEW, compares=False, mirrors=True, fence_before=False, fence_back=False, reversible=True
    ),
    # rampdown -> complete: the old store stops receiving. The point of no return, so a fence.
    # There is no step down from complete: the old store lacks every write since.
    Stage.COMPLETE: StageRule(
        Origin.NEW, Origin.NEW, compares=False, mirrors=False, fence_before=True, fence_back=False, reversible=False
    ),
})  # fmt: skip

ORDER: tuple[Stage, ...] = tuple(TABLE)
"""The stages, lowest first; also a flag's order of variations: a context of another kind gets the first one."""


def next_stage(stage: Stage, stages: Collection[Stage] = ORDER) -> Stage | None:
    """Return the stage above, None after complete.

    Args:
        stage: A stage.
        stages: Those that the flag has: LaunchDarkly's migration flags have six, four, three or two.

    Returns:
        The stage above, or None.
    """
    return next((above for above in ORDER[ORDER.index(stage) + 1 :] if above in stages), None)


def previous_stage(stage: Stage, stages: Collection[Stage] = ORDER) -> Stage | None:
    """Return the stage that a rollback leads to; None at off, and at complete, which is final.

    Args:
        stage: A stage.
        stages: Those that the flag has.

    Returns:
        The stage below, or None.
    """
    below = reversed(ORDER[: ORDER.index(stage)]) if TABLE[stage].reversible else ()
    return next((one for one in below if one in stages), None)


def needs_fence(start: Stage, end: Stage) -> bool:
    """Return whether a move between two stages, in either direction and over any number of steps, passes a fence."""
    low, high = ORDER.index(start), ORDER.index(end)
    if low <= high:
        return any(TABLE[stage].fence_before for stage in ORDER[low + 1 : high + 1])
    return any(TABLE[stage].fence_back for stage in ORDER[high + 1 : low + 1])


def other(origin: Origin) -> Origin:
    """Return the other store.

    Args:
        origin: A store.

    Returns:
        The old one for the new, the new one for the old.
    """
    return Origin.NEW if origin is Origin.OLD else Origin.OLD


def effective(desired: Stage, authority: Origin, recorded: Stage | None) -> Stage:
    """Return the stage at which a process acts: the desired one, or the stage nearest to it whose writes go to `authority`.

    Behind the fence nobody acts beyond what is on record. A flag that anybody may switch would end
    comparisons and the upkeep of the old store in all processes at once, with no evidence.

    Args:
        desired: The stage that the flag asks for.
        authority: The store that has authority.
        recorded: The stage that is on record, None where none is.

    Returns:
        The stage at which it acts.
    """
    highest = max(ORDER.index(Stage.LIVE), ORDER.index(recorded) if recorded is not None else 0)
    return ORDER[min(ORDER.index(_EFFECTIVE[desired, authority]), highest)]


def _nearest(desired: Stage, authority: Origin) -> Stage:
    fitting = [stage for stage in ORDER if TABLE[stage].writes is authority]
    return min(fitting, key=lambda stage: abs(ORDER.index(stage) - ORDER.index(desired)))


_EFFECTIVE = {(desired, authority): _nearest(desired, authority) for desired in ORDER for authority in Origin}
