"""Objections: why a relation of a PostgreSQL store can't be a target, each a sentence that says what to do.

Replay writes rows key by key and by `ON CONFLICT (key)`. So the key needs a unique index of its own, checked at once, under the
columns' own collations. Nothing else may refuse a row because of another one, or act by itself when rows are written. It looks
only.
"""

from __future__ import annotations

from collections.abc import Sequence

from changeover.session import Connection

PLACE = """
SELECT format('there is no schema %%s: CREATE SCHEMA %%I', %(schema)s::text, %(schema)s::text)
WHERE NOT EXISTS (SELECT FROM pg_namespace WHERE nspname = %(schema)s)
UNION ALL
SELECT format('%%s is a %%s, and rows are written to tables alone: name another target', %(name)s::text, CASE c.relkind
    WHEN 'v' THEN 'view' WHEN 'm' THEN 'materialized view' WHEN 'f' THEN 'foreign table' WHEN 'S' THEN 'sequence'
    WHEN 'c' THEN 'composite type' ELSE 'relation of kind ' || c.relkind::text END)
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE (n.nspname, c.relname) = (%(schema)s, %(table)s) AND c.relkind NOT IN ('r', 'p')
UNION ALL
SELECT format('%%s is the name of a type, so no table can be made under it: name another target', %(name)s::text)
FROM pg_type t JOIN pg_namespace n ON n.oid = t.typnamespace
WHERE (n.nspname, t.typname) = (%(schema)s, %(table)s) AND t.typrelid = 0 AND t.typcategory <> 'A'
UNION ALL
SELECT format('the role %%s may make no temporary table, in which batches arrive: GRANT TEMPORARY ON DATABASE %%I TO %%I',
    current_user, current_database(), current_user)
WHERE NOT has_database_privilege(current_database(), 'TEMPORARY')
"""

