"""The matrix of rights as data: what our role may not do in a store, the one sentence of `check`, and the statement that gives it.

Each row has a table of its own in a schema of its own, in both stores; all rows are looked at in one check. `{table}`, `{schema}`,
`{sequence}`, `{database}`, `{role}` and `{owner}` are names as SQL writes them.
"""

from __future__ import annotations

from dataclasses import dataclass

from tests.hostile.midway import NEW, OLD


@dataclass(frozen=True)
class Right:
    """A right that is taken away; `check` says `what`, a colon, `grant`, and what stands behind it in `more`."""

    name: str
    store: str
    does: tuple[str, ...]
    what: str
    grant: str
    more: str = ""


def on_table(store: str, right: str, *does: str) -> Right:
    """Return the row of a right on a table, which is revoked unless it is said what is done."""
    does = does or (f"REVOKE {right} ON {{table}} FROM {{role}}",)
    name, grant = f"{right} on a table of the {store} store", f"GRANT {right} ON {{table}} TO {{role}}"
    return Right(name, store, does, f"the role {{role}} has no {right} on {{table}}", grant)


def on_database(store: str, right: str, what: str, whose: str = "{role}") -> Right:
    """Return the row of a right on a database."""
    does = (f"REVOKE {right} ON DATABASE {{database}} FROM {whose}",)
    name, grant = f"{right} on the {store} store", f"GRANT {right} ON DATABASE {{database}} TO {{role}}"
    return Right(name, store, does, f"the role {{role}} may {what}", grant)


def on_schema(store: str) -> Right:
    """Return the row of a schema that the role may not use."""
    does = ("REVOKE USAGE ON SCHEMA {schema} FROM {role}",)
    grant = "GRANT USAGE ON SCHEMA {schema} TO {role}"
    return Right(f"a schema of the {store} store", store, does, "the role {role} may not use the schema {plain schema}", grant)


def of_owner(store: str) -> Right:
    """Return the row of a table that another role owns."""
    what = "the role {role} does not own {table}, and has not the rights of {owner}, which does"
    return Right(
        f"an owner in the {store} store", store, ("ALTER TABLE {table} OWNER TO {owner}",), what, "GRANT {owner} TO {role}"
    )


def of_sequence(store: str) -> Right:
    """Return the row of a sequence that the role may read and not move."""
    does = (
        "CREATE SEQUENCE {sequence}", "GRANT SELECT ON SEQUENCE {sequence} TO {role}",
        "ALTER TABLE {table} ALTER n SET DEFAULT nextval('{sequence}')",
    )  # fmt: skip
    what = "the role {role} may not read and move the sequence {sequence}"
    return Right(f"a sequence of the {store} store", store, does, what, "GRANT SELECT, UPDATE ON SEQUENCE {sequence} TO {role}")


def hidden(store: str) -> Right:
    """Return the row of a table whose policies hide rows from its owner too."""
    does = ("ALTER TABLE {table} ENABLE ROW LEVEL SECURITY", "ALTER TABLE {table} FORCE ROW LEVEL SECURITY")
    return Right(
        f"rows of the {store} store", store, does,
        "{plain table} has row-level security that hides rows from the role {role}", "ALTER ROLE {role} BYPASSRLS",
        ", or make it a member of the table's owner, with NO FORCE ROW LEVEL SECURITY",
    )  # fmt: skip


PUBLICATION = "not create a publication or a schema"

COPYING = (
    Right("replication", OLD, ("ALTER ROLE {role} NOREPLICATION",), "the role {role} may not replicate",
          "ALTER ROLE {role} REPLICATION"),
    on_database(OLD, "CREATE", PUBLICATION),
    of_owner(OLD),
    on_schema(OLD),
    on_table(OLD, "SELECT"),
    on_table(OLD, "SELECT", "REVOKE ALL ON {table} FROM {role}", "GRANT SELECT (id), INSERT, UPDATE ON {table} TO {role}"),
    hidden(OLD),
    on_database(NEW, "CREATE", PUBLICATION),
    on_database(NEW, "TEMPORARY", "make no temporary table, in which batches arrive", "PUBLIC"),
    Right("the ledger's schema", NEW, ("CREATE SCHEMA changeover", "GRANT USAGE ON SCHEMA changeover TO {role}"),
          "the role {role} may not make anything in the schema changeover", "GRANT USAGE, CREATE ON SCHEMA changeover TO {role}"),
    Right("a table that is not there", NEW, ("DROP TABLE {table}", "REVOKE CREATE ON SCHEMA {schema} FROM {role}"),
          "the role {role} may not create a table in the schema {plain schema}",
          "GRANT USAGE, CREATE ON SCHEMA {schema} TO {role}"),
    on_schema(NEW),
    *(on_table(NEW, right) for right in ("SELECT", "INSERT", "UPDATE", "DELETE", "UPDATE, DELETE")),
    on_table(NEW, "INSERT", "REVOKE INSERT ON {table} FROM {role}", "GRANT INSERT (id, v) ON {table} TO {role}"),
    hidden(NEW),
)  # fmt: skip
"""What a copy asks for that nothing takes over from: the role owns the old tables, and may read and write the new ones."""

TAKING_OVER = (
    *(on_table(OLD, right) for right in ("INSERT", "UPDATE", "DELETE", "TRIGGER")),
    on_database(OLD, "TEMPORARY", "make no temporary table, in which batches arrive", "PUBLIC"),
    of_sequence(OLD),
    of_owner(NEW),
    *(on_table(NEW, right) for right in ("SELECT", "TRIGGER")),
    of_sequence(NEW),
)
"""What a hand-over asks for beside it: writes come back, either store has a fence, and sequences are taken along."""
