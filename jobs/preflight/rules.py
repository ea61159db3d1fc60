"""The rules of the preflight: whether a plan is safe, and why not; it touches nothing.

Each rule is one query or one line whose answer is a sentence, so that `check` prints all reasons at
once. The rules are those of capture, mostly of PostgreSQL's logical decoding, and of what this
version carries. One example: a table without replica identity makes the application's own UPDATE
and DELETE fail once a publication holds it.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field

from psycopg import sql

from changeover import session
from changeover.errors import RowsHidden, SpecError
from changeover.jobs.access import connections, grants, holders, privileges
from changeover.jobs.access.grants import Lack
from changeover.jobs.ledger.ledger import Ledger
from changeover.jobs.preflight import charsets, keys, likeness
from changeover.jobs.preflight.narrowing import narrower
from changeover.jobs.source.catalog import SourceTable, source_table
from changeover.jobs.source.generated import require_not_asked_for
from changeover.jobs.transform import masking
from changeover.jobs.transform.derivation import WORDS, derivations, owned
from changeover.names import NAME_BYTES, qualified, reserved
from changeover.session import Connection, application_name, connect, one_row, server_name
from changeover.spec import IDENTIFIER, SLOT, TRIGGER, Spec, Table
from changeover.stores import open_store
from changeover.stores.base.interface import Store
from changeover.stores.base.pgtypes import source_type
from changeover.stores.postgres.store import PostgresStore

OLD = "the old store"


@dataclass
class Preflight:
    """What the preflight found: reasons against the plan, the tables, the statements that grant what a role needs, and the cost."""

    reasons: list[str] = field(default_factory=list)
    tables: dict[str, SourceTable] = field(default_factory=dict)
    grants: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def note(self, remark: str) -> None:
        """Note something once.

        Args:
            remark: What a person should know, as a sentence.
        """
        if remark not in self.notes:
            self.notes.append(remark)

    def lack(self, rights: Sequence[Lack], where: str = "") -> None:
        """Refuse for want of rights, with the statements that give them; `where` is the store, the old one is not named.

        Args:
            rights: The rights that are missing.
            where: The store's name; empty for the old one.
        """
        for one in rights:
            statement = f"{one.grant}  -- in {where}" if where else one.grant
            if statement not in self.grants:
                self.grants.append(statement)
                self.reasons.append(f"{where}: {one}" if where else str(one))


CAPTURE_RULES = {
    SLOT: """
SELECT format('wal_level is %%s: set wal_level = logical and restart the server%%s', current_setting('wal_level'), %(else)s::text)
WHERE current_setting('wal_level') <> 'logical'
UNION ALL SELECT format('all %%s replication slots are in use: raise max_replication_slots',
    current_setting('max_replication_slots'))
WHERE (SELECT count(*) FROM pg_replication_slots WHERE slot_name <> %(slot)s) >= current_setting('max_replication_slots')::int
""",
    TRIGGER: "SELECT NULL WHERE false",
}
"""What each way to capture asks of the server."""

TABLE_RULES = """
SELECT format('%%s is a %%s: this version moves tables alone', %(name)s::text, CASE c.relkind
    WHEN 'v' THEN 'view' WHEN 'm' THEN 'materialized view' WHEN 'f' THEN 'foreign table'
    ELSE 'relation of kind ' || c.relkind::text END)
FROM pg_class c WHERE c.oid = %(oid)s AND c.relkind NOT IN ('r', 'p')
UNION ALL SELECT format('%%s is not a permanent table', %(name)s::text)
FROM pg_class c WHERE c.oid = %(oid)s AND c.relpersistence <> 'p'
UNION ALL SELECT format('%%s takes part in inheritance, which this version does not carry', %(name)s::text)
FROM pg_class c WHERE c.oid = %(oid)s AND NOT c.relispartition AND c.relkind <> 'p'
    AND EXISTS (SELECT FROM pg_inherits WHERE inhrelid = %(oid)s OR inhparent = %(oid)s)
UNION ALL SELECT format('%%s is a partition of %%s: name the whole table', %(name)s::text, pg_partition_root(c.oid)::text)
FROM pg_class c WHERE c.oid = %(oid)s AND c.relispartition
UNION ALL SELECT format('%%s, a partition of %%s, is %%s: this version moves permanent tables alone', c.oid::regclass,
    %(name)s::text, CASE c.relkind WHEN 'f' THEN 'a foreign table' ELSE 'not a permanent table' END)
