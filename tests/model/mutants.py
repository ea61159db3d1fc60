"""Mutants: one for each rule of the design, taken away or replaced, with the world in which that shows.

A mutant is the product's rules with one of them changed. The explorer must find at least one wrong state in its world; being
breadth first, what it prints is a shortest schedule. The names are those of the design's own list, in its order; after them
come the rules that the model itself led to.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple

from changeover.jobs.apply import floors
from changeover.jobs.ledger import epochs
from changeover.jobs.ledger.epochs import FOR_EVER, NEW, OLD, Interval, Section
from changeover.jobs.ledger.records import Authority
from changeover.position import Version, epoch_floor
from changeover.stores.base.statements import BARRIER, CLOSE, COLLECT, HAND_OVER, TRUNCATE, Move, Part, Procedure
from changeover.tenants import EVERY
from tests.model import carried, gate
from tests.model.carried import Held
from tests.model.environment import cast_to
from tests.model.gate import UNSENT, Image, Key, KeyChange
from tests.model.rules import RULES, Rules


class Mutant(NamedTuple):
    """A changed rule, and the worlds in each of which it must go wrong."""

    rules: Rules
    worlds: tuple[str, ...]


def _mutant(*worlds: str, **changed: Any) -> Mutant:
    return Mutant(replace(RULES, **changed), worlds)


BELOW_ALL = Version(-1, 0, 0)


def _no_barrier(procedure: Procedure) -> Procedure:
    return tuple(transaction for transaction in procedure if transaction != BARRIER)


def _no_floor(procedure: Procedure) -> Procedure:
    return tuple(transaction for transaction in procedure if transaction != ((Part.RAISE_FLOOR,),))


def _new_key_only(version: Version, key: Key, image: Image | None, old_key: Key | None = None) -> tuple[KeyChange, ...]:
    return gate.apart(version, key, image)


def _one_ordinal(version: Version, key: Key, image: Image | None, old_key: Key | None = None) -> tuple[KeyChange, ...]:
    return tuple(change._replace(version=version) for change in gate.apart(version, key, image, old_key))


def _unsent_is_null(found: Iterable[KeyChange], *_: object) -> list[KeyChange]:
    """Take what was not sent for NULL."""
    nulls = (change._replace(image=change.image and gate.filled(change.image, (None, None))) for change in found)
    return gate.last_of_each_key(nulls)


def _whole_row(found: Iterable[KeyChange], held: Mapping[Key, Held], exact: bool, read: Mapping[Key, Image]) -> list[KeyChange]:
    """Read the whole row where a value is missing, in a snapshot that need not show the change."""
    whole = [
        change if change.image is None or UNSENT not in change.image else change._replace(image=read.get(change.key))
        for change in found
    ]
    return carried.batch(whole, held, exact, read)


def _last_event(found: Iterable[KeyChange], held: Mapping[Key, Held], exact: bool, read: Mapping[Key, Image]) -> list[KeyChange]:
    """Keep the last event of each key and complete it from the cell: what the events before it said is lost."""
    last = gate.last_of_each_key(found)
    return [carried.completed(change, carried.origin_of(change), held, exact, read.get(change.key)) for change in last]


def _any_old_key(found: Iterable[KeyChange], held: Mapping[Key, Held], exact: bool, read: Mapping[Key, Image]) -> list[KeyChange]:
    """Trust any row that stands under the old key, however young."""
    return carried.batch(found, held, True, read)


def _between_bounds(bounds: Iterable[tuple[str, ...]]) -> list[tuple[tuple[str, ...] | None, tuple[str, ...] | None]]:
    edges = [("b",), *bounds, ("y",)]
    return list(pairwise(edges))


def _restamped(epoch: Callable[[Sequence[Authority], Section], int]) -> Callable[..., list[Section]]:
    """Return the product's sections with another epoch in each."""

    def sections(log: Sequence[Authority], **asked: Any) -> list[Section]:
        found = epochs.sections(log, **asked)
        return [tuple(replace(one, epoch=epoch(log, section)) for one in section) for section in found]

    return sections


def _everything(log: Sequence[Authority], *, takes_over: bool, carried: Collection[int]) -> list[Section]:
    latest = max((change.epoch for change in log), default=0)
    return [(Interval(latest, 0, FOR_EVER, store, echo=True),) for store in (OLD, NEW)]


def _of_nobody(log: Sequence[Authority], **asked: Any) -> list[Section]:
    """Offer all of a section to whom a part of it is offered."""
    return [(replace(section[0], tenants=EVERY),) for section in epochs.sections(log, **asked)]


