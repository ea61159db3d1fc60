"""The matrix as data: tables with hostile types, values and names, and what has to come of each.

A `Carried` cell is a table that must arrive as it is, through the snapshot and through the stream. A `Refused` cell is refused by
`check` in one sentence, before anything is made. A `Midway` cell is something that somebody does while a migration is under way.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Carried:
    """A table, its rows in the snapshot, and the writes that the stream brings; names as SQL writes them."""

    name: str
    columns: str
    rows: str
    writes: tuple[str, ...] = ()
    key: str = "id"
    target: str = ""
    """DDL of the columns of a table that is there in the new store; `prepare` makes it where there is none."""


@dataclass(frozen=True)
class Typed:
    """A column of the one table of all types: each value comes in the snapshot, by an insert and by an update."""

    name: str
    type: str
    values: tuple[str, ...]


def typed(name: str, column_type: str, *values: str) -> Typed:
    """Return a column; NULL is among every column's values."""
    return Typed(name, column_type, ("NULL", *values))


def table_of_types(columns: tuple[Typed, ...]) -> Carried:
    """Return the table of all types: a row for the first value of each, one for the second, and so on."""
    most = max(len(column.values) for column in columns)

    def rows(first_id: int) -> str:
        return ", ".join(
            "(" + ", ".join([str(first_id + row), *(c.values[row % len(c.values)] for c in columns)]) + ")" for row in range(most)
        )

    names = ", ".join(column.name for column in columns)
    return Carried(
        "types",
        ", ".join(["id integer PRIMARY KEY", *(f"{column.name} {column.type}" for column in columns)]),
        f"VALUES {rows(0)}",
        (
            f"INSERT INTO {{table}} VALUES {rows(100)}",
            # every row takes the values of another one
            f"UPDATE {{table}} t SET ({names}) = (SELECT {names} FROM {{table}} o WHERE o.id = 100 + (t.id + 1) % {most})"
            f" WHERE id < {most}",
            "DELETE FROM {table} WHERE id IN (1, 101)",
        ),
    )


def keyed(name: str, column_type: str, *values: str) -> Carried:
    """Return a cell for a type of the key: rows are inserted, changed, deleted and given another key."""
    first, second, *others = values
    rows = ", ".join(f"({value}, 'first')" for value in (first, second))
    return Carried(
        name,
        f"id {column_type} PRIMARY KEY, v text",
        f"VALUES {rows}",
        (
            f"UPDATE {{table}} SET v = 'changed' WHERE id = {first}",
            f"DELETE FROM {{table}} WHERE id = {second}",
            *(f"INSERT INTO {{table}} VALUES ({value}, 'later')" for value in others),
            f"UPDATE {{table}} SET id = {second}, v = NULL WHERE id = {first}",
        ),
    )


