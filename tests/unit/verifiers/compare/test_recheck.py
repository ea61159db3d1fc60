"""Images of rechecked keys: what tells two rows apart, and that no key is taken for one that is gone."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from pyspark.sql import SparkSession

from changeover.verifiers.compare.recheck import Image, Trail, _another_notation, alike, images

WHEN = datetime(2024, 3, 1, 12, 0, 0, 1, tzinfo=UTC)
SCHEMA = "k binary, at timestamp, n string, tags array<string>, d double"
ROW = (b"\x01", WHEN, "1.50", ["a", None], -0.0)
TYPES = ["timestamp with time zone", "double precision", "bytea", "numeric", "text[]"]


@pytest.mark.parametrize(
    ("other", "same"),
    [
        (ROW, True),
        ((b"\x01", WHEN, "1.5", ["a", None], 0.0), True),
        ((b"\x01", WHEN.replace(microsecond=2), "1.50", ["a", None], -0.0), False),
        ((b"\x01", WHEN, None, ["a", None], -0.0), False),
        ((b"\x01", WHEN, "1.50", ["a", "null"], -0.0), False),
    ],
)
def test_an_image_holds_every_value_exactly(spark: SparkSession, other: tuple[object, ...], same: bool) -> None:
    names = ["at", "d", "k", "n", "tags"]
    left, right = (images(spark.createDataFrame([row], SCHEMA), names, ["k"]) for row in (ROW, other))
    assert left.keys() == right.keys() == {("\\x01",)}
    assert alike(left["\\x01",], right["\\x01",], TYPES) == same


def test_a_key_that_is_there_twice_is_like_nothing(spark: SparkSession) -> None:
    found = images(spark.createDataFrame([ROW, ROW], SCHEMA), ["n"], ["k"])["\\x01",]
    assert len(found) == 2
    assert not alike(found, found, ["numeric"])
    assert not alike(found, found[:1], ["numeric"])


def test_nothing_is_like_nothing_alone() -> None:
    gone: Image = ()
    assert alike(gone, gone, ["text"])
    assert not alike(gone, ((None,),), ["text"])


def test_a_target_may_hold_what_the_source_held_since() -> None:
    trail = Trail()
    assert not trail.meets((("a",),), (("old",),), ["text"])
    assert not trail.meets((("b",),), (("old",),), ["text"])
    assert trail.looks == 1
    assert trail.meets((("c",),), (("a",),), ["text"]), "the mirror of an earlier write arrives"
    assert not Trail().meets((("c",),), (("a",),), ["text"]), "an image from before the comparison is no excuse"


def test_where_the_target_has_authority_the_source_may_hold_what_the_target_held() -> None:
    trail, kind = Trail(side=1), ["text"]
    assert not trail.meets((("old",),), (("a",),), kind)
    assert not trail.meets((("x",),), (("b",),), kind)
    assert trail.hears((("x",),), kind), "the source had it already"
    assert trail.meets((("a",),), (("c",),), kind), "the mirror of an earlier write arrives"
    assert not trail.meets((("d",),), (("old",),), kind), "what the source held is no excuse for the target"


def test_two_looks_show_the_same_only_where_no_commit_is_told_of_in_between() -> None:
    trail, kind = Trail(), ["text"]
    for told in (False, True, False):
        if told:
            trail.hears(None, kind)
        trail.meets((("1",),), (("0",),), kind)
    assert trail.looks == 2
    trail.hears((("2",),), kind)
    assert trail.looks == 0


def test_a_target_may_hold_what_a_commit_has_left_since_the_last_look() -> None:
    trail, kind = Trail(), ["text"]
    assert not trail.meets((("a",),), (("b",),), kind)
    assert not trail.hears((("x",),), kind)
    assert trail.hears((("b",),), kind), "the commit that the target had already is told of"
    assert not trail.hears((), kind)
    assert trail.meets((("c",),), (), kind), "what replay has offered by now: the row was gone"
    assert not trail.meets((("c",),), (("b",),), kind), "an earlier commit is no excuse once a later one was offered"


def test_a_target_that_stands_still_is_not_excused_by_what_the_source_was_before() -> None:
    trail, kind = Trail(), ["text"]
    for image in ("1", "0", "1"):  # told before the first look, so the target has had all of it offered
        assert not trail.hears(((image,),), kind)
    for looks in (1, 2, 3):
        assert not trail.meets((("1",),), (("0",),), kind)
        assert trail.looks == looks


def test_a_key_that_is_written_otherwise_by_now_is_no_stranger() -> None:
    asked = [("1", "x"), ("7", "y")]
    assert _another_notation(("1.0", "x"), asked, ["numeric", "text"])
    assert not _another_notation(("1.0", "y"), asked, ["numeric", "text"])
    assert not _another_notation(("1.0", "x"), asked, ["text", "text"])
