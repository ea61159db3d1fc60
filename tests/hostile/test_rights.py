"""Every right that is missing is one sentence of `check` about its own table, and the statement in it, as it stands, gives it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pytest

from changeover.jobs.preflight.division import examined
from changeover.jobs.preflight.rules import Preflight
from changeover.session import Connection
from tests.hostile.midway import NEW
from tests.hostile.rights import COPYING, TAKING_OVER, Right
from tests.support.fix_hostile import Field, statement
from tests.support.fix_roles import Mover, passing_mover

DDL = "CREATE TABLE {table} (id integer PRIMARY KEY, n integer, v text)"
FLAG = '[flag]\nkey = "f"\ntarget = "store"\n'
MOVED = '[[table]]\nsource = "{name}"\ntarget = "{name}"\nkey = ["id"]\n'


@pytest.fixture
def owner(field: Field) -> Iterator[Mover]:
    """Yield a role that owns what ours does not."""
    with passing_mover(field.old_dsn, field.new_dsn) as made:
        yield made


def names_of(session: Connection, role: Mover, owner: Mover, place: object) -> dict[str, str]:
    """Return the names of a row; those in sentences that are no SQL are plain."""
    schema, table = f"S{place}", f"Wares{place}"
    return {
        "table": f'"{schema}"."{table}"', "schema": f'"{schema}"', "sequence": f'"{schema}"."Numbers{place}"',
        "plain schema": schema, "plain table": f"{schema}.{table}", "database": session.info.dbname, "role": role.name,
        "owner": owner.name,
    }  # fmt: skip


def make(session: Connection, names: Mapping[str, str], *, owned: bool) -> None:
    """Make a row's schema and table, with all that the role needs."""
    whole = "ALTER TABLE {table} OWNER TO {role}" if owned else "GRANT SELECT, INSERT, UPDATE, DELETE ON {table} TO {role}"
    for text in ("CREATE SCHEMA {schema}", "GRANT USAGE, CREATE ON SCHEMA {schema} TO {role}", DDL, whole):
        session.execute(statement(text, **names))


def said_of(row: Right, names: Mapping[str, str]) -> str:
    """Return the sentence that is expected of a row."""
    said = statement(f"{row.what}: {row.grant}{row.more}", **names).as_string(None)
    return f"target store: {said}" if row.store == NEW else said


@pytest.mark.parametrize(("rows", "more"), [(COPYING, ""), (TAKING_OVER, FLAG)], ids=["copying", "taking-over"])
def test_each_missing_right_is_one_sentence_whose_grant_is_enough(
    field: Field, role: Mover, owner: Mover, rows: tuple[Right, ...], more: str
) -> None:
    sides = {"old": field.old, "new": field.new}
    places = [*range(len(rows)), "Innocent"]
    spec = field.spec("rights", *(MOVED.format(name=f"S{place}.Wares{place}") for place in places), more=more)
    for place in places:
        for store, session in sides.items():
            make(session, names_of(session, role, owner, place), owned=store != NEW or bool(more))
    assert examined(spec).reasons == []

    expected, grants = [], []
    for place, row in enumerate(rows):
        session = sides[row.store]
        names = names_of(session, role, owner, place)
        for text in row.does:
            session.execute(statement(text, **names))
        expected.append(said_of(row, names))
        grants.append((session, statement(row.grant, **names)))
    found = examined(spec)
    assert sorted(found.reasons) == sorted(expected)
    assert_printed(found, [grant.as_string(None) for _, grant in grants])
    for session, grant in grants:
        session.execute(grant)
    again = examined(spec)
    assert (again.reasons, again.grants) == ([], [])


def assert_printed(found: Preflight, grants: list[str]) -> None:
    """Assert that the statements are printed by themselves too; what lifts a policy is a choice, and stands in the sentence."""
    printed = [text.removesuffix("  -- in target store") for text in found.grants]
    assert sorted(printed) == sorted(text for text in grants if "BYPASSRLS" not in text)
