"""What a batch offers: the product's tables and expressions against the pure functions that the model runs."""

from __future__ import annotations

from random import Random
from typing import cast

from pyspark.sql import SparkSession

from changeover.jobs.apply.batch import last_of_each_key as last_in_arrow
from changeover.jobs.spool.events import Event as SpoolEvent
from changeover.jobs.spool.events import Image as SpoolImage
from changeover.jobs.spool.events import arrow_table
from changeover.jobs.transform.derivation import derivations
from changeover.jobs.transform.transform import Transform
from changeover.position import Version
from changeover.spec import Table
from changeover.stores.base.interface import DELETED, EPOCH, LSN, ORDINAL, TargetTable
from changeover.stores.base.pgtypes import Column
from tests.model.gate import UNSENT, Image, Key, KeyChange, after_truncate, apart, completed, last_of_each_key

COLUMNS = (Column("id", "text", "string", True), Column("note", "text", "string"))
KEPT = Table("public.kept", "public.kept", ("id",))
TRANSFORM = Transform(KEPT, COLUMNS, TargetTable("public", "kept", COLUMNS, ("id",)), derivations(KEPT, COLUMNS), COLUMNS[:1])
EPOCH_OF_ALL = 3

Event = tuple[Version, str, str | None, str | None]
"""Version, key, note (None for a delete), and the old key of a row that got another one."""


def events(number: int) -> list[Event]:
    """Draw a batch: few keys, so that they meet, some of them changed."""
    random = Random(number)
    places = random.sample([(lsn, ordinal) for lsn in range(100, 104) for ordinal in (0, 2, 4)], 8)
    drawn: list[Event] = []
    for lsn, ordinal in places:
        key, old_key = random.sample("abc", 2)
        note = None if random.random() < 0.3 else f"{lsn}.{ordinal}"
        moves = note is not None and random.random() < 0.4
        drawn.append((Version(EPOCH_OF_ALL, lsn, ordinal), key, note, old_key if moves else None))
    return drawn


def spooled(batch: int, event: Event) -> SpoolEvent:
    """Return an event as the spool has it, its keys told apart by the batch."""
    (_, lsn, ordinal), key, note, old_key = event

    def of_batch(name: str, *more: str) -> SpoolImage:
        return ("id", "note")[: 1 + len(more)], (f"{batch}{name}", *more)

    if note is None:
        return SpoolEvent("public.kept", lsn, ordinal, "D", None, of_batch(key), (), 7, 0)
    old = of_batch(old_key) if old_key else None
    return SpoolEvent("public.kept", lsn, ordinal, "U", of_batch(key, note), old, (), 7, 0)


def test_a_batch_offers_what_the_rule_says(spark: SparkSession) -> None:
    batches = {number: events(number) for number in range(40)}
    table = arrow_table([spooled(n, event) for n, batch in batches.items() for event in batch])
    frame = spark.createDataFrame(last_in_arrow(table, ["id"], ["id", "note"]))
    found = {
        (row["id"], Version(row[EPOCH], row[LSN], row[ORDINAL]), None if row[DELETED] else row["note"])
        for row in TRANSFORM.changes(frame, EPOCH_OF_ALL).collect()
    }
    expected = set()
    for number, batch in batches.items():
        changes = [c for version, key, note, old in batch for c in apart(version, key, None if note is None else (key, note), old)]
        for change in last_of_each_key(changes):
            note = None if change.image is None else cast(str, change.image[1])
            expected.add((f"{number}{change.key}", change.version, note))
    assert found == expected


def test_only_what_was_not_sent_is_taken_and_a_row_that_is_gone_is_left_out() -> None:
    at = Version(0, 100, 0)
    sent, partial = KeyChange("a", at, ("a", None, "sent")), KeyChange("b", at, ("b", UNSENT, "sent"))
    rows: dict[Key, Image] = {"a": ("a", "newer", "newer"), "b": ("b", "large", "newer")}
    assert completed([sent, partial], rows) == [sent, KeyChange("b", at, ("b", "large", "sent"))]
    assert completed([partial, KeyChange("b", at, None)], {}) == [KeyChange("b", at, None)]


def test_a_truncate_leaves_what_comes_after_it() -> None:
    changes = [KeyChange("a", Version(0, 100, ordinal), None) for ordinal in (0, 2, 3, 4)]
    assert after_truncate(changes, Version(0, 100, 2)) == changes[2:]
    assert after_truncate(changes, None) == changes