TABLE = """
WITH parts AS (SELECT %(oid)s::oid AS oid UNION SELECT relid FROM pg_partition_tree(%(oid)s::oid::regclass)),
indexes AS (
    SELECT i.*, i.indisunique AND i.indimmediate AND i.indisvalid AND i.indpred IS NULL AND i.indexprs IS NULL
        AND %(key)s::text[] = ARRAY(SELECT a.attname::text COLLATE "C" FROM pg_attribute a WHERE a.attrelid = i.indrelid
            AND a.attnum = ANY ((i.indkey::smallint[])[:i.indnkeyatts - 1]) ORDER BY 1)
        AND NOT EXISTS (SELECT FROM generate_series(0, i.indnkeyatts - 1) AS place
            JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[place]
            WHERE a.attcollation <> i.indcollation[place]) AS is_key
    FROM pg_index i WHERE i.indrelid IN (SELECT oid FROM parts)
)
SELECT format('%%s has no primary key or unique constraint on (%%s) that is checked at once and for every row: ALTER TABLE %%I.%%I'
    ' ADD PRIMARY KEY', %(name)s::text, array_to_string(%(key)s::text[], ', '), %(schema)s::text, %(table)s::text)
WHERE NOT EXISTS (SELECT FROM indexes WHERE is_key AND indrelid = %(oid)s)
UNION ALL
SELECT format('%%s.%%s is of the key and may be NULL, and two rows of a NULL key would both stay: ALTER TABLE %%I.%%I ALTER %%I'
    ' SET NOT NULL', %(name)s::text, a.attname, %(schema)s::text, %(table)s::text, a.attname)
FROM pg_attribute a WHERE a.attrelid = %(oid)s AND a.attname::text = ANY (%(key)s::text[]) AND NOT a.attnotnull
    AND EXISTS (SELECT FROM indexes WHERE is_key AND indrelid = %(oid)s)
    AND NOT EXISTS (SELECT FROM indexes i WHERE is_key AND indrelid = %(oid)s AND to_jsonb(i) @> '{"indnullsnotdistinct": true}')
UNION ALL
SELECT format('%%s has the %%s %%s beside its key: per-key order breaks value swaps, so build it after the catch-up',
    %(name)s::text, CASE WHEN i.indisexclusion THEN 'exclusion constraint' WHEN i.indexprs IS NOT NULL
        THEN 'unique index over an expression' ELSE 'unique index' END, i.indexrelid::regclass)
FROM indexes i WHERE NOT i.is_key AND (i.indisunique OR i.indisexclusion)
    AND NOT EXISTS (SELECT FROM pg_inherits h JOIN indexes p ON p.indexrelid = h.inhparent WHERE h.inhrelid = i.indexrelid)
UNION ALL
SELECT format('%%s has the trigger %%s: enable it after the catch-up', t.tgrelid::regclass, t.tgname)
FROM pg_trigger t WHERE t.tgrelid IN (SELECT oid FROM parts) AND NOT t.tgisinternal AND t.tgenabled <> 'D' AND t.tgparentid = 0
UNION ALL
SELECT format('%%s has the rule %%s, by which writes do something else: ALTER TABLE %%s DISABLE RULE %%I until after the catch-up',
    r.ev_class::regclass, r.rulename, r.ev_class::regclass, r.rulename)
FROM pg_rewrite r WHERE r.ev_class IN (SELECT oid FROM parts) AND r.ev_enabled <> 'D'
UNION ALL
SELECT format('%%s has the foreign key %%s: add it after the catch-up', c.conrelid::regclass, c.conname)
FROM pg_constraint c WHERE c.conrelid IN (SELECT oid FROM parts) AND c.contype = 'f' AND c.conparentid = 0
UNION ALL
SELECT format('%%s is referenced by the foreign key %%s of %%s: add it after the catch-up', c.confrelid::regclass, c.conname,
    c.conrelid::regclass)
FROM pg_constraint c WHERE c.confrelid IN (SELECT oid FROM parts) AND c.contype = 'f' AND c.conparentid = 0
    AND c.conrelid NOT IN (SELECT oid FROM parts)
UNION ALL
SELECT format('%%s.%%s is GENERATED ALWAYS AS IDENTITY outside the key, so no update can bring it: ALTER TABLE %%I.%%I ALTER %%I'
    ' SET GENERATED BY DEFAULT', %(name)s::text, a.attname, %(schema)s::text, %(table)s::text, a.attname)
FROM pg_attribute a WHERE a.attrelid = %(oid)s AND a.attidentity = 'a' AND NOT a.attname::text = ANY (%(key)s::text[])
UNION ALL
SELECT format('%%s is a partition of %%s, which takes no other rows than its own: name the whole table', %(name)s::text,
    pg_partition_root(c.oid)::text)
FROM pg_class c WHERE c.oid = %(oid)s AND c.relispartition
UNION ALL
SELECT format('%%s, a partition of %%s, is a foreign table: rows are written to tables alone', c.oid::regclass, %(name)s::text)
FROM pg_class c WHERE c.oid IN (SELECT oid FROM parts) AND c.relkind = 'f'
UNION ALL
SELECT format('%%s takes part in inheritance, so its key is not unique among all of its rows: name another target', %(name)s::text)
FROM pg_class c WHERE c.oid = %(oid)s AND NOT c.relispartition AND c.relkind <> 'p'
    AND EXISTS (SELECT FROM pg_inherits WHERE inhrelid = %(oid)s OR inhparent = %(oid)s)
"""
"""What is asked of a table that is there; a partition's own indexes, triggers and foreign keys count like the whole table's."""

REMARKS = """
SELECT format('%%s is unlogged: a crash of its server empties it, and verification alone would tell', %(name)s::text)
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE (n.nspname, c.relname) = (%(schema)s, %(table)s) AND c.relpersistence = 'u'
"""


def objections(connection: Connection, schema: str, name: str, key: Sequence[str]) -> list[str]:
    """Return what stands against a table as a target, or against making one of that name."""
    asked = {"schema": schema, "table": name, "name": f"{schema}.{name}", "key": sorted(key)}
    found = connection.execute(PLACE, asked).fetchall()
    row = connection.execute(
        "SELECT c.oid FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace"
        " WHERE (n.nspname, c.relname) = (%s, %s) AND c.relkind IN ('r', 'p')",
        [schema, name],
    ).fetchone()
    if row is not None:
        found += connection.execute(TABLE, {**asked, "oid": row[0]}).fetchall()
    return [reason for (reason,) in found]


def remarks(connection: Connection, schema: str, name: str) -> list[str]:
    """Return what a person should know of a target table, though it can be one."""
    asked = {"schema": schema, "table": name, "name": f"{schema}.{name}"}
    return [remark for (remark,) in connection.execute(REMARKS, asked).fetchall()]
