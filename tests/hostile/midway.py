"""The matrix of what happens midway, as data: what somebody does to a store, at which step it shows, and what comes of it.

All rows of `MIDWAY` are played one after the other against one migration, whose role is no superuser in either store. It is done,
the step ends with a sentence, it is undone, and the same step goes on as if nothing had been. A change of the stream's definition
is a gap that nothing undoes: those rows are in `tests/unit/jobs/guarantee/test_definition.py` and
`tests/unit/flags/fence/test_fence_definition.py`.

A column of the target that is given a narrower type ends no step: what is written is what the server makes of it, and verification
has to tell. So each row of `NARROWED` has a table of its own in one migration.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Step(Enum):
    """The step that meets what was done."""

    BACKFILL = "backfill"
    REPLAY = "replay"
    VERIFY = "verify"


OLD, NEW = "old", "new"


@dataclass(frozen=True)
class Midway:
    """What is done in a store before a step, how it is undone, and the words of the sentence that comes meanwhile.

    `{table}` and `{role}` are the migration's.
    """

    name: str
    step: Step
    store: str
    does: tuple[str, ...]
    undo: tuple[str, ...]
    words: str


HIDE = (
    "ALTER TABLE {table} ENABLE ROW LEVEL SECURITY",
    "ALTER TABLE {table} FORCE ROW LEVEL SECURITY",
    "CREATE POLICY p ON {table} USING (id % 3 = 0)",
)
SHOW = ("DROP POLICY p ON {table}", "ALTER TABLE {table} DISABLE ROW LEVEL SECURITY, NO FORCE ROW LEVEL SECURITY")
HIDDEN = "row-level security"

MIDWAY = (
    Midway("a policy on the source, before the load", Step.BACKFILL, OLD, HIDE, SHOW, HIDDEN),
    Midway(
        "no right to read the source", Step.BACKFILL, OLD,
        ("REVOKE SELECT ON {table} FROM {role}",), ("GRANT SELECT ON {table} TO {role}",), "permission denied",
    ),
    Midway(
        "no right to write the target", Step.BACKFILL, NEW,
        ("REVOKE INSERT ON {table} FROM {role}",), ("GRANT INSERT ON {table} TO {role}",), "permission denied",
    ),
    Midway("a policy on the target, before the replay", Step.REPLAY, NEW, HIDE, SHOW, HIDDEN),
    Midway(
        "no right to change the target", Step.REPLAY, NEW,
        ("REVOKE UPDATE ON {table} FROM {role}",), ("GRANT UPDATE ON {table} TO {role}",), "permission denied",
    ),
    Midway("a policy on the source, before the verdict", Step.VERIFY, OLD, HIDE, SHOW, HIDDEN),
    Midway("a policy on the target, before the verdict", Step.VERIFY, NEW, HIDE, SHOW, HIDDEN),
    Midway(
        "no right to read the target", Step.VERIFY, NEW,
        ("REVOKE SELECT ON {table} FROM {role}",), ("GRANT SELECT ON {table} TO {role}",), "permission denied",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Narrowed:
    """A table whose target has a column narrowed before a step and widened after the verdict; `cut` says whether values were."""

    table: str
    before: Step
    column: str
    narrower: str
    wider: str
    cut: bool = True


PRICE = ("n", "numeric(10,2)", "numeric(12,4)")

NARROWED = (
    Narrowed("loaded", Step.BACKFILL, *PRICE),
    Narrowed("replayed", Step.REPLAY, *PRICE),
    Narrowed("judged", Step.VERIFY, *PRICE),
    Narrowed("fits", Step.VERIFY, "v", "character varying(9)", "text", cut=False),
)