FROM pg_partition_tree(%(oid)s::oid::regclass) t JOIN pg_class c ON c.oid = t.relid
WHERE t.level > 0 AND (c.relkind NOT IN ('r', 'p') OR c.relpersistence <> 'p')
UNION ALL SELECT format('%%s, a partition of %%s, has the replica identity (%%s) and not (%%s): ALTER TABLE %%s REPLICA IDENTITY'
    ' DEFAULT, or give it the same key', c.oid::regclass, %(name)s::text, coalesce(k.names, 'none'), %(identity)s::text,
    c.oid::regclass)
FROM pg_partition_tree(%(oid)s::oid::regclass) t JOIN pg_class c ON c.oid = t.relid CROSS JOIN LATERAL (
    SELECT string_agg(a.attname, ', ' ORDER BY a.attname) AS names FROM pg_index i JOIN pg_attribute a ON a.attrelid = c.oid
        AND a.attnum = ANY ((i.indkey::smallint[])[:i.indnkeyatts - 1])
    WHERE i.indrelid = c.oid AND c.relreplident <> 'n' AND i.indimmediate
        AND CASE WHEN c.relreplident = 'i' THEN i.indisreplident ELSE i.indisprimary END) k
WHERE t.isleaf AND t.level > 0 AND c.relkind = 'r' AND k.names IS DISTINCT FROM %(identity)s::text
UNION ALL SELECT format('%%s has no primary key and no replica identity: ALTER TABLE %%s.%%I ADD PRIMARY KEY, or REPLICA IDENTITY'
    ' USING INDEX; a publication without it would make the application''s own UPDATE and DELETE fail', %(name)s::text,
    c.relnamespace::regnamespace, c.relname)
FROM pg_class c WHERE c.oid = %(oid)s AND (c.relreplident = 'n' OR (c.relreplident = 'd' AND NOT EXISTS (
    SELECT FROM pg_index i WHERE i.indrelid = c.oid AND i.indisprimary)))
UNION ALL SELECT format('%%s has REPLICA IDENTITY FULL without a primary key: chunks and deletes need a key', %(name)s::text)
FROM pg_class c WHERE c.oid = %(oid)s AND c.relreplident = 'f' AND NOT EXISTS (
    SELECT FROM pg_index i WHERE i.indrelid = c.oid AND i.indisprimary)
UNION ALL SELECT format('the key of %%s is deferrable, so two rows can have it at once: make it immediate', %(name)s::text)
FROM pg_index i JOIN pg_class c ON c.oid = i.indrelid WHERE c.oid = %(oid)s AND NOT i.indimmediate
    AND (i.indisreplident OR i.indisprimary)
UNION ALL SELECT format('%%s.%%s is a generated column in the key, and the change stream carries none: give the table another key',
    %(name)s::text, a.attname)
