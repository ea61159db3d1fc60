"""Assumptions: what the guarantee takes for granted of the world around it, and at which moments each is asked, as one table.

Whatever holds at `check` may cease to hold a minute later: a publication is altered, a policy hides
rows, a server fails over. So each rule names its moments, and each moment asks the rules that name
it, by this table and no other list. A rule that nothing can make good again (a gap in the stream)
stops the tables that it concerns for good. Any other one ends the run with a sentence that says
what to do, and the same command goes on afterwards. The documents have the same table
(`docs/concepts/guarantee.md`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from changeover.errors import ChangeoverError, CouldNotCheck, CouldNotFinish, SourceChanged, StepOrder, TableStopped
from changeover.jobs.guarantee import definition
from changeover.jobs.guarantee.rewrites import require_same_file
from changeover.jobs.ledger import epochs
from changeover.jobs.ledger.epochs import OLD
from changeover.jobs.ledger.ledger import Ledger
from changeover.jobs.source import partitions, snapshot, ticks
from changeover.jobs.source.changes import change_source
from changeover.jobs.source.triggerlog import Log
from changeover.jobs.spool.table import Spool, spool_path
from changeover.session import Connection, application_name, connect, speaking_to
from changeover.spec import SLOT, Spec, Table

OLDEST_SERVER = 140000


class Moment(Enum):
    """When an assumption is asked."""

    CHECK = "check"
    PREPARE = "prepare"
    RUN = "start of a step"
    CONNECT = "capture's start"
    WATCH = "watch"
    CLOSE = "close of a load"
    VERDICT = "verdict"
    FENCE = "fence"


@dataclass(frozen=True)
class Asked:
    """What a rule may look at: the plan, a session with the old store, and the ledger once the migration is prepared.

    With a `source` it is about that table alone, and what concerns all.
    """

    spec: Spec
    old: Connection
    ledger: Ledger | None = None
    source: str | None = None
    plan: tuple[str, ...] = ()
    """What the preflight found against the plan, where it was asked."""

    @property
    def tables(self) -> list[Table]:
        """Return the tables that are asked about."""
        return [table for table in self.spec.tables if self.source in (None, table.source)]

    @property
    def record(self) -> Ledger:
        """Return the ledger; only what is prepared is asked of it."""
        if self.ledger is None:
            raise StepOrder("asking for what was prepared", "prepare")
        return self.ledger


@dataclass(frozen=True)
class Broken:
    """An assumption that does not hold: of which source table, empty for all, and why.

    What `stops` a table is put on record; `gap` is what is raised for a stream that lacks changes as a whole. A gap that stops
    nothing may come from another server or database than the prepared one, of which nothing goes on record.
    """

    table: str
    reason: str
    stops: bool = False
    gap: SourceChanged | None = None


@dataclass(frozen=True)
class Rule:
    """An assumption, in words, with the function that looks and the moments at which it does."""

    name: str
    says: str
    look: Callable[[Asked], Sequence[Broken]]
    moments: frozenset[Moment]
    prepared: bool = True
    """Whether it is about what prepare has made and recorded: asked from then on, while the old store has authority."""


# -- the rules


def _plan(asked: Asked) -> list[Broken]:
    return [Broken("", reason) for reason in asked.plan]


def _server(asked: Asked) -> list[Broken]:
    return [Broken("", reason) for reason in server(asked.old)]


def server(connection: Connection) -> list[str]:
    """Return why a server can't be worked with, old or new.

    Args:
        connection: A session with the store.

    Returns:
        Reasons, each a sentence.
    """
    rows = connection.execute(
        "SELECT format('the server is PostgreSQL %%s: 14 or later is needed', current_setting('server_version'))"
        " WHERE current_setting('server_version_num')::int < %s"
        " UNION ALL SELECT 'the server is a standby: name the primary' WHERE pg_is_in_recovery()",
        [OLDEST_SERVER],
    )
    return [row[0] for row in rows.fetchall()]


def _same_server(asked: Asked) -> list[Broken]:
    stream = asked.record.stream("status")
    if server(asked.old):
        return []  # which is told, and a standby can't say where it is
    system_id, timeline = _identified(asked)
    pairs = (("system identifier", stream.system_id, system_id), ("timeline", str(stream.timeline), str(timeline)))
    gaps = [SourceChanged(what, prepared, now) for what, prepared, now in pairs if prepared != now]
    return [_lacking(gap) for gap in gaps]


def _identified(asked: Asked) -> tuple[str, int]:
    """Return (system identifier, timeline), over a walsender where the role may not ask in SQL."""
    allowed = asked.old.execute("SELECT has_function_privilege('pg_control_system()', 'EXECUTE')").fetchone()
    if allowed == (True,):
        return ticks.identify(asked.old)
    return snapshot.identify(asked.spec.source.dsn.resolve(), application_name(asked.spec.name, "identify"))


def _slot(asked: Asked) -> list[Broken]:
    gap = change_source(asked.spec).gap(asked.old, asked.record.stream("status"))
    return [] if gap is None else [_lacking(gap)]


def _lacking(gap: SourceChanged) -> Broken:
    reason = f"the source's {gap.what} is {gap.found}, but {gap.prepared} was prepared, so the change stream has a gap"
    return Broken("", reason, gap=gap)


def _definition(asked: Asked) -> list[Broken]:
    prepared, publication = definition.recorded(asked.record, OLD), asked.record.stream("status").publication
    now = present(asked.spec, asked.old, publication, definition.known(prepared))
    changes = definition.compared(prepared, now)
    named = {table.source_relation: table.source for table in asked.spec.tables}
    return [
        Broken(named.get(one.table, ""), one.reason, stops=True, gap=None if one.table in named else definition.gap(one, prepared))
        for one in changes
    ]


def present(spec: Spec, old: Connection, publication: str, tables: Mapping[int, str] | None = None) -> tuple[definition.Piece, ...]:
    """Return the definition of the old store's stream as it is now.

    Args:
        spec: The migration's spec.
        old: A session with the old store.
        publication: The publication's name; a trigger log needs none.
        tables: The tables' oids and names; the spec's unless given.

    Returns:
        The catalogue's rows that define it.
    """
    if tables is None:
        tables = definition.relations(old, [table.source_name for table in spec.tables])
    if spec.source.capture == SLOT:
        return definition.of_slot(old, publication, tables)
    return definition.of_log(old, Log(spec.name), tables)


def _partitions(asked: Asked) -> list[Broken]:
    broken = []
    for table in asked.tables:
        prepared = partitions.recorded(asked.record, table.source)
        if prepared is not None and (reason := partitions.compared(asked.old, table.source_name, prepared)[0]) is not None:
            broken.append(Broken(table.source, reason, stops=True))
    return broken


def _file(asked: Asked) -> list[Broken]:
    spool = Spool(spool_path(asked.spec.work, asked.record.stream("status").epoch))
    broken = []
    for table in asked.tables:
        try:
            require_same_file(asked.record, spool, asked.old, table)
        except TableStopped as stopped:
            broken.append(Broken(table.source, stopped.reason, stops=True))
    return broken


def _row_security(asked: Asked) -> list[Broken]:
    reasons = [(table.source, hidden(asked.old, *table.source_name)) for table in asked.tables]
    return [Broken(source, reason) for source, reason in reasons if reason is not None]


def _target_row_security(asked: Asked) -> list[Broken]:
    broken = []
    for target in asked.spec.targets.values():
        if target.kind != "postgres":
            continue
        with connect(target.dsn_value, application_name(asked.spec.name, "check")) as new:
            broken += [
                Broken(table.source, f"target {target.name}: {reason}")
                for table in asked.tables
                if (reason := hidden(new, *table.target_name)) is not None
            ]
    return broken


def hidden(connection: Connection, schema: str, name: str) -> str | None:
    """Return that a table hides rows from our role, and what to do about it.

    Args:
        connection: A session with the store.
        schema: The table's schema.
        name: The table's name.

    Returns:
        A sentence, None where it hides nothing, or is not there.
    """
    row = connection.execute(
        "SELECT format('%%s.%%s has row-level security that hides rows from the role %%s: ALTER ROLE %%I BYPASSRLS, or make it a"
        " member of the table''s owner, with NO FORCE ROW LEVEL SECURITY', %(schema)s::text, %(name)s::text, current_user,"
        " current_user) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace"
        " WHERE n.nspname = %(schema)s AND c.relname = %(name)s AND row_security_active(c.oid)",
        {"schema": schema, "name": name},
    ).fetchone()
    return row[0] if row else None


STEPS = frozenset({Moment.CHECK, Moment.PREPARE, Moment.RUN})
STREAM = frozenset({Moment.CONNECT, Moment.WATCH})
JUDGED = frozenset({Moment.VERDICT, Moment.FENCE})

RULES = (
    Rule("plan", "what `jobs/preflight/rules` asks of a plan: wal_level, rights, keys, types, targets", _plan,
         frozenset({Moment.CHECK, Moment.PREPARE}), prepared=False),
    Rule("server", "the old store's server is a primary, PostgreSQL 14 or later", _server, STEPS | STREAM | JUDGED, prepared=False),
    Rule("identity", "it is the prepared server: the same system identifier and timeline", _same_server,
         frozenset({Moment.RUN, Moment.CONNECT}) | JUDGED),
    Rule("slot", "the slot is there, as it was made, and has all the WAL that it needs, or the trigger log is there", _slot,
         frozenset({Moment.RUN, Moment.VERDICT}) | STREAM),
    Rule("definition", "the publication with its tables, or the log with its triggers, and each table's key are the rows of the"
         " catalogue that were recorded", _definition, frozenset({Moment.RUN}) | STREAM | JUDGED),
    Rule("partitions", "a partitioned table has the partitions that were recorded, or born in it since", _partitions,
         frozenset({Moment.RUN}) | STREAM | JUDGED),
    Rule("file", "a table has the file that was recorded, or another one since a TRUNCATE that the stream tells", _file,
         frozenset({Moment.CLOSE, Moment.FENCE})),
    Rule("rows seen", "no row security hides rows of a source table from our role", _row_security, STEPS | JUDGED, prepared=False),
    Rule("rows seen in targets", "none hides rows of a target table", _target_row_security, STEPS | JUDGED, prepared=False),
)  # fmt: skip
"""Every assumption, with its moments."""


# -- the moments


def ask(moment: Moment, asked: Asked, rules: Sequence[Rule] = RULES) -> list[Broken]:
    """Return what does not hold of what is asked at a moment (driver, capture)."""
    stream = _followed(asked.ledger)
    with speaking_to(asked.spec.source.dsn.resolve(), "asking whether the assumptions hold"):
        return [one for rule in rules if moment in rule.moments and (stream or not rule.prepared) for one in rule.look(asked)]


def altered(asked: Asked) -> dict[str, str]:
    """Return why each table will be stopped for what its stream was altered since prepare (looks only).

    Args:
        asked: What is asked about.

    Returns:
        Source table and reason.
    """
    tables = [table.source for table in asked.spec.tables]
    broken = ask(Moment.FENCE, asked, [rule for rule in RULES if rule.look is _definition])
    return {source: one.reason for one in reversed(broken) for source in ([one.table] if one.table else tables)}


def _followed(ledger: Ledger | None) -> bool:
    """Return whether the old store's stream still matters: until the new store has all authority, or all is taken away."""
    if ledger is None or not ledger.exists() or ledger.milestones()[1] is not None:
        return False
    return epochs.at(ledger.authorities(), OLD) is not None


