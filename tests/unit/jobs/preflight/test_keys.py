"""A target's key must tell apart whatever the source's does; what is as fine or finer passes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from changeover.jobs.preflight.keys import coarser
from changeover.session import Connection, connect
from changeover.spec import Spec, Table, load

SPEC = """
name = "k"
[source]
dsn = "env:OLD_DSN"
[target.store]
kind = "postgres"
dsn = "env:OLD_DSN"
[[table]]
source = "s"
target = "t"
key = ["id"]
{columns}
[work]
path = "work"
"""

FINE = [("text", "text"), ("text", 'text COLLATE "C"'), ("integer", "bigint"), ("jsonb", "text"), ("char(4)", "char(4)")]
FINE_WITH_ICU = [("text COLLATE folding", "text"), ("text COLLATE folding", "text COLLATE again"),
                 ("varchar(9) COLLATE folding", "varchar(9) COLLATE folding")]  # fmt: skip
COARSE_WITH_ICU = [("text", "text COLLATE folding"), ("varchar(9)", "text COLLATE folding"),
                   ('text COLLATE "C"', "text COLLATE folding"),
                   ("text COLLATE folding", "text COLLATE flat"), ("text[]", "text[] COLLATE folding")]  # fmt: skip
COLLATIONS = """
CREATE COLLATION folding (provider = icu, locale = 'und-u-ks-level2', deterministic = false);
CREATE COLLATION again (provider = icu, locale = 'und-u-ks-level2', deterministic = false);
CREATE COLLATION flat (provider = icu, locale = 'und-u-ks-level1', deterministic = false)
"""


@pytest.fixture
def session(any_dsn: str) -> Iterator[Connection]:
    with connect(any_dsn, "test") as connection:
        yield connection


def spec_of(folder: Path, columns: str = "") -> Spec:
    path = folder / "spec.toml"
    path.write_text(SPEC.format(columns=columns))
    return load(path)


def reasons(session: Connection, table: Table, source: str, target: str) -> list[str]:
    with session.transaction(force_rollback=True):
        session.execute(f"CREATE TABLE s (id {source} PRIMARY KEY); CREATE TABLE t (id {target} PRIMARY KEY)".encode())
        return coarser(session, session, table)


def test_a_key_that_cannot_tell_two_source_keys_apart_is_refused(session: Connection, tmp_path: Path) -> None:
    table = spec_of(tmp_path).tables[0]
    with_icu = session.execute("SELECT FROM pg_collation WHERE collname = 'und-x-icu'").fetchone() is not None
    if with_icu:  # without it no collation is nondeterministic
        session.execute(COLLATIONS.encode())
    for source, target in [*FINE, *(FINE_WITH_ICU if with_icu else [])]:
        assert reasons(session, table, source, target) == [], (source, target)
    for source, target in COARSE_WITH_ICU if with_icu else []:
        (told,) = reasons(session, table, source, target)
        assert told.startswith("the key column id of t has the nondeterministic collation "), (source, target)
        assert told.endswith(": rows that are two there would be one here; give both the same collation")
    renamed = spec_of(tmp_path, '[table.columns]\nid = "of"').tables[0]
    computed = spec_of(tmp_path, '[table.columns]\nid = "lower(id)"').tables[0]
    if with_icu:
        assert reasons(session, computed, "text", "text COLLATE folding") == [], "what is computed is judged row by row"
        with session.transaction(force_rollback=True):
            session.execute("CREATE TABLE s (of text PRIMARY KEY); CREATE TABLE t (id text COLLATE folding PRIMARY KEY)")
            assert coarser(session, session, renamed) == [
                "the key column id of t has the nondeterministic collation folding, and s.of has default: rows that are two there"
                " would be one here; give both the same collation"
            ]
    assert coarser(session, session, renamed) == []
