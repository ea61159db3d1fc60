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
from changeover.jobs.ledger.records import SourceColumn, Stream
from changeover.jobs.source.partitions import Roots
from changeover.jobs.spool.table import Spool, spool_path
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


def feed_of(spec: Spec, ledger: Ledger, stream: Stream) -> Feed:
    """Return the old store's stream as capture follows it (driver)."""
    tables = {table.source_relation: ledger.source_table(table.source)[1] for table in spec.tables}
    roots = Roots(spec, ledger)

    def ask(moment: Moment, old: Connection) -> list[str]:
        try:
            with Ledger.open(spec, "capture") as present:  # a ledger that was restarted has ended the session of the beginning
                stopped = assumptions.stop(moment, Asked(spec, old, present))
        except ServerUnavailable as error:
            if moment is not Moment.WATCH:
                raise
            return [f"whether the stream is whole is asked again in a minute: {error}"]
        return list(dict.fromkeys([*stopped, *roots.look(old)]))  # which puts new partitions on record

    return Feed(spec.source.dsn.resolve(), stream, tables, Spool(spool_path(spec.work, stream.epoch)), roots, ask)
