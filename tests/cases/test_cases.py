"""Cases of other projects, against the pure rule, the gate of a real PostgreSQL, and Delta's MERGE.

Each case says what its keys hold at the end; all cells, versions and tombstones included, are those of the pure rule everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from psycopg import sql
from pyspark.sql import SparkSession

from changeover.embedded.server import EmbeddedServer
from changeover.session import Connection, connect
from changeover.stores.delta.store import DeltaStore
from changeover.stores.postgres import gate
from tests.cases.playing import READS, Copy, Rule, rows_of
from tests.cases.reading import AXES, V0, Cells, CopyCase, MergeCase, copy_cases, documents, merge_cases
from tests.cases.stores import DDL, TABLE, Gate, LakeCase, lake_at
from tests.model.gate import KeyChange
from tests.support.fix_postgres import fresh_database

MERGES = {f"{axis}: {case.name}": case for axis in AXES for case in merge_cases(axis)}
COPIES = {f"{reads}: {case.name}": (case, reads) for reads in READS for case in copy_cases()}

IN_LAKE = {name for name in {**MERGES, **COPIES} if name.endswith("seed 1") or "seed" not in name}
"""A MERGE costs seconds, so of what is drawn Delta sees one each."""

WAYS = {"batches": False, "one by one": True}


def merged_by(case: MergeCase, one_by_one: bool) -> Cells:
    rule = Rule(one_by_one)
    for batch in case.batches:
        rule.offer(batch)
    return rule.cells


def copied_by(case: CopyCase, reads: str, one_by_one: bool = False) -> Cells:
    rule = Rule(one_by_one)
    Copy(case, reads, rule).play()
    return rule.cells


def check_end(case: MergeCase, cells: Cells, way: str) -> None:
    assert case.seen(cells) in [case.seen(end) for end in case.ends], f"{way}, {case.source}"


@pytest.fixture(scope="module")
def gated(server: EmbeddedServer) -> Iterator[tuple[Connection, str]]:
    """Yield a session and the DSN of a database with the gated table that all cases share."""
    with fresh_database(server, "cases") as dsn, connect(dsn, "changeover:tests:cases") as connection:
        connection.execute(sql.SQL(DDL))
        gate.install(connection, TABLE, V0)
        yield connection, dsn


def test_each_file_names_its_source() -> None:
    for name, document in documents().items():
        source = document["source"]
        assert set(source) >= {"project", "licence", "repository", "folder", "files"}, name
        used = {entry["file"] for kind in ("merge", "converge", "copy", "writer") for entry in document.get(kind, [])}
        assert used == set(source["files"]), name


def test_where_an_end_is_ours_the_data_say_why() -> None:
    for document in documents().values():
        for entry in document.get("merge", []):
            assert ("ours" in entry) is ("why" in entry), entry["name"]
    differing = {case.name: case for case in merge_cases("commits") if case.theirs is not None}
    assert sorted(differing) == [
        "a late delete below a row",
        "tie of a row with another put",
        "tie of a tombstone with a delete and with a put",
    ]
    assert all(case.theirs not in case.ends for case in differing.values())


@pytest.mark.parametrize("name", MERGES)
def test_the_rule_merges_to_the_end(name: str) -> None:
    case = MERGES[name]
    for way, one_by_one in WAYS.items():
        check_end(case, merged_by(case, one_by_one), way)


@pytest.mark.parametrize("name", COPIES)
def test_the_rule_copies_to_the_end(name: str) -> None:
    case, reads = COPIES[name]
    rule = Rule()
    source = Copy(case, reads, rule).play()
    assert case.end in (None, source), "the case's own writes lead to its end"
    assert rows_of(rule.cells) == source, case.source
    assert copied_by(case, reads, one_by_one=True) == rule.cells


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MERGES)
def test_the_gate_merges_to_the_end(gated: tuple[Connection, str], name: str, way: str) -> None:
    case = MERGES[name]
    table = Gate(*gated, f"{way} {name}", WAYS[way])
    for batch in case.batches:
        table.offer(batch)
    check_end(case, table.cells(), way)
    assert table.cells() == merged_by(case, WAYS[way])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", COPIES)
def test_the_gate_copies_to_the_end(gated: tuple[Connection, str], name: str, way: str) -> None:
    case, reads = COPIES[name]
    table = Gate(*gated, f"{way} {name}", WAYS[way])
    source = Copy(case, reads, table).play()
    swept = gate.sweep(gated[0], TABLE)
    assert swept == 0, "nothing runs at the same time, so the loader itself refuses every ghost"
    assert rows_of(table.cells()) == source, case.source
    assert table.cells() == copied_by(case, reads)


@pytest.fixture(scope="module")
def lake(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Cells]:
    """Return what each case leaves in the Delta table."""
    made = lake_at(DeltaStore("lake", Path(tmp_path_factory.mktemp("cases")), "cases"))
    for name in sorted(IN_LAKE & set(COPIES)):
        case, reads = COPIES[name]
        Copy(case, reads, LakeCase(made, name)).play()
    for name in sorted(IN_LAKE & set(MERGES)):
        target = LakeCase(made, name)
        for batch in MERGES[name].batches:
            target.offer(batch)
    made.merge_all(spark)
    return made.cells(spark)


@pytest.mark.parametrize("name", sorted(IN_LAKE & set(MERGES)))
def test_delta_merges_to_the_end(lake: dict[str, Cells], name: str) -> None:
    case = MERGES[name]
    check_end(case, lake[name], "Delta")
    if len(case.ends) == 1:
        assert lake[name] == merged_by(case, one_by_one=False)


@pytest.mark.parametrize("name", sorted(IN_LAKE & set(COPIES)))
def test_delta_copies_to_the_end(lake: dict[str, Cells], name: str) -> None:
    case, reads = COPIES[name]
    assert rows_of(lake[name]) == rows_of(copied_by(case, reads)), case.source


BROKEN: dict[str, tuple[str, Any, int]] = {
    "equal versions are taken": (
        "tests.model.gate.applies",
        lambda offered, cell, floor: cell is None or offered >= cell,
        3,
    ),
    "whatever comes last is taken": ("tests.model.gate.applies", lambda *_: True, 30),
    "the LSN alone counts": (
        "tests.model.gate.applies",
        lambda offered, cell, _: cell is None or offered.lsn > cell.lsn,
        15,
    ),
    "an image goes over a cell": ("tests.cases.playing.image_applies", lambda *_: True, 8),
    "a batch brings its last event": (
        "tests.cases.playing.last_of_each_key",
        lambda changes: list({change.key: change for change in changes}.values()),
        10,
    ),
    "a new key is a put alone": ("tests.cases.playing.apart", lambda at, key, row, old=None: (KeyChange(key, at, row, old),), 2),
}
"""What a wrong rule would be, and how many cases tell at least."""


@pytest.mark.parametrize("fault", BROKEN)
def test_the_cases_tell_a_broken_rule(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = {name: Copy(case, reads, Rule()).play() for name, (case, reads) in COPIES.items()}
    place, broken, least = BROKEN[fault]
    monkeypatch.setattr(place, broken)
    told = [n for n, c in MERGES.items() if c.seen(merged_by(c, False)) not in [c.seen(end) for end in c.ends]]
    told += [name for name, (case, reads) in COPIES.items() if rows_of(copied_by(case, reads)) != sources[name]]
    assert len(told) >= least, told
