"""The spec: what is refused, by which key, and what its hash depends on."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

from changeover.errors import SecretMissing, SpecError
from changeover.spec import Spec, load
from changeover.spec.document import json_schema

WHOLE = """
name = "follows"
[source]
dsn = "env:OLD_DSN"
capture = "slot"
[target.store]
kind = "postgres"
dsn = "env:NEW_DSN"
[target.lake]
kind = "delta"
path = "/lake"
[[table]]
source = "public.follows"
target = "associations"
key = ["entity_a", "entity_b"]
drop = ["secret"]
where = "deleted_at IS NULL"
[table.columns]
entity_a = "from_user"
entity_b = "to_channel"
[table.transform]
function = "my_app.migration:reshape"
[[table.check]]
name = "count"
source = "SELECT count(*) FROM follows"
target = "SELECT count(*) FROM associations"
[flag]
key = "follows-store"
target = "store"
[work]
path = "/work"
"""


def loaded(folder: Path, text: str) -> Spec:
    path = folder / "spec.toml"
    path.write_text(text, encoding="utf-8")
    return load(path)


def refused(folder: Path, text: str) -> SpecError:
    tomllib.loads(text)  # what is refused is the meaning, not the syntax
    with pytest.raises(SpecError) as caught:
        loaded(folder, text)
    assert caught.value.exit_code == 2
    assert str(folder / "spec.toml") in str(caught.value)
    return caught.value


@pytest.mark.parametrize(("before", "after", "where"), [
    ('path = "/lake"', 'path = "/data%20of/lake"', "target.lake.path: has %20 in it"),
    ('path = "/work"', 'path = "/w%2Fx"', "work.path: has %2F in it"),
])  # fmt: skip
def test_a_folder_that_delta_would_look_for_elsewhere_is_refused(tmp_path: Path, before: str, after: str, where: str) -> None:
    assert where in str(refused(tmp_path, WHOLE.replace(before, after)))
    assert loaded(tmp_path, WHOLE.replace(before, 'path = "/50% of it"')).tables


@pytest.mark.parametrize("name", ["a.b.c", 'public."a', ".", "public."])
def test_what_names_no_table_is_refused_by_its_key(tmp_path: Path, name: str) -> None:
    said = str(refused(tmp_path, WHOLE.replace('source = "public.follows"', f"source = '{name}'")))
    assert "table[0].source: " in said
    assert "names no table: write schema.table" in said


def test_two_tables_that_read_alike_are_two(tmp_path: Path) -> None:
    second = '[[table]]\nsource = \'"a.b".c\'\ntarget = "t2"\nkey = ["id"]\n[flag]'
    spec = loaded(tmp_path, WHOLE.replace('source = "public.follows"', "source = 'a.\"b.c\"'").replace("[flag]", second))
    assert [table.source_name for table in spec.tables] == [("a", "b.c"), ("a.b", "c")]
    assert spec.table('"a.b".c').target == "t2"
    same = second.replace('"a.b".c', 'a."b.c"')
    assert "stands in two" in str(refused(tmp_path, WHOLE.replace("public.follows", 'a.\\"b.c\\"').replace("[flag]", same)))


def test_a_whole_spec(tmp_path: Path) -> None:
    spec = loaded(tmp_path, WHOLE)
    table = spec.tables[0]
    assert (spec.name, spec.slot, spec.work) == ("follows", "changeover_follows", Path("/work"))
    assert list(spec.targets) == ["store", "lake"]
    assert spec.ledger.key == "target.store.dsn"
    assert (table.source_name, table.target_name) == (("public", "follows"), ("public", "associations"))
    assert (table.drop, table.where, table.function) == (("secret",), "deleted_at IS NULL", "my_app.migration:reshape")
    assert table.checks[0].name == "count"
    assert spec.flag is not None
    assert spec.flag.context is None
    assert spec.table("follows") is spec.table("public.follows") is spec.table("associations") is table
    with pytest.raises(SpecError, match="no table is named nothing"):
        spec.table("nothing")


UNKNOWN = [
    ("name =", 'nam = "x"\nname =', "nam", "did you mean name?"),
    ('capture = "slot"', 'captur = "slot"', "source.captur", "did you mean capture?"),
    ('kind = "delta"', 'kind = "delta"\ndsn = "env:X"', "target.lake.dsn", "known here: kind, path"),
    ("drop =", "dropp =", "table[0].dropp", "did you mean drop?"),
    ("function =", "func =", "table[0].transform.func", "did you mean function?"),
    ("[flag]", "[flag]\npercent = 1", "flag.percent", "known here"),
    ("[work]", '[work]\nzone = "x"', "work.zone", "known here: path, mode"),
    ("[[table.check]]", '[[table.check]]\nsql = "x"', "table[0].check[0].sql", "known here"),
]


@pytest.mark.parametrize(("old", "new", "where", "hint"), UNKNOWN)
def test_an_unknown_key_is_named(tmp_path: Path, old: str, new: str, where: str, hint: str) -> None:
    error = refused(tmp_path, WHOLE.replace(old, new, 1))
    assert error.where == where
    assert hint in error.problem


MISSING = [
    ('name = "follows"', "name"),
    ('dsn = "env:OLD_DSN"', "source.dsn"),
    ('kind = "postgres"', "target.store.kind"),
    ('dsn = "env:NEW_DSN"', "target.store.dsn"),
    ('path = "/lake"', "target.lake.path"),
    ('source = "public.follows"', "table[0].source"),
    ('target = "associations"', "table[0].target"),
    ('key = ["entity_a", "entity_b"]', "table[0].key"),
    ('key = "follows-store"', "flag.key"),
    ('path = "/work"', "work.path"),
    ('[work]\npath = "/work"', "work"),
    ('[source]\ndsn = "env:OLD_DSN"\ncapture = "slot"', "source"),
    ('name = "count"', "table[0].check[0].name"),
]


@pytest.mark.parametrize(("line", "where"), MISSING)
def test_a_missing_key_is_named(tmp_path: Path, line: str, where: str) -> None:
    assert refused(tmp_path, WHOLE.replace(line, "", 1)).where == where


WRONG = [
    ('name = "follows"', "name = 3", "name", "must be a string, not int"),
    ('name = "follows"', 'name = "Follows!"', "name", "lower-case"),
    ('name = "follows"', 'name = ""', "name", "is empty"),
    ('dsn = "env:OLD_DSN"', "dsn = true", "source.dsn", "must be a string, not bool"),
    ('dsn = "env:OLD_DSN"', 'dsn = "host"', "source.dsn", "is not a PostgreSQL DSN"),
    ("[flag]", '[application]\nroles = "app"\n[flag]', "application.roles", "must be a list of names"),
    ("[flag]", '[application]\nrole = ["app"]\n[flag]', "application.role", "did you mean roles?"),
    ('capture = "slot"', 'capture = "kafka"', "source.capture", "slot"),
    ('kind = "delta"', 'kind = "iceberg"', "target.lake.kind", '"postgres" and "delta"'),
    ('key = ["entity_a", "entity_b"]', 'key = "entity_a"', "table[0].key", "must be a list of names"),
    ('key = ["entity_a", "entity_b"]', "key = [1]", "table[0].key[0]", "must be a string, not int"),
    ('entity_a = "from_user"', "entity_a = 1", "table[0].columns.entity_a", "must be a string, not int"),
    ('entity_a = "from_user"', 'entity_a = ""', "table[0].columns.entity_a", "is empty"),
    ('where = "deleted_at IS NULL"', "where = 1", "table[0].where", "must be a string"),
    ("my_app.migration:reshape", "my_app.migration.reshape", "table[0].transform.function", "package.module:function"),
    ('key = "follows-store"\ntarget = "store"', 'key = "f"\ntarget = "lake"', "flag.target", "must be a PostgreSQL target"),
    ('key = "follows-store"\ntarget = "store"', 'key = "f"\ntarget = "other"', "flag.target", "the targets are store, lake"),
    ("[target.lake]", "[target.Lake]", "target.Lake", "lower-case"),
    ("[work]", '[ledger]\ndsn = "env:X"\n[work]', "ledger", "leave the section out"),
]


@pytest.mark.parametrize(("old", "new", "where", "problem"), WRONG)
def test_a_wrong_value_is_named(tmp_path: Path, old: str, new: str, where: str, problem: str) -> None:
    error = refused(tmp_path, WHOLE.replace(old, new, 1))
    assert error.where == where
    assert problem in error.problem


SECTIONS = [
    ("source", '[source]\ndsn = "env:OLD_DSN"\ncapture = "slot"', ""),
    ("work", '[work]\npath = "/work"', ""),
]


@pytest.mark.parametrize(("where", "section", "nothing"), SECTIONS)
def test_a_section_that_is_a_value(tmp_path: Path, where: str, section: str, nothing: str) -> None:
    error = refused(tmp_path, f"{where} = 1\n" + WHOLE.replace(section, nothing, 1))
    assert (error.where, error.problem) == (where, "must be a section")


NOT_CARRIED = [
    ("[source]", '[source]\nread_from = "env:REPLICA"', "source.read_from"),
    ("[target.lake]", '[target.second]\nkind = "postgres"\ndsn = "env:X"\n[target.lake]', "target"),
]


@pytest.mark.parametrize(("old", "new", "where"), NOT_CARRIED)
def test_what_this_version_does_not_carry_is_said(tmp_path: Path, old: str, new: str, where: str) -> None:
    error = refused(tmp_path, WHOLE.replace(old, new, 1))
    assert error.where == where
    assert "not carried by this version" in error.problem


@pytest.mark.parametrize("column", ["", "kind", "multi", "from user", "größe"])
def test_a_column_of_tenants_is_a_kind_of_context(tmp_path: Path, column: str) -> None:
    error = refused(tmp_path, WHOLE.replace("[flag]", f'[flag]\ncontext = "{column}"', 1))
    assert error.where == "flag.context"
    assert "LaunchDarkly has no kind of context by that name" in error.problem


def test_a_column_of_tenants_is_read(tmp_path: Path) -> None:
    path = tmp_path / "whole.toml"
    path.write_text(WHOLE.replace("[flag]", '[flag]\ncontext = "from_user"', 1))
    flag = load(path).flag
    assert flag is not None
    assert flag.context == "from_user"


def test_a_password_in_the_file_is_refused_and_not_repeated(tmp_path: Path) -> None:
    for dsn in ("host=h password=sesame", "postgresql://me:sesame@h/db"):
        error = refused(tmp_path, WHOLE.replace("env:OLD_DSN", dsn))
        assert "password in the file" in error.problem
        assert "sesame" not in str(error)
    bad = refused(tmp_path, WHOLE.replace("env:OLD_DSN", "host=h password='sesame"))
    assert "sesame" not in str(bad)


def test_a_tenant_is_named_by_a_column(tmp_path: Path) -> None:
    named = loaded(tmp_path, WHOLE.replace("[flag]", '[flag]\ncontext = "from_user"'))
    assert named.flag is not None
    assert named.flag.context == "from_user"
    assert named.digest != loaded(tmp_path, WHOLE).digest
    wrong = refused(tmp_path, WHOLE.replace("[flag]", '[flag]\ncontext = ["from_user"]'))
    assert (wrong.where, wrong.problem) == ("flag.context", "must be a string, not list")


def test_tenants_may_be_made_private_midway_by_a_secret_that_is_not_in_the_file(tmp_path: Path) -> None:
    private = loaded(tmp_path, WHOLE.replace("[flag]", '[flag]\nprivate = "env:TENANT_SECRET"'))
    assert private.flag is not None
    assert private.flag.private == "env:TENANT_SECRET"
    assert private.digest == loaded(tmp_path, WHOLE).digest
    for given in ("sesame", "env:", "env:not a name"):
        error = refused(tmp_path, WHOLE.replace("[flag]", f'[flag]\nprivate = "{given}"'))
        assert error.where == "flag.private"
        assert "names no environment variable" in error.problem
        assert "sesame" not in str(error)


def test_a_missing_secret_names_key_and_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = loaded(tmp_path, WHOLE)
    monkeypatch.delenv("OLD_DSN", raising=False)
    with pytest.raises(SecretMissing, match=r"source\.dsn refers to the environment variable OLD_DSN, which is not set"):
        spec.source.dsn.resolve()
    monkeypatch.setenv("OLD_DSN", "")
    with pytest.raises(SecretMissing):
        spec.source.dsn.resolve()
    monkeypatch.setenv("OLD_DSN", "host=h password=sesame")
    assert spec.source.dsn.resolve() == "host=h password=sesame"
    assert "sesame" not in repr(spec)


def test_no_file_and_half_a_file(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="can't be read"):
        load(tmp_path / "none.toml")
    with pytest.raises(SpecError, match=r"not valid TOML.*line"):
        loaded(tmp_path, WHOLE.replace('"follows"', '"foll', 1))
    (tmp_path / "bytes.toml").write_bytes(b'name = "\xff"')
    with pytest.raises(SpecError, match="not valid TOML"):
        load(tmp_path / "bytes.toml")


def test_a_lake_alone_needs_a_ledger(tmp_path: Path) -> None:
    alone = WHOLE.replace('[target.store]\nkind = "postgres"\ndsn = "env:NEW_DSN"\n', "")
    alone = alone.replace('[flag]\nkey = "follows-store"\ntarget = "store"\n', "")
    assert refused(tmp_path, alone).where == "ledger.dsn"
    assert loaded(tmp_path, alone + '[ledger]\ndsn = "env:LEDGER"\n').ledger.reference == "env:LEDGER"


def test_two_tables_of_one_name(tmp_path: Path) -> None:
    again = '[[table]]\nsource = "{}"\ntarget = "{}"\nkey = ["id"]\n'
    for source, target in (("public.follows", "other"), ("other", "associations")):
        error = refused(tmp_path, WHOLE.replace("[flag]", again.format(source, target) + "[flag]"))
        assert "stands in two [[table]] sections" in error.problem


def test_one_table_in_two_spellings_is_one_table(tmp_path: Path) -> None:
    again = '[[table]]\nsource = "{}"\ntarget = "{}"\nkey = ["id"]\n'
    for source, target in (("follows", "other"), ("other", "public.associations"), ("other", "archive.associations")):
        error = refused(tmp_path, WHOLE.replace("[flag]", again.format(source, target) + "[flag]"))
        assert "two [[table]] sections" in error.problem


def test_the_hash_is_that_of_the_meaning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = loaded(tmp_path, WHOLE).digest
    monkeypatch.setenv("OLD_DSN", "host=elsewhere")
    assert loaded(tmp_path, WHOLE + "\n# a comment\n").digest == digest
    assert (
        loaded(tmp_path, WHOLE.replace('capture = "slot"\n', "").replace("[source]\n", '[source]\ncapture = "slot"\n')).digest
        == digest
    )
    checked = '[[table.check]]\nname = "count"\nsource = "SELECT 1"\ntarget = "SELECT 2"\n[flag]'
    assert loaded(tmp_path, WHOLE.replace("[flag]", checked)).digest == digest, "a check may be corrected midway"
    changed: list[Any] = [
        loaded(tmp_path, WHOLE.replace(old, new)).digest
        for old, new in (('"from_user"', '"to_user"'), ("/work", "/elsewhere"), ("OLD_DSN", "OTHER_DSN"), ("secret", "other"))
    ]
    assert len({digest, *changed}) == 5


def test_paths_are_relative_to_the_spec_whoever_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (
        WHOLE.replace('"/work"', '"work"')
        .replace('"/lake"', '"../lake"')
        .replace('target = "store"', 'target = "store"\nfile = "f.json"')
    )
    first = loaded(tmp_path, text)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert load("../spec.toml").work == tmp_path / "elsewhere/../work"
    assert load("../spec.toml").work.resolve() == first.work == tmp_path / "work"
    assert first.targets["lake"].folder.resolve() == tmp_path.parent / "lake"
    assert first.flag is not None
    assert first.flag.file == str(tmp_path / "f.json")
    assert loaded(tmp_path, WHOLE).work == Path("/work")


@pytest.mark.parametrize(("given", "mode"), [("", 0o700), ('mode = "0750"', 0o750), ('mode = "777"', 0o777)])
def test_who_may_read_the_work_folder_is_no_part_of_the_digest(tmp_path: Path, given: str, mode: int) -> None:
    spec = loaded(tmp_path, f"{WHOLE}{given}")
    assert spec.mode == mode
    assert spec.digest == loaded(tmp_path, WHOLE).digest


@pytest.mark.parametrize("given", ['"0600"', '"0855"', '"rwx"', "448", '""'])
def test_rights_that_are_none_are_refused(tmp_path: Path, given: str) -> None:
    assert refused(tmp_path, f"{WHOLE}mode = {given}").where == "work.mode"


def test_what_is_sensitive_may_be_named_midway(tmp_path: Path) -> None:
    spec = loaded(tmp_path, WHOLE.replace('drop = ["secret"]', 'drop = ["secret"]\nsensitive = ["email"]'))
    assert spec.tables[0].sensitive == ("email",)
    assert spec.digest == loaded(tmp_path, WHOLE).digest


def test_the_applications_roles_may_be_told_later(tmp_path: Path) -> None:
    spec = loaded(tmp_path, WHOLE.replace("[flag]", '[application]\nroles = ["app", "Batch jobs", "app"]\n[flag]'))
    assert spec.roles == ("app", "Batch jobs")
    assert spec.digest == loaded(tmp_path, WHOLE).digest
    assert loaded(tmp_path, WHOLE).roles == ()


SCHEMA = Path(__file__).parents[2] / "src/changeover/spec.schema.json"
GENERATE = (
    "import json; from changeover.spec.document import json_schema; "
    "print(json.dumps(json_schema(), indent=2))  # > src/changeover/spec.schema.json"
)


def test_the_schema_that_is_checked_in_is_that_of_the_models() -> None:
    assert SCHEMA.read_text(encoding="utf-8") == json.dumps(json_schema(), indent=2) + "\n", GENERATE


EMPTY = [
    ('dsn = "env:OLD_DSN"', "source.dsn", "is missing: a direct connection, not a transaction pooler"),
    ('kind = "postgres"', "target.store.kind", 'is missing: "postgres" or "delta"'),
    ('key = ["entity_a", "entity_b"]', "table[0].key", "is missing: the target's key columns"),
]


@pytest.mark.parametrize(("line", "where", "problem"), EMPTY)
def test_what_a_missing_key_is_for_is_said(tmp_path: Path, line: str, where: str, problem: str) -> None:
    error = refused(tmp_path, WHOLE.replace(line, "", 1))
    assert (error.where, error.problem) == (where, problem)


ODD = [
    ('kind = "delta"', "kind = 3", "target.lake.kind", "must be a string, not int"),
    ('kind = "delta"', 'kind = ""', "target.lake.kind", 'is "": known are "postgres" and "delta"'),
    ("drop =", "drop = [''] #", "table[0].drop[0]", "is empty"),
    ("[table.transform]", "columns.x = {}\n[table.transform]", "table[0].columns.columns", "must be a string, not dict"),
    ('name = "follows"', 'name = "a\\n"', "name", "must be lower-case letters"),
    ('name = "count"', "name = []", "table[0].check[0].name", "must be a string, not list"),
    ("[[table.check]]", "[table.check]", "table[0].check", "must be [[table.check]] sections"),
    ("[[table]]", "[table]", "table", "needs at least one [[table]] section"),
]


@pytest.mark.parametrize(("old", "new", "where", "problem"), ODD)
def test_an_odd_value_is_named_where_it_stands(tmp_path: Path, old: str, new: str, where: str, problem: str) -> None:
    text = WHOLE.replace(old, new, 1)
    if new == "[table]":
        text = text.replace("[[table.check]]", "[table.check]")
    error = refused(tmp_path, text)
    assert error.where == where
    assert problem in error.problem


def test_nothing_of_a_dsn_stands_in_an_error_of_its_section(tmp_path: Path) -> None:
    text = WHOLE.replace('dsn = "env:OLD_DSN"', 'dsn = ["host=h password=sesame"]')
    error = refused(tmp_path, text)
    chain = [error, error.__cause__, error.__context__]
    assert (error.where, error.problem) == ("source.dsn", "must be a string, not list")
    assert "sesame" not in " ".join(map(str, chain))