POSITION_FIRST = (Move.POSITION, Move.FREEZE, *HAND_OVER[2:])
FLOOR_FIRST = (*HAND_OVER[:4], Move.RAISE_FLOOR, Move.RECORD)
ALL_AT_ONCE = ((Part.LOCK_SHARED,), (Part.TOUCH, Part.DELETE, Part.UPSERT))
LOCK_INSIDE = ((Part.LOCK_SHARED, Part.TOUCH), (Part.DELETE,), (Part.UPSERT,))
LOAD_LOCK_INSIDE = ((Part.LOCK_SHARED, Part.INSERT), (Part.MARK,))
ONE_DELETE = (*TRUNCATE[:2], ((Part.LOCK_SHARED,), (Part.LIST, Part.DELETE)))

DESIGN: dict[str, Mutant] = {
    "no tombstone": _mutant("offers: ghost", "offers: updates", tombstones=False),
    "no gate": _mutant("offers: ghost", "offers: updates", merged=lambda cell, offers, floor: [*offers][-1]),
    "no floor": _mutant("offers: late below L0", merged=lambda cell, offers, floor: gate.merged(cell, offers, BELOW_ALL)),
    "stamp = current LSN": _mutant("offers: ghost", "offers: updates", stamp=lambda l0, now: Version(0, now, -1)),
    "gate in one statement": _mutant("statements: ghost", gate=ALL_AT_ONCE),
    "lock inside the statement": _mutant("statements: collection", "statements: truncate", gate=LOCK_INSIDE),
    "no sweep": _mutant("statements: ghost", "statements: batches", close=(BARRIER,)),
    "sweep without barrier": _mutant("statements: ghost", "statements: batches", close=_no_barrier(CLOSE)),
    "floor without barrier": _mutant("statements: collection", collect=_no_barrier(COLLECT)),
    "TRUNCATE without barrier": _mutant("statements: truncate", truncate=_no_barrier(TRUNCATE)),
    "TRUNCATE by one DELETE": _mutant("statements: truncate behind a newer row", truncate=ONE_DELETE),
    "ledger before data": _mutant("lake: lake", append_load=RULES.append_load[::-1]),
    "acknowledge before durable": _mutant("offers: capture", acknowledged=lambda durable, received: received),
    "collection by time": _mutant(
        "offers: collection", collectable=lambda closed, applied, upto: True, collection_floor=False
    ),
    "collection without floor": _mutant("offers: collection", collection_floor=False),
    "collection before close": _mutant(
        "offers: collection asked for early", collectable=lambda closed, applied, upto: floors.collectable(True, applied, upto)
    ),
    "no fencing token": _mutant("statements: zombie", markable=lambda chunk, token: True),
    "key change as update of the new key only": _mutant("offers: key changes", apart=_new_key_only),
    "delete and put with one ordinal": _mutant("offers: orders, one target key", apart=_one_ordinal),
    "TRUNCATE ignored": _mutant("offers: TRUNCATE", truncates=False),
    "fence read before freeze": _mutant(
        "statements: fence of a tenant", "statements: fence of all rows", "authority: there", hand_over=POSITION_FIRST
    ),
    "plain read in the fence trigger": _mutant("statements: fence of a tenant", authority_read="plain"),
    "values beyond min/max dropped": _mutant("offers: beyond the sampled bounds", ranges=_between_bounds),
    "TOAST as NULL": _mutant("offers: unsent", batch=_unsent_is_null),
    "whole-row point read": _mutant("offers: unsent", batch=_whole_row, visible=lambda xid, snapshot: True),
    "partial images out of order": _mutant("offers: orders of unsent values", batch=carried.batch),
    "batch collapse that keeps the last event only": _mutant("offers: unsent", batch=_last_event),
    "append after replay": _mutant("lake: lake", lake_merges_while_loading=True),
    "shared appId": _mutant("lake: lake", application=lambda chunk, token: ("migration/table", chunk + 1)),
    "per-attempt appId": _mutant("lake: lake", application=lambda chunk, token: (f"migration/table/{chunk}", token)),
    "dual write before commit": _mutant("offers: rolled back", waits_for_commit=False),
    "epoch ignored": _mutant(
        "authority: there", "authority: there and back", sections=_restamped(lambda log, section: 0),
        epoch_floor=lambda epoch: epoch_floor(0),
    ),
    "BEFORE trigger": _mutant("statements: trigger log", trigger_timing="BEFORE"),
    "rewritten table read as empty": _mutant(
        "offers: rewritten", closable=lambda chunks, prepared, file, truncated: all(chunk.loaded for chunk in chunks)
    ),
}  # fmt: skip
"""The design's list."""