TYPES = (
    typed("v_boolean", "boolean", "true", "false"),
    typed("v_smallint", "smallint", "-32768", "32767"),
    typed("v_integer", "integer", "-2147483648", "2147483647"),
    typed("v_bigint", "bigint", "-9223372036854775808", "9223372036854775807"),
    typed("v_real", "real", "'NaN'", "'Infinity'", "'-Infinity'", "'-0'", "1.4e-45", "3.4028235e38", "0.1"),
    typed(
        "float8", "double precision", "'NaN'", "'Infinity'", "'-Infinity'", "'-0'", "5e-324", "1.7976931348623157e308",
        "0.1", "123456789012345.67",
    ),
    typed("v_numeric_sized", "numeric(38,10)", "9999999999999999999999999999.9999999999", "-0.0000000001", "1.5"),
    typed("v_numeric_wide", "numeric(60,20)", "1234567890123456789012345678901234567890.12345678901234567890", "0"),
    typed("v_numeric_free", "numeric", "1.50", "1.5", "1e-30", "1" + "0" * 60, "-0.000", "123456789012345678901234567890.000100"),
    typed(
        "text", "text", "''", "'NULL'", r"'\N'", r"E'\\.'", r"E'two\nlines\r\n\ttab'", "'\"q\" ''s'", "'Zoë ☂ \U0001d4b3'",
        "repeat('x', 9000)", "' pads '", r"E'\x01\x7f'",
    ),
    typed("v_varchar", "character varying(5)", "''", "'abcde'", "'ab   '"),
    typed("v_char", "character(4)", "''", "'a'", "'abcd'"),
    typed("v_bytea", "bytea", r"'\x'", r"'\x00ff5c0a0d22'", r"decode(repeat('00ff', 3000), 'hex')"),
    typed("v_date", "date", "'0001-01-01'", "'9999-12-31'", "'1582-10-10'", "'2024-02-29'"),
    typed(
        "v_timestamp", "timestamp", "'0001-01-01 00:00'", "'9999-12-31 23:59:59.999999'", "'1582-10-10 12:00'",
        "'2024-03-31 02:30'",
    ),
    typed(
        "timestamptz", "timestamptz", "'0001-01-02 00:00Z'", "'9999-12-30 23:59:59.999999Z'", "'1582-10-10 12:00Z'",
        "'1883-11-18 12:03:57.000001Z'",
    ),
    typed("v_timestamp_3", "timestamp(3)", "'2024-01-01 00:00:00.123'"),
    typed("v_time", "time", "'00:00'", "'24:00:00'", "'23:59:59.999999'"),
    typed("v_timetz", "timetz", "'00:00+15:59'", "'24:00:00-15:59'", "'12:00:00.000001+05:30'"),
    typed("v_interval", "interval", "'1 mon -1 day 00:00:01'", "'-178000000 years'", "'24:00:00'", "'1 day'", "'0'"),
    typed("v_uuid", "uuid", "'00000000-0000-0000-0000-000000000000'", "'ffffffff-ffff-ffff-ffff-ffffffffffff'"),
    typed("v_json", "json", """'{"b": 1,  "a": 1.0, "b": 2}'""", "'null'", """'"\\u0041"'"""),
    typed("v_jsonb", "jsonb", """'{"b": 1.0, "a": [1, null, "x"]}'""", "'null'", "'1.50'", "'12345678901234567890.1234567890'"),
    typed("v_inet", "inet", "'10.0.0.1/8'", "'::1'", "'192.168.0.1'"),
    typed("v_cidr", "cidr", "'10.0.0.0/8'", "'::/0'"),
    typed("v_macaddr", "macaddr", "'08:00:2b:01:02:03'"),
    typed("v_text_array", "text[]", "'{}'", """ARRAY['', NULL, 'NULL', 'a,b', 'q"x\\y', '{}', ' ']"""),
    typed("v_int_array", "integer[]", "'{}'", "'{1,NULL,-2147483648}'"),
    typed("v_numeric_array", "numeric(12,4)[]", "'{}'", "'{1.5000,NULL,-99999999.9999}'"),
    typed("v_float8_array", "double precision[]", "'{NaN,Infinity,-0,5e-324,NULL}'"),
    typed("v_timestamptz_array", "timestamptz[]", "ARRAY['2024-01-01 00:00:00.000001Z'::timestamptz, NULL]"),
    typed("v_jsonb_array", "jsonb[]", """ARRAY['{"a": 1}'::jsonb, NULL, '"x,y"']"""),
)  # fmt: skip
"""Every type that is carried, with the ends of its range and what is read wrongly most often."""

