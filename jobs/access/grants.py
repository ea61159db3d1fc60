"""Grants: which rights our role lacks in a store, each as a sentence and as the least statement that gives it.

Whatever is printed is missing, and once an administrator has run it nothing is. Where PostgreSQL asks for the owner of a table, our
role becomes a member of the owning role. No table ever changes its owner, which would take the application's own rights away.
It goes by the catalogue and by oids, so it has an answer for a schema that the role may not use. It looks only; runs on the driver.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import LiteralString

from changeover.session import Connection
from changeover.spec import SLOT, TRIGGER
from changeover.stores.tables.sequences import sequences

READ = ("SELECT",)
WRITE = ("SELECT", "INSERT", "UPDATE", "DELETE")
REFUSE = (*WRITE, "TRIGGER")
"""What copying from a table asks for, writing to it, and refusing writes to it at a fence."""


@dataclass(frozen=True)
class Lack:
    """What a role can't do, and the statement by which it can."""

    what: str
    grant: str

    def __str__(self) -> str:
        return f"{self.what}: {self.grant}"


SERVER: dict[str | None, LiteralString] = {
    SLOT: """
SELECT format('the role %%s may not replicate', current_user), format('ALTER ROLE %%I REPLICATION', current_user)
WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = current_user AND (rolreplication OR rolsuper))
UNION ALL
""",
    TRIGGER: """
SELECT format('the role %%s may not run pg_control_system, which tells one server from another', current_user),
    format('GRANT EXECUTE ON FUNCTION pg_control_system TO %%I', current_user)
WHERE NOT has_function_privilege('pg_control_system()', 'EXECUTE')
UNION ALL
""",
    None: "",
}
"""What each way to capture asks of the role; nothing is captured where it is None."""

OURS: LiteralString = """
SELECT format('the role %%s may not create a publication or a schema', current_user),
    format('GRANT CREATE ON DATABASE %%I TO %%I', current_database(), current_user)
WHERE NOT has_database_privilege(current_database(), 'CREATE')
UNION ALL SELECT format('the role %%s may not make anything in the schema changeover', current_user),
    format('GRANT USAGE, CREATE ON SCHEMA changeover TO %%I', current_user)
FROM pg_namespace WHERE nspname = 'changeover' AND NOT (has_schema_privilege(oid, 'USAGE') AND has_schema_privilege(oid, 'CREATE'))
"""

BATCHES: LiteralString = """
SELECT format('the role %%s may make no temporary table, in which batches arrive', current_user),
    format('GRANT TEMPORARY ON DATABASE %%I TO %%I', current_database(), current_user)
WHERE NOT has_database_privilege(current_database(), 'TEMPORARY')
"""

SCHEMA = """
SELECT format('the role %%s may not create a table in the schema %%s', current_user, nspname),
    format('GRANT USAGE, CREATE ON SCHEMA %%I TO %%I', nspname, current_user)
FROM pg_namespace WHERE nspname = %s AND NOT (has_schema_privilege(oid, 'USAGE') AND has_schema_privilege(oid, 'CREATE'))
"""

RELATION = "SELECT c.oid FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = %s AND c.relname = %s"

OWNERS = """
SELECT DISTINCT ON (r.rolname) c.oid::regclass::text, r.rolname, quote_ident(r.rolname), r.rolsuper,
    EXISTS (SELECT FROM pg_auth_members m WHERE m.roleid = r.oid AND m.member = me.oid), me.rolname, quote_ident(me.rolname),
    me.rolinherit
FROM pg_class c JOIN pg_roles r ON r.oid = c.relowner JOIN pg_roles me ON me.rolname = current_user
WHERE c.oid IN (SELECT unnest(%(oids)s::oid[]) UNION SELECT t.relid::oid FROM unnest(%(oids)s::oid[]) AS o (oid),
        pg_partition_tree(o.oid) AS t)
    AND NOT pg_has_role(c.relowner, 'USAGE')
ORDER BY r.rolname, c.oid
"""
"""Owners of tables, of their partitions or of sequences whose rights the role has not."""

RIGHTS = """
SELECT format('the role %%s has no %%s on %%s', current_user, p.list, c.oid::regclass),
    format('GRANT %%s ON %%I.%%I TO %%I', p.list, n.nspname, c.relname, current_user)
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace CROSS JOIN LATERAL (
    SELECT string_agg(name, ', ' ORDER BY place) AS list FROM unnest(%(rights)s::text[]) WITH ORDINALITY AS r (name, place)
    WHERE NOT has_table_privilege(c.oid, name) AND NOT (%(owning)s AND has_table_privilege(c.relowner, c.oid, name))) p
WHERE c.oid = %(oid)s AND p.list IS NOT NULL
UNION ALL SELECT format('the role %%s may not use the schema %%s', current_user, n.nspname),
    format('GRANT USAGE ON SCHEMA %%I TO %%I', n.nspname, current_user)
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = %(oid)s AND NOT has_schema_privilege(n.oid, 'USAGE')
    AND NOT (%(owning)s AND has_schema_privilege(c.relowner, n.oid, 'USAGE'))
"""
"""Rights on a table and its schema; one that comes with the membership that is asked for is not asked for again."""

