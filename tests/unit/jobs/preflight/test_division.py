"""Division: what stands against moving tenants one by one, each reason from real tables; and that nothing else does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ldclient.migrations.types import Origin
from psycopg.conninfo import make_conninfo

from changeover.errors import Refused
from changeover.flags.fence.fence import fence
from changeover.jobs.preflight.division import examined
from changeover.jobs.transform.tenancy import new_column
from changeover.session import connect
from changeover.spec import Spec, load

OLD = "CREATE TABLE follows (from_user bigint, to_channel bigint, note text, PRIMARY KEY (from_user, to_channel))"
NEW = "CREATE TABLE associations (entity_a bigint, to_channel bigint, note text, PRIMARY KEY (entity_a, to_channel))"
TABLE = '[[table]]\nsource = "follows"\ntarget = "associations"\nkey = ["entity_a", "to_channel"]\n'
COLUMNS = '[table.columns]\nentity_a = "from_user"\n'

Asked = Callable[..., Spec]


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old_dsn: str, new_dsn: str) -> Iterator[Asked]:
    monkeypatch.setenv("OLD_DSN", old_dsn)
    monkeypatch.setenv("NEW_DSN", new_dsn)
    with connect(old_dsn, "test") as old, connect(new_dsn, "test") as new:

        def ask(*, old_ddl: str = OLD, new_ddl: str = NEW, table: str = TABLE + COLUMNS, context: str = "from_user") -> Spec:
            old.execute(old_ddl)
            new.execute(new_ddl)
            path = tmp_path / "spec.toml"
            path.write_text(
                'name = "m"\n[source]\ndsn = "env:OLD_DSN"\n[target.store]\nkind = "postgres"\ndsn = "env:NEW_DSN"\n'
                f'{table}[flag]\nkey = "f"\ntarget = "store"\ncontext = "{context}"\n[work]\npath = "{tmp_path}"\n'
            )
            return load(path)

        yield ask


def test_a_tenant_that_stands_in_both_keys_is_no_reason(asked: Asked) -> None:
    spec = asked()
    assert new_column(spec, spec.tables[0]) == "entity_a"
    assert examined(spec).reasons == []


def test_a_new_table_that_is_not_there_yet_is_no_reason(asked: Asked) -> None:
    assert examined(asked(new_ddl="SELECT 1")).reasons == []


REASONS = [
    ({"context": "note"}, r"note \(flag.context\) is not in the key of public.follows \(from_user, to_channel\)"),
    ({"context": "nothing"}, r"nothing \(flag.context\) is not in the key of public.follows"),
    (
        {"table": TABLE + '[table.columns]\nentity_a = "from_user + 1"\n[table.reverse]\nfrom_user = "entity_a - 1"\n'},
        r"no key column of associations is from_user \(flag.context\) alone",
    ),
    (
        {"table": TABLE + COLUMNS + '[table.transform]\nfunction = "math:sqrt"\n[table.reverse]\nfrom_user = "entity_a"\n'
         'to_channel = "to_channel"\nnote = "note"\n'},
        "public.follows has a function, after which nobody can tell a row's tenant",
    ),
    (
        {"old_ddl": OLD.replace("from_user bigint", "from_user date"), "new_ddl": NEW.replace("entity_a bigint", "entity_a date")},
        "public.follows.from_user .* is of the type date: a tenant is an integer, a text, a varchar or a uuid",
    ),
    (
        {"new_ddl": NEW.replace("entity_a bigint", "entity_a varchar(30)"),
         "table": TABLE + COLUMNS + '[table.reverse]\nfrom_user = "bigint(entity_a)"\n'},
        r"public.associations.entity_a is of the type character varying\(30\) and public.follows.from_user of bigint",
    ),
    (
        {"old_ddl": OLD.replace("from_user bigint", "from_user text"),
         "new_ddl": NEW.replace("entity_a bigint", "entity_a varchar(30)")},
        r"is of the type character varying\(30\) and .* of text: a tenant must read alike in both",
    ),
    ({"old_ddl": OLD + "; CREATE UNIQUE INDEX once ON follows (to_channel)"}, "the index once of public.follows is unique without"),
    (
        {"old_ddl": OLD + "; CREATE UNIQUE INDEX lower ON follows ((from_user % 2)) INCLUDE (from_user)"},
        "the index lower of public.follows is unique without from_user",
    ),
    (
        {"new_ddl": NEW + "; ALTER TABLE associations ADD id serial, ADD UNIQUE (id)"},
        "the index associations_id_key of public.associations is unique without entity_a",
    ),
    (
        {"new_ddl": NEW.replace(", PRIMARY KEY (entity_a, to_channel)", "")},
        "tenants move one by one only where they can come back: public.associations has no primary key and no replica identity",
    ),
    (
        {"table": TABLE + COLUMNS + 'note = "upper(note)"\n'},
        "tenants move one by one only where they can come back: .* no reverse replication"
        " from associations: nothing gives its column note",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("given", "reason"), REASONS, ids=[reason[:40] for _, reason in REASONS])
def test_what_stands_against_it_is_said(asked: Asked, given: dict[str, str], reason: str) -> None:
    found = examined(asked(**given)).reasons
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError("\n".join(found))


LONGER = [("varchar(20)", "varchar(30)"), ("varchar(20)", "text"), ("uuid", "uuid"), ("integer", "bigint")]


@pytest.mark.parametrize(("old", "new"), LONGER, ids=[f"{old} {new}" for old, new in LONGER])
def test_types_that_read_the_same_are_no_reason(asked: Asked, old: str, new: str) -> None:
    of_old, of_new = OLD.replace("from_user bigint", f"from_user {old}"), NEW.replace("entity_a bigint", f"entity_a {new}")
    found = examined(asked(old_ddl=of_old, new_ddl=of_new)).reasons
    assert [reason for reason in found if "come back" not in reason] == []


def test_a_sequence_of_somebody_else_is_named(monkeypatch: pytest.MonkeyPatch, asked: Asked, new_dsn: str) -> None:
    spec = asked()
    with connect(new_dsn, "test") as new:
        new.execute("CREATE SEQUENCE others; ALTER TABLE associations ADD n bigint DEFAULT nextval('others')")
        new.execute("CREATE ROLE dividing LOGIN PASSWORD 'p' REPLICATION; ALTER TABLE associations OWNER TO dividing")
        try:
            monkeypatch.setenv("NEW_DSN", make_conninfo(new_dsn, user="dividing", password="p"))
            reasons = examined(spec).reasons
        finally:
            new.execute("DROP OWNED BY dividing CASCADE; DROP ROLE dividing")
    said = "the role dividing does not own others"
    assert [said in reason for reason in reasons].count(True) == 1


def test_a_fence_asks_again(asked: Asked, new_dsn: str) -> None:
    spec = asked()
    assert examined(spec).reasons == []
    with connect(new_dsn, "test") as new:
        new.execute("CREATE UNIQUE INDEX later ON associations (note)")
    with pytest.raises(Refused, match=r"no tenant moves alone: the index later of public.associations is unique without entity_a"):
        fence(spec, Origin.NEW, tenants=["7"])
