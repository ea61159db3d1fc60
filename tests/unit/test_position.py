"""The version axis: the order of versions, and LSNs as text and number."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from changeover.position import Version, epoch_floor, format_lsn, image_version, parse_lsn

lsns = st.integers(0, 2**64 - 1)
events = st.builds(Version, st.integers(0, 5), lsns, st.integers(0, 2**40))


@given(lsns)
def test_an_lsn_comes_back_from_its_text(lsn: int) -> None:
    assert parse_lsn(format_lsn(lsn)) == lsn


def test_the_text_is_postgresqls() -> None:
    assert format_lsn(0x16B374D848) == "16/B374D848"
    assert parse_lsn("16/B374D848") == 0x16B374D848
    assert format_lsn(0) == "0/0"


@given(lsns, st.integers(0, 2**40), lsns)
def test_an_image_lies_below_every_event_of_its_stream(l0: int, ordinal: int, later: int) -> None:
    assert image_version(l0) < Version(0, l0, ordinal)
    assert image_version(l0) < Version(0, max(l0, later), ordinal)
    assert image_version(l0) < Version(1, 0, ordinal)


@given(events, events)
def test_epoch_first_then_lsn_then_ordinal(left: Version, right: Version) -> None:
    assert (left < right) == (
        left.epoch < right.epoch
        or (left.epoch == right.epoch and left.lsn < right.lsn)
        or (left.epoch == right.epoch and left.lsn == right.lsn and left.ordinal < right.ordinal)
    )


@given(events)
def test_an_epochs_floor_parts_it_from_every_earlier_one(event: Version) -> None:
    assert event < epoch_floor(event.epoch + 1)
    assert event >= epoch_floor(event.epoch)


def test_a_version_reads_well() -> None:
    assert str(Version(1, 0x16B374D848, -1)) == "1:16/B374D848:-1"
