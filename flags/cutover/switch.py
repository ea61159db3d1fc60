"""The switch: the flag's file is switched and authority moves with it, of all rows or of some tenants, or neither happens.

The flag is switched first, so that every router already knows where to go. It is put back as it was
when the fence is called off. Where a step breaks off, the ledger says whether authority had moved
before.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldclient.migrations.types import Origin, Stage

from changeover.errors import NotReady, Refused
from changeover.flags import flagfile, history, readiness
from changeover.flags.fence.fence import Fenced, fence, settle
from changeover.flags.observed import Observations, observations
from changeover.flags.stages import TABLE, effective
from changeover.jobs.ledger.ledger import Ledger
from changeover.jobs.reverse import path as reverse
from changeover.jobs.transform.tenancy import flag_of, old_column, required
from changeover.spec import Flag, Spec


@dataclass(frozen=True)
class Advanced:
    """A step that was done, up or down, of all rows or of the tenants that are named.

    `pause_seconds` is how long the fence held writers up, None without a fence. `lost` is how many
    writes of rows a step down left behind in the new store, as far as routers that mirror know:
    they never reached the old one. None is every write since authority had moved. `lacking` is why
    the old store did not get everything, None where it did. `unknown` are the named tenants of which neither store has a row.
    `notes` say how it was found out whether the application may write to the store that took over. `reads` is the percentage of
    contexts that read from the new store before writes go there, where the step was theirs alone.
    """

    before: Stage
    after: Stage
    epoch: int
    pause_seconds: float | None
    lost: int | None = 0
    lacking: str | None = None
    tenants: tuple[str, ...] | None = None
    unknown: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    reads: int | None = None


def flag_and_file(spec: Spec) -> tuple[Flag, Path]:
    """Return the spec's flag and its data file.

    Args:
        spec: The spec.

    Returns:
        The flag, and the file that it names, or `flags.json` in the work folder.

    Raises:
        SpecError: The spec has no `[flag]`.
    """
    flag = flag_of(spec)
    return flag, Path(flag.file) if flag.file else spec.work / "flags.json"


def desired_stage(spec: Spec) -> Stage:
    """Return the stage that the flag's data file asks for, of everybody."""
    flag, file = flag_and_file(spec)
    return flagfile.read_stage(file, flag.key)


def stages(spec: Spec) -> frozenset[Stage]:
    """Return the stages that the flag has."""
    flag, file = flag_and_file(spec)
    return flagfile.read_stages(file, flag.key)


def everybody(spec: Spec, ledger: Ledger, known: Observations) -> Stage:
    """Return the stage at which routers act, but for tenants that stand apart."""
    return effective(desired_stage(spec), known.rest.store, history.stage(ledger))


def switch_flag(spec: Spec, ledger: Ledger, before: Stage, after: Stage, tenants: Collection[str] | None = None) -> Fenced | None:
    """Switch the flag, and move authority where the stage asks for it; the flag goes back if that fails."""
    to = TABLE[after].writes
    if TABLE[before].writes is not to:
        return move_authority(spec, ledger, after, tenants)
    settle(spec)
    _write(spec, after, tenants, alone=to is Origin.OLD)
    return None


def move_authority(spec: Spec, ledger: Ledger, after: Stage, tenants: Collection[str] | None = None) -> Fenced:
    """Switch the flag to a stage whose writes go to the other store, and fence the one that loses them (driver).

    Args:
        spec: The spec.
        ledger: The open ledger; the caller has the flag's lease.
        after: The stage.
        tenants: The tenants that move, None for all rows.

    Returns:
        What the fence did.

    Raises:
        FenceCalledOff: The handover took too long; the flag is as it was before.
    """
    flag, file = flag_and_file(spec)
    to = TABLE[after].writes
    former = flagfile.read_flag(file, flag.key)
    try:
        _write(spec, after, tenants)
        return fence(spec, to, tenants=tenants)
    except BaseException:
        known = observations(ledger.authorities())
        has = {known.of(tenant).store for tenant in tenants} if tenants is not None else known.stores
        if has != {to}:
            flagfile.write_flag(file, flag.key, former)
        raise


def _write(spec: Spec, stage: Stage, tenants: Collection[str] | None, alone: bool = False) -> None:
    """Switch the flag of tenants, or of everybody; of all tenants too then, unless it is switched `alone`."""
    flag, file = flag_and_file(spec)
    if tenants is None:
        flagfile.write_stage(file, flag.key, stage, None if alone else flag.context)
    else:
        flagfile.write_tenants(file, flag.key, required(old_column(spec), spec), tenants, stage)


def require_open(
    ledger: Ledger, evidence: readiness.Evidence, override: str | None, details: Mapping[str, Any], *, reads: bool = False
) -> dict[str, Any]:
    """Return what goes on record of a step's evidence; raises NotReady, itself on record, unless there is an override."""
    reasons = readiness.objections(evidence, reads=reads)
    entry = {**details, "evidence": evidence.digest, "reasons": reasons, "rights": evidence.rights.notes, "override": override}
    if reasons and not override:
        ledger.audit(history.STEP, "refused", {"from": evidence.before.value, "to": evidence.after.value, **entry})
        raise NotReady(evidence.after.value, tuple(reasons))
    return entry


def require_reverse(ledger: Ledger, before: Stage) -> None:
    """Refuse once complete was reached, wherever the flag points by now: since then the old store got no write."""
    if before is Stage.COMPLETE or history.completed(history.switches(ledger)):
        raise Refused("flags rollback: complete was reached and is final: the old store lacks every write since")


def expected(spec: Spec, ledger: Ledger, epochs: Collection[int]) -> int | None:
    """Return how many writes a step down would lose of those made under some epochs of the new store; None is all of them."""
    if not epochs or reverse.whole(ledger) is None:
        return 0
    return _lost(spec, ledger, epochs)


def _lost(spec: Spec, ledger: Ledger, epochs: Collection[int]) -> int | None:
    """Return what mirrors never brought to the old store; None, which is everything, where a process had none."""
    beats = ledger.heartbeats()
    if not spec.mirrors or any(beat.counters.get("mirrors") is False for beat in beats):
        return None
    return readiness.lost(beats, epochs, ledger.now())


def lost(spec: Spec, ledger: Ledger, epochs: Collection[int], fenced: Fenced) -> int | None:
    """Return how many writes a fence back has lost: none where the reverse path brought them all; None is all of them."""
    if fenced.lacking is None:
        return 0
    return _lost(spec, ledger, epochs)