FROM pg_attribute a WHERE a.attrelid = %(oid)s AND a.attgenerated <> '' AND a.attname::text = ANY (%(keys)s::text[])
"""


def preflight(spec: Spec) -> Preflight:
    """Look at both sides and return everything that stands against the plan (driver; starts no JVM, changes nothing).

    Raises ServerUnavailable or SecretMissing where a side can't be looked at, SpecError for a column that is not there.
    """
    findings = Preflight()
    dsn, application = spec.source.dsn.resolve(), application_name(spec.name, "check")
    with connect(dsn, application) as old:
        findings.reasons += connections.reasons(dsn, application, OLD)
        findings.reasons += connections.streaming(dsn, application, OLD) if spec.source.capture == SLOT else []
        rules = CAPTURE_RULES[spec.source.capture]
        asked = {"slot": spec.slot, "else": ', or capture = "trigger" in the spec\'s [source]'}
        findings.reasons += [row[0] for row in old.execute(rules, asked).fetchall()]
        findings.lack(grants.of_server(old, spec.source.capture))
        for table in spec.tables:
            _rights_on_source(spec, old, table, findings)
            if not grants.usable(old, table.source_name[0]):
                continue
            _source_table(old, table, spec.source.capture, findings)
            _require_columns(spec, table, findings.tables.get(table.source))
            if spec.flag is not None:
                findings.reasons += _not_mirrored(old, findings.tables.get(table.source))
        connections.look_at_settings(old, OLD, findings.reasons, findings.notes)
        connections.look_at_limits(old, application, OLD, findings.notes)
        encoding = session.encoding_of(old)
        for table in spec.tables:
            if (old_table := findings.tables.get(table.source)) is not None:
                mask = masking.of_source(table, old_table.identity)
                findings.reasons += charsets.unreadable(old, dsn, application, old_table.read, mask)
        findings.notes += COSTS[spec.source.capture]
        if spec.source.capture == SLOT:
            findings.notes += [f"prepare waits for {one}" for one in holders.of_slot(old)]
    prepared = _is_prepared(spec, findings)
    for target in spec.targets.values():
        with open_store(spec, target, "check") as store:
            if isinstance(store, PostgresStore):
                findings.reasons += connections.reasons(target.dsn_value, application, f"target {target.name}")
                connections.look_at_settings(store.connection, f"target {target.name}", findings.reasons, findings.notes)
                connections.look_at_limits(store.connection, application, f"target {target.name}", findings.notes)
                there = session.encoding_of(store.connection)
                findings.reasons += charsets.target_reasons(encoding, there, target.name)
                findings.notes += charsets.notes(encoding, there, target.name) if spec.flag is not None else []
            for table in spec.tables:
                schema, name = table.target_name
                if len(name.encode()) > NAME_BYTES:
                    findings.reasons.append(f"the target table's name {name} is too long: {NAME_BYTES} bytes at most")
                if (old_table := findings.tables.get(table.source)) is not None:
                    wanted = derivations(table, old_table.store_columns)
                    findings.reasons += store.misfits(table.target, list(wanted), owned=owned(table, wanted, old_table.identity))
                if isinstance(store, PostgresStore):
                    _rights_on_target(spec, store, schema, name, findings)
                    if not grants.readable(store.connection, schema, name):
                        continue
                    _beside_the_source(spec, store, table, findings)
                existing = store.columns(schema, name)
                if existing is not None and (old_table := findings.tables.get(table.source)) is not None:
                    findings.reasons += narrower(store, table, old_table.store_columns, existing)
                if prepared:
                    continue
                findings.reasons += [one for one in store.objections(schema, name, table.key) if one not in findings.reasons]
                findings.notes += store.remarks(schema, name)
                if existing is not None and _has_rows(store, schema, name):
                    findings.reasons.append(f"target {target.name}: table {table.target} has rows: empty it or name another one")
        if target.kind == "postgres" and not prepared:
            findings.reasons += keys.objections(spec, target)
    return findings


def _has_rows(store: Store, schema: str, name: str) -> bool:
    """Return whether a target table has rows; what a policy would hide is a reason of its own (`assumptions`)."""
    try:
        return store.has_rows(schema, name)
    except RowsHidden:
        return False


def _rights_on_source(spec: Spec, old: Connection, table: Table, findings: Preflight) -> None:
    """A publication, triggers and a fence ask for the owner; whatever comes back asks for writes and for sequences."""
    back = spec.flag is not None
    findings.lack(grants.of_table(old, *table.source_name, grants.REFUSE if back else grants.READ, owning=True))
    findings.lack(_drawing(spec, old, *table.source_name))
    findings.lack(grants.of_batches(old) if back else [])


def _rights_on_target(spec: Spec, store: PostgresStore, schema: str, name: str, findings: Preflight) -> None:
    """A table that takes over has a fence and a change stream of its own, which ask for its owner; another one is written to."""
    connection, where = store.connection, f"target {store.name}"
    takes_over = spec.flag is not None and spec.flag.target == store.name
    findings.lack(grants.of_server(connection) + grants.of_batches(connection), where)
    if store.columns(schema, name) is None:
        findings.lack(grants.of_schema(connection, schema), where)
        return
    rights = grants.REFUSE if takes_over else grants.WRITE
    findings.lack(grants.of_table(connection, schema, name, rights, owning=takes_over), where)
    findings.lack(_drawing(spec, connection, schema, name) if takes_over else [], where)


def _beside_the_source(spec: Spec, store: PostgresStore, table: Table, findings: Preflight) -> None:
    """Note what a target table lacks beside its source, and which rights the application's roles lack."""
    old_table = findings.tables.get(table.source)
    if old_table is None:
        return
    with connect(spec.source.dsn.resolve(), application_name(spec.name, "check")) as old:
        findings.notes += likeness.notes(old, store.connection, table, old_table.store_columns)
        if spec.roles and not privileges.present(store.connection, spec.roles):
            findings.note(f"target {store.name} has none of the application's roles ({', '.join(spec.roles)}): create them")
        for where, lack in privileges.missing(spec, old, store.connection, table, old_table.store_columns):
            findings.note(f"{where} store: {lack}")
            findings.grants.append(lack.grant if where == "old" else f"{lack.grant}  -- in target {store.name}")


