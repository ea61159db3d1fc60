"""The feed: which stream a run of capture follows, and what must still be true of it.

A feed says where the stream is read, how its tables looked, where the events go, and whom to ask whether all of it still holds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from changeover.errors import ServerUnavailable
from changeover.jobs.decode.transactions import Partitions, Unpartitioned
from changeover.jobs.guarantee import assumptions
from changeover.jobs.guarantee.assumptions import Asked, Moment
from changeover.jobs.ledger.ledger import Ledger
from changeover.jobs.ledger.records import NEW, OLD, SourceColumn, Stream
from changeover.jobs.reverse import path as reverse
from changeover.jobs.reverse import setup as reverse_setup
from changeover.jobs.source.catalog import tables_of
from changeover.jobs.source.partitions import Roots
from changeover.jobs.spool.table import Spool, spool_of
from changeover.session import Connection
from changeover.spec import Spec


@dataclass(frozen=True)
class Feed:
    """A store's stream: where it is read, what must still be true of it, its tables' columns and partitions, and where it goes.

    `ask` asks whether what the stream rests on still holds; it returns which tables were stopped, and raises what stops all.
    """

    dsn: str
    stream: Stream
    tables: Mapping[str, Sequence[SourceColumn]]
    spool: Spool
    roots: Partitions = field(default_factory=Unpartitioned)
    ask: Callable[[Moment, Connection], Sequence[str]] = lambda moment, connection: ()


def feed_of(spec: Spec, ledger: Ledger, stream: Stream, store: str = OLD) -> Feed:
    """Return a store's stream as capture follows it (driver).

    Args:
        spec: The migration's spec.
        ledger: The migration's ledger, open as long as the feed is used.
        stream: The stream on record.
        store: `OLD` or `NEW`.

    Returns:
        The feed.

    Raises:
        StepOrder: A table of the stream is not on record.
        SecretMissing: The environment variable of the DSN is not set.
    """
    tables = {table.source_relation: ledger.source_table(table.source, store)[1] for table in tables_of(spec, store)}
    if store == NEW:
        roots = reverse_setup.roots(spec, ledger)
        return Feed(reverse.new_dsn(spec), stream, tables, reverse.spool_of(spec), roots, _asked_of_new(spec, ledger, roots))
    roots, dsn = Roots(ledger, spec.source.dsn.resolve(), spec.tables), spec.source.dsn.resolve()
    return Feed(dsn, stream, tables, spool_of(spec, stream.epoch), roots, _asked_of_old(spec, roots))


def _asked_of_old(spec: Spec, roots: Roots) -> Callable[[Moment, Connection], Sequence[str]]:
    def ask(moment: Moment, old: Connection) -> list[str]:
        try:
            with Ledger.open(spec, "capture") as present:  # a ledger that was restarted has ended the session of the beginning
                stopped = assumptions.stop(moment, Asked(spec, old, present))
        except ServerUnavailable as error:
            if moment is not Moment.WATCH:
                raise
            return [f"whether the stream is whole is asked again in a minute: {error}"]
        return list(dict.fromkeys([*stopped, *roots.look(old)]))  # which puts new partitions on record

    return ask


def _asked_of_new(spec: Spec, ledger: Ledger, roots: Roots) -> Callable[[Moment, Connection], Sequence[str]]:
    def ask(moment: Moment, new: Connection) -> list[str]:
        reverse_setup.require_definition(spec, ledger, new)
        return roots.look(new)

    return ask
