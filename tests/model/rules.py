"""The product's rules, gathered so that a mutant can replace one; nothing here is a copy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from changeover.jobs.apply import batch as batching
from changeover.jobs.apply import floors
from changeover.jobs.guarantee import definition
from changeover.jobs.guarantee.definition import Piece
from changeover.jobs.ledger import chunks, epochs
from changeover.jobs.ledger.epochs import Section
from changeover.jobs.ledger.records import Authority
from changeover.jobs.load.copier import LedgerMark
from changeover.jobs.source import snapshot
from changeover.position import Version, epoch_floor, image_version
from changeover.stores.base import statements
from changeover.stores.base.ranges import ranges_between
from changeover.stores.base.reader import KeyRange
from changeover.stores.base.statements import Move, Procedure, Transaction
from changeover.stores.delta.appends import APPEND_VERSION, appended
from changeover.stores.delta.store import DeltaStore
from changeover.tenants import Tenants
from changeover.verifiers.compare.planned import changed_types
from tests.model import gate
from tests.model.carried import Held
from tests.model.gate import Cell, Chunk, Image, Key, KeyChange


def _application(chunk: int, token: int) -> tuple[str, int]:
    """Return the application id and version under which an attempt appends a chunk to Delta."""
    return LedgerMark("", "migration", "source", "target", token, image_version(15)).identity(chunk), APPEND_VERSION


def _batch(changes: Iterable[KeyChange], held: Mapping[Key, Held], exact: bool, read: Mapping[Key, Image]) -> list[KeyChange]:
    """Return what a batch offers, as replay makes it; what the target holds is not asked."""
    return gate.last_of_each_key(gate.completed(changes, read))


def _floors(changes: Sequence[Authority]) -> list[tuple[int, Tenants]]:
    """Return the epoch below which a store takes nothing any more, by tenants, as `flags.fence.endpoints` puts it."""
    return [(held.epoch, whose) for held, whose in epochs.shares(changes).items()]


def _definition_changed(recorded: Piece, now: Piece | None) -> bool:
    """Return whether the stream's definition is another, as the product compares the table's row in the publication."""
    return bool(definition.compared([recorded], [] if now is None else [now]))


PLANNED_TYPE = "numeric(12,4)"
"""The type of the target's column that prepare recorded, in the worlds of the environment."""


def _compared(target_type: str, source: str | None, target: str | None) -> bool:
    """Return whether a verdict takes values as equal: what the source holds, before any cast, in a column of the planned type."""
    return source == target and not changed_types("target", {"v": PLANNED_TYPE}, [{"v": target_type}])


@dataclass(frozen=True)
class Rules:
    """Every rule that the model runs, by default the product's own."""

    applies: Callable[[Version, Version | None, Version], bool] = gate.applies
    image_applies: Callable[[Version | None, Version, Version], bool] = gate.image_applies
    merged: Callable[[Cell | None, Iterable[Cell], Version], Cell | None] = gate.merged
    truncated_floor: Callable[[Version], Version] = gate.truncated_floor
    collectable: Callable[[bool, int, Version], bool] = floors.collectable
    collected: Callable[[Version, Version], bool] = gate.collected
    caught_up_floor: Callable[[int, int], Version] = floors.caught_up_floor
    claimed: Callable[[Sequence[Chunk]], tuple[int, tuple[Chunk, ...]]] = gate.claimed
    markable: Callable[[Chunk, int], bool] = gate.markable
    closable: Callable[[Sequence[Chunk], int, int | None, bool], bool] = gate.closable
    mergeable: Callable[[bool, bool], bool] = chunks.mergeable
    appended: Callable[[int | None, int], bool] = appended
    application: Callable[[int, int], tuple[str, int]] = _application
    apart: Callable[[Version, Key, Image | None, Key | None], tuple[KeyChange, ...]] = gate.apart
    after_truncate: Callable[[Iterable[KeyChange], Version | None], list[KeyChange]] = gate.after_truncate
    batch: Callable[[Iterable[KeyChange], Mapping[Key, Held], bool, Mapping[Key, Image]], list[KeyChange]] = _batch
    visible: Callable[[int, str], bool] = batching.visible
    contains: Callable[[str, str], bool] = snapshot.contains
    acknowledged: Callable[[int, int], int] = chunks.acknowledged
    stamp: Callable[[int, int], Version] = lambda l0, now: image_version(l0)
    lake_merges_while_loading: bool = DeltaStore.merges_while_loading
    sections: Callable[..., list[Section]] = epochs.sections
    floors: Callable[[Sequence[Authority]], list[tuple[int, Tenants]]] = _floors
    epoch_floor: Callable[[int], Version] = epoch_floor
    ranges: Callable[[Sequence[tuple[str, ...]]], list[KeyRange]] = ranges_between
    keeps_order: bool = False
    spare_rate: int = 1
    definition_changed: Callable[[Piece, Piece | None], bool] = _definition_changed
    compared: Callable[[str, str | None, str | None], bool] = _compared
    covered: Callable[[Sequence[bool]], bool] = all
    filtered_read: str = "refused"
    ended_statement: str = "repeated"
    catches_up_while_loading: bool = False
    tombstones: bool = True
    truncates: bool = True
    waits_for_commit: bool = True
    collection_floor: bool = True
    gate: Transaction = statements.GATE
    load: Transaction = statements.LOAD
    close: Procedure = statements.CLOSE
    collect: Procedure = statements.COLLECT
    truncate: Procedure = statements.TRUNCATE
    append_load: Procedure = statements.APPEND_LOAD
    catch_up: Procedure = statements.CATCH_UP
    hand_over: tuple[Move, ...] = statements.HAND_OVER
    authority_read: str = statements.AUTHORITY_READ
    trigger_timing: str = statements.TRIGGER_LOG_TIMING


RULES = Rules()