def stop(moment: Moment, asked: Asked) -> list[str]:
    """Ask, and stop the tables whose stream has a gap (driver, capture).

    Args:
        moment: When it is asked.
        asked: What is asked about.

    Returns:
        The tables stopped, each with the reason.

    Raises:
        SourceChanged: The stream as a whole has a gap.
        CouldNotFinish: Something does not hold that can be made good again.
    """
    broken = ask(moment, asked)
    _stop_tables(asked, broken)
    for one in broken:
        if one.gap is not None:
            raise one.gap
        if not one.stops:
            raise CouldNotFinish(f"{one.reason}; then run the same command again")
    return [f"{one.table}: {one.reason}" for one in broken]


def require(moment: Moment, asked: Asked) -> None:
    """Ask, and raise for the first thing that does not hold (driver).

    Args:
        moment: When it is asked.
        asked: What is asked about.

    Raises:
        TableStopped: A table's stream has a gap.
        SourceChanged: The stream as a whole has a gap.
        CouldNotCheck: Something does not hold that can be made good again.
    """
    broken = ask(moment, asked)
    _stop_tables(asked, broken)
    for one in broken:
        if asked.source in (None, one.table) or not one.table:
            raise _error(asked.spec, one)


def _error(spec: Spec, one: Broken) -> ChangeoverError:
    if one.stops:
        return TableStopped(one.table or spec.tables[0].source, one.reason)
    if one.gap is not None:
        return one.gap
    return CouldNotCheck(one.table or spec.tables[0].source, f"{one.reason}; then run the same command again")


def _stop_tables(asked: Asked, broken: Sequence[Broken]) -> None:
    if any(one.gap is not None and not one.stops for one in broken):
        return
    for one in broken:
        if one.stops and asked.ledger is not None:
            for source in [one.table] if one.table else [table.source for table in asked.spec.tables]:
                asked.ledger.stop(one.reason, source)


def sentences(moment: Moment, asked: Asked) -> list[str]:
    """Return what does not hold as sentences, for `check`, `status` and whoever only looks.

    Args:
        moment: When it is asked.
        asked: What is asked about.

    Returns:
        The sentences, none where all holds.
    """
    return [one.reason if not one.table or one.table in one.reason else f"{one.table}: {one.reason}" for one in ask(moment, asked)]