FOUND: dict[str, Mutant] = {
    "loader: lock inside the statement": _mutant("statements: truncate", load=LOAD_LOCK_INSIDE),
    "collection without floor, among statements": _mutant("statements: collection", collect=_no_floor(COLLECT)),
    "collection before the position": _mutant("offers: collection", collectable=lambda closed, applied, upto: closed),
    "TRUNCATE without floor": _mutant("statements: truncate", truncate=_no_floor(TRUNCATE)),
    "TRUNCATE raises the floor to its own version": _mutant(
        "offers: TRUNCATE", "statements: truncate", truncated_floor=lambda at: at
    ),
    "image whatever is there": _mutant("offers: ghost", image_applies=lambda cell, floor, image: True),
    "one id per attempt": _mutant("lake: lake", application=lambda chunk, token: (f"migration/table/{chunk}/{token}", 1)),
    "unsent values from a snapshot that may be older": _mutant(
        "offers: unsent", "offers: unsent, moved", "offers: unsent, onto a freed key", visible=lambda xid, snapshot: True
    ),
    "unsent values from whatever has the old key": _mutant(
        "offers: unsent, moved, fuzzy", batch=_any_old_key
    ),
    "unsent values from before a key change": _mutant(
        "offers: unsent, moved", "offers: unsent, onto a freed key", batch=carried.batch, visible=lambda xid, snapshot: True
    ),
    "a new snapshot that shows less": _mutant(
        "offers: fuzzy, beside a row that nobody writes", contains=lambda later, earlier: True
    ),
    "changes from before a TRUNCATE offered after it": _mutant(
        "lake: lake, truncated", after_truncate=lambda found, at: [*found]
    ),
    "floor raised before the hand-over is on record": _mutant(
        "authority: called off", "authority: called off there or back", hand_over=FLOOR_FIRST
    ),
    "hand-over that waits for nothing": _mutant(
        "authority: there", hand_over=tuple(move for move in HAND_OVER if move is not Move.AWAIT)
    ),
    "the lake is told nothing of the time at the new store": _mutant(
        "authority: there and back by direct writes",
        sections=lambda log, *, takes_over, carried: epochs.sections(log, takes_over=True, carried=carried),
    ),
    "the old store's log without a break": _mutant(
        "authority: there and back by direct writes",
        sections=lambda log, *, takes_over, carried: [(Interval(0, 0, FOR_EVER),)],
    ),
    "echo offered": _mutant("authority: there", sections=_everything),
    "tenants ignored in the offering": _mutant("authority: one tenant there and back", sections=_of_nobody),
    "a floor for all tenants at once": _mutant(
        "authority: one tenant of two", "authority: a second tenant while the first is away",
        floors=lambda log: [(log[-1].epoch, EVERY)],
    ),
    "the epoch of another tenant": _mutant(
        "authority: one tenant there and back", sections=_restamped(lambda log, section: min(one.epoch for one in section))
    ),
    "position as the gate, table open": _mutant("statements: catch-up while loading", catches_up_while_loading=True),
    "apply rate below the write rate": _mutant("rates: catching up", spare_rate=-1),
}  # fmt: skip
"""What the model showed beyond it."""

COMPARED_FIRST = (Move.COMPARE, *(move for move in HAND_OVER if move is not Move.COMPARE))
NOT_COMPARED = tuple(move for move in HAND_OVER if move is not Move.COMPARE)

SURROUNDED: dict[str, Mutant] = {
    "definition compared by value": _mutant(
        "environment: definition", definition_changed=lambda recorded, now: now is None or recorded.says != now.says
    ),
    "definition compared before the freeze": _mutant("environment: definition", hand_over=COMPARED_FIRST),
    "definition compared by capture alone": _mutant("environment: definition", hand_over=NOT_COMPARED),
    "reads that leave rows out": _mutant("environment: filter", "environment: all", filtered_read="without the rows"),
    "verify shares the load's cast": _mutant(
        "environment: type", compared=lambda typed, found, there: cast_to(typed, found) == there
    ),
    "a range that was not read is equal": _mutant("environment: all", covered=lambda read: True),
    "a statement that a timeout ended is done": _mutant("environment: timeouts", ended_statement="done"),
}  # fmt: skip
"""What the environment must not be able to do."""

MUTANTS = DESIGN | FOUND | SURROUNDED
