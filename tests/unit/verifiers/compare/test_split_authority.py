"""Split authority before a comparison: where there is no answer it is said, with the tenants' names and the reason."""

from __future__ import annotations

import pytest

from changeover.errors import CouldNotCheck
from changeover.jobs.ledger.epochs import NEW, OLD
from changeover.jobs.ledger.records import OLD_STORE
from changeover.jobs.reverse import path as reverse
from changeover.jobs.reverse import setup as reverse_setup
from changeover.verifiers.compare.split_authority import Split
from tests.support.fix_split import Split as Stores


def seen(split: Stores) -> Split:
    return Split(split.ledger.authorities())


def test_which_stores_have_some(split: Stores) -> None:
    assert (seen(split).at_old, seen(split).at_new) == (True, False)
    split.move(NEW, 100, 5000, "7")
    assert (seen(split).at_old, seen(split).at_new) == (True, True)
    split.move(NEW, 200, 6000)
    assert (seen(split).at_old, seen(split).at_new) == (False, True)
    split.move(OLD, 300, 7000, "7")
    assert (seen(split).at_old, seen(split).at_new) == (True, True)


def test_a_move_meanwhile_is_no_answer(split: Stores) -> None:
    before = seen(split)
    before.require_unmoved(split.ledger, "follows")
    split.move(NEW, 100, 5000, "7")
    with pytest.raises(CouldNotCheck, match="authority moved while the verification began"):
        before.require_unmoved(split.ledger, "follows")


def test_without_reverse_replication_there_is_no_answer(split: Stores) -> None:
    seen(split).require_reverse(split.ledger, "follows")
    path = reverse_setup.open_path(split.spec, split.ledger)
    assert path is not None
    split.move(NEW, 100, path.l0 + 8, "7")
    seen(split).require_reverse(split.ledger, "follows")
    split.ledger.stop("the old store refused a row", target=OLD_STORE, store=NEW)
    with pytest.raises(CouldNotCheck, match=r"the tenant 7: the new store has authority, .* does not follow: .* refused a row"):
        seen(split).require_reverse(split.ledger, "follows")
    reverse.break_off(split.ledger, "its slot is gone")
    with pytest.raises(CouldNotCheck, match=r"the tenant 7: .*: its slot is gone"):
        seen(split).require_reverse(split.ledger, "follows")