def _drawing(spec: Spec, connection: Connection, schema: str, name: str) -> list[Lack]:
    """Authority takes a table's sequences along; where tenants move one by one they are locked, which asks for their owner."""
    if spec.flag is None:
        return []
    return grants.of_sequences(connection, schema, name, owning=spec.flag.context is not None)


COSTS: dict[str, tuple[str, ...]] = {
    SLOT: (),
    TRIGGER: (
        "capture by triggers writes every row that the application writes once more, whole and in the same transaction; capture"
        " empties the log, but its space is free again only when the copy has ended",
    ),
}
"""What a way to capture costs the old store beyond what the slot does."""

UNWRITABLE = """
SELECT format('%%s.%%s is GENERATED ALWAYS AS IDENTITY outside the key, so no mirrored update can bring it: ALTER TABLE %%s'
    ' ALTER %%I SET GENERATED BY DEFAULT', %(name)s::text, a.attname, %(table)s::text, a.attname)
FROM pg_attribute a WHERE a.attrelid = %(table)s::regclass AND a.attidentity = 'a' AND NOT a.attname::text = ANY (%(key)s::text[])
"""


def _not_mirrored(old: Connection, old_table: SourceTable | None) -> list[str]:
    """Return which columns of the old store its mirror could not write once authority has moved."""
    if old_table is None:
        return []
    table = sql.Identifier(*qualified(old_table.source)).as_string(old)
    return [row[0] for row in old.execute(UNWRITABLE, {"name": old_table.source, "table": table, "key": list(old_table.identity)})]


def _is_prepared(spec: Spec, findings: Preflight) -> bool:
    with Ledger.open(spec, "check") as ledger:
        if all(target.dsn is None for target in spec.targets.values()):
            findings.lack(grants.of_server(ledger.connection), "the ledger")
        return grants.usable(ledger.connection, "changeover") and ledger.exists()


def _source_table(connection: Connection, table: Table, capture: str, findings: Preflight) -> None:
    schema, name = table.source_name
    old_table = source_table(connection, table)
    if old_table is None:
        findings.reasons.append(f"there is no table {table.source} in {connection.info.dbname}")
        return
    quoted = sql.Identifier(schema, name).as_string(connection)
    rows = one_row(connection.execute("SELECT %s::regclass::oid", [quoted]))
    identity = old_table.identity
    named = {"oid": rows[0], "name": old_table.source, "identity": ", ".join(sorted(identity)), "keys": list(identity)}
    findings.reasons += [row[0] for row in connection.execute(TABLE_RULES, named).fetchall()]
    findings.reasons += [
        f"{old_table.source}.{c.name} has the type {c.type}, which is not proven exact: this version does not carry it"
        for c in old_table.columns
        if source_type(c.type) is None
    ]
    names = [c.name for c in old_table.columns] + list(table.columns)
    findings.reasons += [
        f"{old_table.source} or its target has a column {name}, a name that changeover needs for itself"
        for name in names
        if reserved(name)
    ]
    if capture == TRIGGER and (old_table.partitions is not None or old_table.generated):
        what = "is partitioned" if old_table.partitions is not None else f"has the generated column {min(old_table.generated)}"
        findings.reasons.append(f'{old_table.source} {what}, which capture by triggers does not carry: capture = "slot" does')
    findings.tables[table.source] = old_table


def _require_columns(spec: Spec, table: Table, old_table: SourceTable | None) -> None:
    """Find a column that is misspelt without Spark, which sees every other mistake of an expression at prepare."""
    if old_table is None or table.function is not None:
        return
    for name, expression in old_table.generated.items():
        require_not_asked_for(spec, table, name, expression)
    names = [column.name for column in old_table.columns]
    known = {name.lower() for name in names} | WORDS
    asked = [(f"columns.{name}", text.strip()) for name, text in table.columns.items()]
    misspelt = [(where, name) for where, name in asked if IDENTIFIER.fullmatch(name) and name.lower() not in known]
    misspelt += [("drop", name) for name in table.drop if name not in names]
    for where, name in misspelt:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]}?" if near else f"its columns are {', '.join(names)}"
        raise SpecError(spec.path, f"table {table.source}: {where}", f"there is no column {name} in {table.source}: {hint}")


def where(spec: Spec) -> str:
    """Return where the old store is, for messages."""
    return server_name(spec.source.dsn.resolve())
