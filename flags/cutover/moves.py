"""Tenants moved by name: from shadow to live and back, by the same readiness and fence as all rows, while the others stay.

rampdown and complete are of all rows, so they wait until no tenant is at the old store. A name is
brought to the form in which PostgreSQL prints it. One that the column's type can't hold is refused.
One that no row has yet may move, and the answer says so.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from ldclient.migrations.types import Origin, Stage

from changeover.errors import Refused, SpecError, UsageError
from changeover.flags import history, readiness
from changeover.flags.cutover import switch
from changeover.flags.cutover.discovery import spelled, unknown
from changeover.flags.cutover.switch import Advanced, everybody, require_open, require_reverse
from changeover.flags.fence.fence import MOST_TENANTS, Fenced, fence
from changeover.flags.observed import Observations, observations
from changeover.flags.stages import TABLE
from changeover.jobs.ledger.ledger import Ledger
from changeover.spec import Spec
from changeover.tenants import NAMED, Tenant, as_text


@dataclass(frozen=True)
class Apart:
    """Tenants at another store than all the others: how many, the first few by name, and their epochs there."""

    store: str
    count: int
    first: tuple[str, ...]
    epochs: tuple[int, ...]


def apart(known: Observations) -> Apart | None:
    """Return the tenants that stand apart, None where there are none (pure)."""
    others = known.apart
    if not others:
        return None
    store = next(iter(others.values())).store.value
    return Apart(store, len(others), tuple(sorted(others)[:NAMED]), tuple(sorted({o.epoch for o in others.values()})))


def some(names: Sequence[str], count: int | None = None) -> str:
    """Return the first of some tenants and how many they are, as a part of a sentence (pure).

    Args:
        names: The tenants, in any order.
        count: How many they are in all; None where `names` has each of them.

    Returns:
        The count, and the first names in brackets.
    """
    whole = len(names) if count is None else count
    first = ", ".join(sorted(names)[:NAMED])
    return f"{whole:,} tenant{'s' * (whole != 1)} ({first}{', …' * (whole > NAMED)})"


def together(known: Observations, after: Stage) -> str | None:
    """Return why a stage of all rows has to wait, None where it has not (pure)."""
    if known.rest.store is Origin.OLD or TABLE[after].writes is Origin.OLD or Origin.OLD not in known.stores:
        return None
    left = some(list(known.apart))
    return f"{after.value} is of all rows, and {left} are at the old store: `changeover flags advance --tenant` comes first"


def advance(spec: Spec, ledger: Ledger, names: Collection[Tenant], override: str | None) -> Advanced:
    """Take tenants from shadow to live, if the evidence says that it is ready as for all rows; the caller has the flag's lease."""
    chosen = named(spec, names)
    known = observations(ledger.authorities())
    everybodys = _between(spec, ledger, known)
    going = [name for name in chosen if known.of(name).store is Origin.OLD]
    if not going:
        raise Refused(f"flags advance: {some(chosen)} live already: rampdown and complete are of all rows, without --tenant")
    evidence = readiness.collect(spec, ledger, Stage.SHADOW, Stage.LIVE, everybodys)
    entry = require_open(ledger, evidence, override, {"tenants": chosen[:NAMED], "count": len(chosen)})
    missing = unknown(spec, chosen)
    fenced = switch.move_authority(spec, ledger, Stage.LIVE, chosen)
    history.record_tenants(ledger, history.ADVANCED, Stage.SHADOW, Stage.LIVE, {**entry, "epoch": fenced.epoch})
    return Advanced(
        Stage.SHADOW, Stage.LIVE, fenced.epoch, fenced.pause_seconds, tenants=tuple(going), unknown=missing,
        notes=tuple(evidence.rights.notes),
    )  # fmt: skip