DRAWING = """
SELECT s.oid, NOT (has_sequence_privilege(s.oid, 'SELECT') AND has_sequence_privilege(s.oid, 'UPDATE'))
        AND NOT (has_sequence_privilege(c.relowner, s.oid, 'SELECT') AND has_sequence_privilege(c.relowner, s.oid, 'UPDATE')),
    format('the role %%s may not read and move the sequence %%s', current_user, s.oid::regclass),
    format('GRANT SELECT, UPDATE ON SEQUENCE %%I.%%I TO %%I', n.nspname, s.relname, current_user)
FROM pg_class s JOIN pg_namespace n ON n.oid = s.relnamespace JOIN pg_class c ON c.oid = %(table)s
WHERE s.oid = %(sequence)s::regclass
"""
"""A sequence, and whether it can't be moved, with the rights of the table's owner either."""


def of_server(connection: Connection, capture: str | None = None) -> list[Lack]:
    """Return what the role lacks of its server and database.

    Args:
        connection: A session with the store.
        capture: How it is to capture, `slot` or `trigger`; None where it is not to.

    Returns:
        What is missing, each with the statement that grants it.
    """
    return [Lack(*row) for row in connection.execute(SERVER[capture] + OURS, {}).fetchall()]


def of_batches(connection: Connection) -> list[Lack]:
    """Return what the role lacks to write rows to its database in batches.

    Args:
        connection: A session with the store.

    Returns:
        What is missing, each with the statement that grants it.
    """
    return [Lack(*row) for row in connection.execute(BATCHES, {}).fetchall()]


def of_schema(connection: Connection, schema: str) -> list[Lack]:
    """Return what the role lacks to create a table in a schema; nothing of one that is not there.

    Args:
        connection: A session with the store.
        schema: The table's schema.

    Returns:
        What is missing, each with the statement that grants it; nothing of a schema that is not
        there.
    """
    return [Lack(*row) for row in connection.execute(SCHEMA, [schema]).fetchall()]


def of_table(connection: Connection, schema: str, name: str, rights: Sequence[str], *, owning: bool) -> list[Lack]:
    """Return which rights on a table the role lacks.

    Args:
        connection: A session with the store.
        schema: The table's schema.
        name: The table's name.
        rights: The rights that are asked for.
        owning: Whether the owner's are asked for too.

    Returns:
        What is missing, each with the statement that grants it; nothing without such a table.
    """
    row = connection.execute(RELATION, [schema, name]).fetchone()
    if row is None:
        return []
    missing = of_owners(connection, row) if owning else []
    asked = {"oid": row[0], "rights": list(rights), "owning": owning}
    return missing + [Lack(*one) for one in connection.execute(RIGHTS, asked).fetchall()]


def of_sequences(connection: Connection, schema: str, name: str, *, owning: bool) -> list[Lack]:
    """Return which rights the role lacks on the sequences that a table draws from.

    Args:
        connection: A session with the store.
        schema: The table's schema.
        name: The table's name.
        owning: Whether it is to lock them as their owner; else only to move them.

    Returns:
        What is missing, each with the statement that grants it.
    """
    row = connection.execute(RELATION, [schema, name]).fetchone()
    if row is None or not usable(connection, schema):
        return []
    missing = []
    for one in sequences(connection, schema, name):
        asked = {"table": row[0], "sequence": one.identifier.as_string(connection)}
        rows = connection.execute(DRAWING, asked).fetchall()
        missing += of_owners(connection, [oid for oid, *_ in rows]) if owning else []
        missing += [Lack(*lack) for _, lacks, *lack in rows if lacks and not owning]
    return missing


def of_owners(connection: Connection, oids: Sequence[int]) -> list[Lack]:
    """Return what makes the role a member of the roles that own some relations, with their rights.

    Args:
        connection: A session with the store.
        oids: The relations' oids.

    Returns:
        What is missing, each with the statement that grants it.
    """
    rows = connection.execute(OWNERS, {"oids": list(oids)}).fetchall()
    return [
        Lack(f"the role {me} does not own {relation}, and has not the rights of {owner}, which does{DANGER * superuser}", grant)
        for relation, owner, quoted, superuser, direct, me, my, inherits in rows
        for grant in _joining(connection, quoted, my, direct, inherits)
    ]


DANGER = " and is a superuser: better give it an owner of its own first"


def _joining(connection: Connection, owner: str, role: str, direct: bool, inherits: bool) -> list[str]:
    """Return the statements that give a role another one's rights: from PostgreSQL 16 on each membership inherits or not."""
    if connection.info.server_version >= 160000:
        return [f"GRANT {owner} TO {role}{' WITH INHERIT TRUE' if direct or not inherits else ''}"]
    return [*([] if direct else [f"GRANT {owner} TO {role}"]), *([] if inherits else [f"ALTER ROLE {role} INHERIT"])]


def usable(connection: Connection, schema: str) -> bool:
    """Return whether the role may look names up in a schema.

    Args:
        connection: A session with the store.
        schema: The table's schema.

    Returns:
        Whether it may; a schema that is not there stands in nobody's way.
    """
    query = "SELECT coalesce(bool_and(has_schema_privilege(oid, 'USAGE')), true) FROM pg_namespace WHERE nspname = %s"
    row = connection.execute(query, [schema]).fetchone()
    return bool(row and row[0])


def readable(connection: Connection, schema: str, name: str) -> bool:
    """Return whether the role may read a table, if it is there.

    Args:
        connection: A session with the store.
        schema: The table's schema.
        name: The table's name.

    Returns:
        Whether it may; a table that is not there stands in nobody's way.
    """
    return not of_table(connection, schema, name, READ, owning=False)