CARRIED = (
    table_of_types(TYPES),
    keyed("key_bigint", "bigint", "1", "-9223372036854775808", "9223372036854775807"),
    keyed("key_text", "text", "'a'", "''", "'A'", "'ä'", r"E'tab\t'", "'b '"),
    keyed("key_timestamptz", "timestamptz", "'2024-01-01 00:00:00.000001Z'", "'0001-01-02Z'", "'9999-12-30Z'"),
    Carried(
        "two_columns", "b text, id integer, v text, PRIMARY KEY (id, b)", "VALUES ('x', 1, 'v'), ('y', 1, NULL)",
        ("UPDATE {table} SET b = 'z' WHERE b = 'x'", "DELETE FROM {table} WHERE b = 'y'"), key="id, b",
    ),
    Carried("key_alone", "id integer PRIMARY KEY", "SELECT 1 WHERE false", ("INSERT INTO {table} VALUES (3)",)),
    Carried(
        "emptied", "id integer PRIMARY KEY, v text", "VALUES (1, 'v')",
        ("TRUNCATE {table}", "INSERT INTO {table} VALUES (2, 'w')"),
    ),
    Carried("empty", "id integer PRIMARY KEY, v text", "SELECT 1, 'v' WHERE false"),
    Carried(
        "empty_again", "id integer PRIMARY KEY, v text", "SELECT 1, 'v' WHERE false",
        ("INSERT INTO {table} VALUES (1, 'v'), (2, 'w')", "UPDATE {table} SET id = id + 10", "DELETE FROM {table}"),
    ),
    Carried("deleted", "id integer PRIMARY KEY, v text", "SELECT i, 'v' FROM generate_series(1, 50) i", ("DELETE FROM {table}",)),
    Carried(
        "unsent", "id integer PRIMARY KEY, v text, n integer", "SELECT 1, repeat('long', 9000), 1",
        (
            "ALTER TABLE {table} ALTER v SET STORAGE EXTERNAL", "UPDATE {table} SET v = repeat('large', 9000)",
            "UPDATE {table} SET n = 2",
        ),
    ),
    Carried(
        "generated", "id integer PRIMARY KEY, v text, twice text GENERATED ALWAYS AS (v || v) STORED", "VALUES (1, 'v')",
        ("UPDATE {table} SET v = 'w'",), target="id integer PRIMARY KEY, v text, twice text GENERATED ALWAYS AS (v || v) STORED",
    ),
    Carried(
        "another_table", "id integer PRIMARY KEY, v varchar(5), n integer", "VALUES (1, 'v', 2)", ("UPDATE {table} SET v = 'w'",),
        target="n integer, v text, id integer PRIMARY KEY",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class RefusedCell:
    """A table that `check` refuses: what is made on either side, as `{table}`, and the sentence."""

    name: str
    old: tuple[str, ...]
    sentence: str
    new: tuple[str, ...] = ()


PLAIN = "CREATE TABLE {table} (id integer PRIMARY KEY, v text)"


def narrowed(source: str, target: str) -> RefusedCell:
    """Return a cell whose column is there in the new store with a type that does not hold every value."""
    table = "CREATE TABLE {table} (id integer PRIMARY KEY, v TYPE)"
    sentence = "does not hold every value"
    return RefusedCell(f"{source} into {target}", (table.replace("TYPE", source),), sentence, (table.replace("TYPE", target),))


REFUSED = (
    RefusedCell("no key", ("CREATE TABLE {table} (id integer NOT NULL, v text)",), "has no primary key and no replica identity"),
    RefusedCell("a view", (PLAIN.replace("{table}", "base"), "CREATE VIEW {table} AS SELECT * FROM base"), "is a view"),
    RefusedCell("unlogged", (PLAIN.replace("TABLE", "UNLOGGED TABLE"),), "is not a permanent table"),
    RefusedCell("deferrable key", ("CREATE TABLE {table} (id integer PRIMARY KEY DEFERRABLE, v text)",), "is deferrable"),
    RefusedCell("identity of nothing", (PLAIN, "ALTER TABLE {table} REPLICA IDENTITY NOTHING"), "no replica identity"),
    RefusedCell("a type that is not proven", ("CREATE TABLE {table} (id integer PRIMARY KEY, v tsvector)",), "not proven exact"),
    RefusedCell("rows in the target", (PLAIN,), "has rows", (PLAIN, "INSERT INTO {table} VALUES (1, 'v')")),
    RefusedCell("no key in the target", (PLAIN,), "no primary key or unique", ("CREATE TABLE {table} (id integer, v text)",)),
    RefusedCell("a second unique rule", (PLAIN,), "unique", (PLAIN, "CREATE UNIQUE INDEX ON {table} (v)")),
    RefusedCell("a trigger on the target", (PLAIN,), "trigger", (
        PLAIN, "CREATE TRIGGER t BEFORE UPDATE ON {table} FOR EACH ROW EXECUTE FUNCTION suppress_redundant_updates_trigger()",
    )),
    *(narrowed(source, target) for source, target in (
        ("numeric(12,4)", "numeric(10,2)"), ("numeric", "numeric(38,10)"), ("numeric", "double precision"), ("bigint", "integer"),
        ("bigint", "double precision"), ("double precision", "real"), ("double precision", "numeric"), ("text", "varchar(5)"),
        ("varchar(6)", "varchar(5)"), ("character(4)", "character(3)"), ("timestamp", "date"), ("timestamp", "timestamp(3)"),
        ("timestamptz", "timestamptz(0)"), ("timestamptz", "timestamp"), ("interval", "interval(0)"), ("json", "jsonb"),
        ("inet", "cidr"), ("text[]", "varchar(5)[]"), ("numeric(12,4)[]", "numeric(12,2)[]"),
    )),
)  # fmt: skip
