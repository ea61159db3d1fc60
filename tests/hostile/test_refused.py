"""Every cell that `check` refuses: one sentence about that table, while the others beside it are not named."""

from __future__ import annotations

import re

from changeover.jobs.preflight.division import examined
from tests.hostile.cells import PLAIN, REFUSED
from tests.support.fix_hostile import Field, moved, statement


def test_every_refused_cell_is_one_sentence_of_check(field: Field) -> None:
    tables = [f"r{number}" for number in range(len(REFUSED))]
    field.old.execute(statement(PLAIN, table="innocent"))
    for table, cell in zip(tables, REFUSED, strict=True):
        for session, statements in ((field.old, cell.old), (field.new, cell.new)):
            for text in statements:
                session.execute(statement(text, table=table))
    spec = field.spec("refused", *map(moved, ["innocent", *tables]))
    reasons = examined(spec).reasons
    for table, cell in zip(tables, REFUSED, strict=True):
        said = [reason for reason in reasons if re.search(rf"\b{table}\b", reason)]
        assert said, (cell.name, reasons)
        assert any(cell.sentence in one for one in said), (cell.name, said)
        assert all("\n" not in one for one in said), cell.name
    assert not [reason for reason in reasons if "innocent" in reason]
