"""How far one change travels: the rooms that an INSERT passes from decode to commit, and those of a step up of the flag.

A room is a file of the pipeline: of `jobs`, `flags`, `verifiers` and the stores. The ground that every room stands on is none, such
as names, positions and sessions. Each room more is one more to read for who follows a change. So their number is held.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from ldclient.migrations.types import Stage

from changeover.flags.cutover import commands as cutover
from changeover.jobs.apply.applier import Applier
from changeover.jobs.capture.slot import SlotRun
from tests.support.fix_accounts import ACCOUNTS, SPEC, switch
from tests.support.fix_migration import FOLLOWS, FOLLOWS_TABLE, STORE, MakeMigration

ROOT = Path(__file__).parents[2]
ROOMS = tuple(f"{ROOT / name}/" for name in ("jobs", "flags", "verifiers", "src/changeover/stores"))

MOST_OF_AN_INSERT, MOST_OF_A_STEP = 21, 36
"""The aim is 12 and 20; these are what is there, and they may only fall."""

CARRIES = {SlotRun._took.__code__, SlotRun._flush.__code__, Applier.catch_up.__code__}
"""From the decoding of messages to the spool's commit, and from the spool to the commit at the target."""


@contextmanager
def traced(within: Callable[[FrameType], bool]) -> Iterator[set[str]]:
    """Note the rooms whose functions run while a function that `within` names does, in any thread."""
    rooms: set[str] = set()
    depth = threading.local()

    def note(frame: FrameType, event: str, _: object) -> None:
        if event not in ("call", "return"):
            return
        inside = getattr(depth, "inside", 0)
        if within(frame):
            depth.inside = inside = inside + (1 if event == "call" else -1)
        if inside > 0 and event == "call":
            name = str(Path(frame.f_code.co_filename).resolve()) if "changeover" in frame.f_code.co_filename else ""
            if name.startswith(ROOMS):
                rooms.add(str(Path(name).relative_to(ROOT)))

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        yield rooms
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


def test_an_insert_passes_few_rooms_from_decode_to_commit(make_migration: MakeMigration) -> None:
    made = make_migration(FOLLOWS_TABLE, FOLLOWS, targets=[STORE])
    made.prepare()
    made.backfill()
    made.old.execute("INSERT INTO follows (from_user, to_channel, note) VALUES (1, 2, 'traced')")
    with traced(lambda frame: frame.f_code in CARRIES) as rooms:
        made.catch_up()
    assert made.source_rows() == made.target_rows(STORE)
    assert {"jobs/decode/pgoutput.py", "jobs/spool/table.py", "jobs/apply/applier.py"} <= rooms
    assert "src/changeover/stores/postgres/store.py" in rooms
    assert len(rooms) <= MOST_OF_AN_INSERT, sorted(rooms)


def test_a_step_up_of_the_flag_enters_few_rooms(make_migration: MakeMigration) -> None:
    made = make_migration(SPEC, ACCOUNTS, targets=[STORE])
    made.prepare()
    switch(made, Stage.OFF)
    with traced(lambda frame: frame.f_code is cutover.advance.__code__) as rooms:
        cutover.advance(made.spec, override="a test")
    assert {"flags/cutover/commands.py", "flags/readiness.py", "jobs/ledger/ledger.py"} <= rooms
    assert len(rooms) <= MOST_OF_A_STEP, sorted(rooms)