def rollback(spec: Spec, ledger: Ledger, names: Collection[Tenant]) -> Advanced:
    """Take tenants from live back to shadow; asks for no evidence. The caller has the flag's lease."""
    chosen = named(spec, names)
    require_reverse(ledger, Stage.LIVE)
    known = observations(ledger.authorities())
    if known.rest.store is Origin.NEW:
        _between(spec, ledger, known)  # below live nothing keeps a tenant from going back
    going = [name for name in chosen if known.of(name).store is Origin.NEW]
    if not going:
        raise Refused(f"flags rollback: {some(chosen)} at the old store already: below shadow all rows go together")
    epochs = known.epochs(Origin.NEW, going)
    missing = unknown(spec, chosen)
    fenced = switch.move_authority(spec, ledger, Stage.SHADOW, chosen)
    lost = switch.lost(spec, ledger, epochs, fenced)
    entry = {"tenants": chosen[:NAMED], "count": len(chosen), "epoch": fenced.epoch, "lost": lost, "lacking": fenced.lacking}
    history.record_tenants(ledger, history.ROLLED_BACK, Stage.LIVE, Stage.SHADOW, entry)
    return Advanced(Stage.LIVE, Stage.SHADOW, fenced.epoch, fenced.pause_seconds, lost, fenced.lacking, tuple(going), missing)


def follow(spec: Spec, ledger: Ledger, names: Sequence[str], to: Origin) -> str:
    """Move tenants whose flag was switched elsewhere; return the sentence. Raises NotReady and FenceCalledOff."""
    known = observations(ledger.authorities())
    before, after = (Stage.SHADOW, Stage.LIVE) if to is Origin.NEW else (Stage.LIVE, Stage.SHADOW)
    if to is Origin.NEW:
        everybodys = _between(spec, ledger, known)
        readiness.require(readiness.collect(spec, ledger, before, after, everybodys))
    else:
        require_reverse(ledger, before)
    fenced = fence(spec, to, tenants=names)
    lost = switch.lost(spec, ledger, known.epochs(Origin.NEW, names), fenced) if to is Origin.OLD else 0
    outcome = {"epoch": fenced.epoch, "pause": fenced.pause_seconds, "lost": lost}
    entry = {"tenants": list(names[:NAMED]), "count": len(names), **outcome}
    history.record_tenants(ledger, history.FOLLOWED, before, after, entry)
    return sentence(f"the flag was switched to {after.value} for {some(names)}", fenced, lost)


def sentence(switched: str, fenced: Fenced, lost: int | None) -> str:
    """Return what `flags watch` says of a switch that it followed over the fence (pure)."""
    what = "every write since authority had moved" if lost is None else f"{lost} writes"
    left = "" if lost == 0 else f"; lost: {what} that never reached the old store"
    return (
        f"{switched}: the {fenced.store} store has authority (epoch {fenced.epoch}),"
        f" writers were held up {fenced.pause_seconds:.2f} s at most{left}"
    )


def named(spec: Spec, names: Collection[Tenant]) -> list[str]:
    """Return tenants as PostgreSQL prints them, each once; raises what is wrong with them."""
    if spec.flag is None or spec.flag.context is None:
        raise SpecError(spec.path, "flag.context", "is missing: name the column that holds a row's tenant, or move all at once")
    if isinstance(names, str):
        raise UsageError(f"the tenants are one text, {names!r}: give a list of them")
    texts = [as_text(name) for name in names]
    if not texts or not all(texts):
        raise UsageError("a tenant's name is empty: name one, or leave --tenant out and all rows move")
    if len(names) > MOST_TENANTS:
        raise UsageError(f"{len(names):,} tenants are more than {MOST_TENANTS:,} at once: name fewer, or move all rows")
    return spelled(spec, [text for text in texts if text is not None])


def _between(spec: Spec, ledger: Ledger, known: Observations) -> Stage:
    """Return everybody's stage; raises Refused where no tenant may move by name."""
    stage = everybody(spec, ledger, known)
    if stage not in (Stage.SHADOW, Stage.LIVE):
        raise Refused(f"tenants move by name between shadow and live, and everybody is at {stage.value}: all rows go there first")
    return stage
