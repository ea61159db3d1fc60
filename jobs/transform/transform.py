"""The transform: one set of Spark SQL expressions that serves backfill, replay and verification, so that they can't drift.

A source row is decoded by its PostgreSQL types, and reshaped by the spec's optional function and
expressions. Then it is cast to the target's types under ANSI rules. A value that does not fit is an
error that names the table, never a NULL. A column that is given a new name alone (`entity_a =
"from_user"`) is moved; every other source column is carried over unless `drop` names it. Plans are
made on the driver, expressions run in tasks.
"""

from __future__ import annotations

import importlib
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

from changeover.errors import SpecError, UnsafePlan
from changeover.jobs.transform.derivation import Derivation, derivations, mentioned, owned, resolved
from changeover.names import RESERVED, held, hold, nth, quoted, reserved
from changeover.spec import Spec, Table
from changeover.stores.base.interface import DELETED, EPOCH, HASHED, LEFT, LSN, MEET, ORDINAL, OWNER, VERSION_COLUMNS, TargetTable
from changeover.stores.base.pgtypes import Column, decode, movable, passable, postgres_type
from changeover.stores.base.pgtypes import moved as text_moved

if TYPE_CHECKING:
    from pyspark.sql import Column as SparkColumn
    from pyspark.sql import DataFrame, SparkSession

GONE, AT_LSN, AT_ORDINAL = (f"{RESERVED}{name}" for name in ("gone", "at_lsn", "at_ordinal"))
"""What a change of a source row has beside the row's columns."""

LAST, NEWEST, ALIVE = f"{RESERVED}last", f"{RESERVED}newest", f"{RESERVED}alive"

CUT = f"{RESERVED}cut"
"""What a row that is compared has beside its columns: the source's own values where a cast changes them."""

PARSED = frozenset({"string", "void"})
"""What an expression may give of which a cast makes something else by its nature, and not by a loss."""

WRITTEN_ONE_WAY = re.compile(r"(smallint|integer|bigint|uuid|date|text|character varying(\(\d+\))?|timestamp.*)")
"""Types of which PostgreSQL writes equal values as the same text; 1.0 and 1.00 are equal numbers, -0 and 0 are."""

UNSTABLE = re.compile(
    r"\b(now|current_timestamp|current_date|localtimestamp|current_time|current_user|user|session_user|uuid|rand|randn|random|"
    r"monotonically_increasing_id|spark_partition_id|input_file_name|shuffle)\b\s*(\(|$|[^\w(])",
    re.IGNORECASE,
)
"""Functions whose value depends on when or where they run: the same row would differ in backfill, replay and verification."""


@dataclass(frozen=True)
class Transform:
    """What one table's rows go through; built by `plan`, the same object in every step."""

    table: Table
    source: tuple[Column, ...]
    target: TargetTable
    derivations: Mapping[str, Derivation]
    identity: tuple[Column, ...]
    partitioned: bool = False
    casts: Mapping[str, str] = field(default_factory=dict)
    """Target columns whose type is another one than what fills them has, and that one, Spark's."""

    def rows(self, frame: DataFrame, carry: Sequence[str] = (), moved: Collection[str] = ()) -> DataFrame:
        """Return target rows for decoded source rows, without those that `where` leaves out.

        Args:
            frame: Decoded source rows.
            carry: Further columns of the frame to keep.
            moved: Source columns that hold PostgreSQL's text, which is passed on as it is.

        Returns:
            A lazy frame of the target's columns, then `carry`.
        """
        shaped, names = self._shaped(frame)
        kept = shaped.where(_expr(self.table.where, names)) if self.table.where else shaped
        return kept.select(*carry, *(column.alias(name) for name, column in self._columns(names, moved).items()))

    def images(self, frame: DataFrame, moved: Collection[str] = ()) -> DataFrame:
        """Return target rows for decoded source rows, as a backfill loads them.

        Args:
            frame: Decoded source rows.
            moved: Source columns that hold PostgreSQL's text, which is passed on as it is.

        Returns:
            A lazy frame of the target's columns, with the source key of each row where that is
            kept.
        """
        if not self.target.owned:
            return self.rows(frame, moved=moved)
        whole = hold(frame, self._held).withColumn(OWNER, self._owner(self._held))
        return self.rows(whole, carry=[OWNER], moved=moved)

    def _owner(self, names: Mapping[str, str]) -> SparkColumn:
        """Return a row's source key as text, from decoded columns; of what is sensitive a hash, since it stands in sentences."""
        from pyspark.sql import functions as F

        columns = {c: F.col(quoted(names[c.name])) for c in self.identity}
        texts = {c.name: F.hex(column) if c.spark_type == "binary" else column.cast("string") for c, column in columns.items()}
        hidden = set(self.table.sensitive)
        shown = {name: F.concat(F.lit(HASHED), F.sha2(text, 256)) if name in hidden else text for name, text in texts.items()}
        return F.to_json(F.struct(*(text.alias(name) for name, text in shown.items())))

    def uncast(self, frame: DataFrame, carry: Sequence[str] = ()) -> DataFrame:
        """Return what `rows` does, and in `CUT` the texts of the values that the cast changes.

        So a comparison with the target is one of what the source holds, though it meets the
        target's values in their own type.

        Args:
            frame: Decoded source rows.
            carry: Further columns of the frame to keep.

        Returns:
            A lazy frame of the target's columns, then `carry`, then `CUT` where a cast can change
            values, with a text for each such column by its number.
        """
        from pyspark.sql import functions as F

        shaped, names = self._shaped(frame)
        kept = shaped.where(_expr(self.table.where, names)) if self.table.where else shaped
        own = [
            F.when(~value.cast(c.spark_type).try_cast(given).eqNullSafe(value), value.cast("string")).alias(nth(number))
            for number, c in enumerate(self.target.columns)
            if (given := self.casts.get(c.name)) is not None
            for value in [_filled(self.derivations[c.name], names)]
        ]
        cut = [F.struct(*own).alias(CUT)] if own else []
        return kept.select(*carry, *cut, *(column.alias(name) for name, column in self._columns(names).items()))

    def only_moved(self) -> frozenset[str]:
        """Return the source columns of which one target column of the same type is all that is made.

        Returns:
            The columns' names.
        """
        types = {c.name: c.type for c in self.source}
        times = Counter(one.origin for one in self.derivations.values())
        asked = self._asked(self.derivations)
        return frozenset(
            name
            for column in self.target.columns
            if (name := self.derivations[column.name].origin) is not None
            and types[name] == column.type and times[name] == 1 and name not in asked | self._identifying()
            and movable(column.type)
        )  # fmt: skip

    def keys(self, frame: DataFrame) -> DataFrame:
        """Return target keys for decoded source keys.

        Args:
            frame: Decoded source keys.

        Returns:
            A lazy frame of the target's key.
        """
        columns = self._columns(self._held)
        return hold(frame, self._held).select(*(column.alias(name) for name, column in columns.items() if name in self.target.key))

    @property
    def pg_types(self) -> dict[str, str]:
        """Return PostgreSQL's type of each target column, the source's own where a column is carried without a cast."""
        types = {c.name: c.type for c in self.source}
        return {
            c.name: types[origin] if (origin := self.derivations[c.name].origin) and c.name not in self.casts else c.type
            for c in self.target.columns
        }

    def source_key(self, identity: Sequence[str]) -> tuple[str, ...] | None:
        """Return the target key columns that hold the identity's columns unchanged (pure).

        Args:
            identity: The columns of the replica identity.

        Returns:
            The columns, in the identity's order; None where one does not.
        """
        moved = {self.derivations[name].origin: name for name in self.target.key}
        return tuple(moved[name] for name in identity) if set(identity) <= set(moved) else None

    def changes(self, events: DataFrame, epoch: int, moved: Collection[str] = (), *, every: bool = False) -> DataFrame:
        """Return the target's changes for those of the source: one row a key, the last by version.

        A delete carries the key alone. A row that `where` leaves out is a delete of its key; as in
        a backfill, nothing of it is evaluated but the key and what `where` asks for.

        Args:
            events: What `batch.completed` yields.
            epoch: The epoch of authority that stamps them.
            moved: Source columns, of `moved_in_stream`, that are passed on as text.
            every: Whether the events may have several of a key, each of which is a row then.

        Returns:
            A lazy frame of the target's columns, the version (epoch, LSN, ordinal), and whether the
            key is gone.
        """
        from pyspark.sql import functions as F

        asked = self._asked_of_every_row()
        values = [
            (decode(text, c.type, native=False) if c.name in asked else text).alias(self._held[c.name])
            for c in self.source
            for text in (F.col(quoted(self._held[c.name])),)
        ]
        version = [
            F.lit(epoch).cast("int").alias(EPOCH), F.col(AT_LSN).alias(LSN), F.col(AT_ORDINAL).alias(ORDINAL),
            F.col(GONE).alias(DELETED),
        ]  # fmt: skip
        shaped, names = self._shaped(hold(events, self._held).select(*version, *values))
        if self.table.where:
            left_out = ~F.coalesce(_expr(self.table.where, names), F.lit(False))
            shaped = shaped.withColumn(DELETED, F.when(F.col(DELETED), F.lit(True)).otherwise(left_out))
        here = ~F.col(DELETED)
        late = {
            names[c.name]: F.when(here, text_moved(text, c.type) if c.name in moved else decode(text, c.type, native=False))
            for c in self.source
            if c.name not in asked
            for text in (shaped[quoted(names[c.name])],)
        }
        whole = shaped.withColumns(late) if late else shaped
        own = held(self.target.names)
        owner = [self._owner(names).alias(OWNER)] if self.target.owned else []
        columns = [
            (column if name in self.target.key else F.when(here, column)).alias(own[name])
            for name, column in self._columns(names, moved).items()
        ]
        changes = whole.select(*VERSION_COLUMNS, *owner, *columns)
        if not every and not self._one_to_one():
            changes = _last_of_each_key(changes, [own[name] for name in self.target.key], owned=self.target.owned)
        return hold(changes, {other: name for name, other in own.items()})

    def moved_in_stream(self) -> frozenset[str]:
        """Return the source columns outside the key of which one target column of the same type is all that is made.

        Arrays are not among them: the stream's are JSON.

        Returns:
            The columns' names.
        """
        asked = self._asked_of_every_row()
        return frozenset(c.name for c in self.source if c.name in self.only_moved() - asked and not c.type.endswith("[]"))

    def passed_on(self) -> dict[str, str] | None:
        """Return how rows go on as they are, under other names at most (pure).

        Returns:
            Target column and source column; None where a row is reshaped.
        """
        if self.table.where is not None or not self._one_to_one():
            return None
        types = {c.name: c.type for c in self.source}
        origins = {c.name: origin for c in self.target.columns if (origin := self.derivations[c.name].origin) is not None}
        whole = all(c.name in origins and types[origins[c.name]] == c.type and passable(c.type) for c in self.target.columns)
        return origins if whole else None

    def _one_to_one(self) -> bool:
        """Return whether no two keys of the source that differ as texts can be one key of the target."""
        names = [c.name for c in self.identity]
        return self.source_key(names) is not None and all(WRITTEN_ONE_WAY.fullmatch(c.type) for c in self.identity)

    def kept(self, frame: DataFrame) -> DataFrame:
        """Return the source rows that `where` keeps.

        Args:
            frame: Decoded source rows.

        Returns:
            A lazy frame of the source's columns; all rows where `where` speaks of what a function
            makes.
        """
        if not self.table.where or self.table.function is not None:
            return frame
        return hold(frame, self._held).where(_expr(self.table.where, self._held))

    def _asked_of_every_row(self) -> frozenset[str]:
        """Return the source columns that are decoded before it is known whether a row is kept; in doubt a column is one."""
        if self.table.function is not None:
            return frozenset(c.name for c in self.source)
        origins = {origin for name in self.target.key if (origin := self.derivations[name].origin)}
        return self._asked(self.target.key) | origins | self._identifying()

    def _identifying(self) -> frozenset[str]:
        """Return the columns of the source key where its text is kept, which is that of its decoded values."""
        return frozenset(c.name for c in self.identity) if self.target.owned else frozenset()

    def _asked(self, names: Collection[str]) -> frozenset[str]:
        """Return the source columns that `where` may ask for, or the expressions that compute some target columns."""
        computed = [one.expression for name in names if (one := self.derivations[name]).origin is None]
        return mentioned([c.name for c in self.source], [self.table.where or "", *computed])

    @cached_property
    def _held(self) -> dict[str, str]:
        """The names by which frames hold the source's columns."""
        return held([c.name for c in self.source])

    def _shaped(self, frame: DataFrame) -> tuple[DataFrame, Mapping[str, str]]:
        """Apply the spec's function, which must keep the pipeline's own columns; return by which names its columns are held."""
        if self.table.function is None:
            return hold(frame, self._held), self._held
        shaped = load_function(self.table.function)(hold(frame, {other: name for name, other in self._held.items()}))
        lost = [name for name in VERSION_COLUMNS if name in frame.columns and name not in shaped.columns]
        if lost:
            raise SpecError(self.table.function, "transform.function", f"drops the columns {', '.join(lost)}: keep them")
        names = held([name for name in shaped.columns if name not in frame.columns or not reserved(name)])
        return hold(shaped, names), names

    def _columns(self, names: Mapping[str, str], moved: Collection[str] = ()) -> dict[str, SparkColumn]:
        """Return the target's columns, in its order, over a frame that holds the source's by these names."""
        return {
            c.name: _filled(one, names).cast("string" if one.origin in moved else c.spark_type)
            for c in self.target.columns
            for one in (self.derivations[c.name],)
        }


def _last_of_each_key(changes: DataFrame, key: Sequence[str], *, owned: bool = False) -> DataFrame:
    """Keep the change with the highest version of each key: a cell is the maximum of what it is offered.

    The key is the last change's own: Spark groups -0.0 with 0.0, and would give it out as 0.0. Where several source keys may make
    one, the one that is alive counts, whatever was deleted after it, and two that are alive are refused by name.
    """
    from pyspark.sql import functions as F

    version, alive = F.struct(EPOCH, LSN, ORDINAL), ~F.col(DELETED)
    last = F.max_by(F.struct(*map(quoted, changes.columns)), F.struct(alive, version) if owned else version).alias(LAST)
    owners = {ALIVE: alive, LEFT: ~alive} if owned else {}
    latest = changes.groupBy(*map(quoted, key)).agg(
        last, F.max(version).alias(NEWEST),
        *(F.sort_array(F.collect_list(F.when(of, F.col(OWNER)))).alias(name) for name, of in owners.items()),
    )  # fmt: skip

    def of_last(name: str) -> SparkColumn:
        value = F.col(f"{LAST}.{quoted(name)}")
        if name in (EPOCH, LSN, ORDINAL):
            return F.col(f"{NEWEST}.{name}").alias(name)
        return (value if name in (*key, DELETED) else F.when(~F.col(f"{LAST}.{DELETED}"), value)).alias(name)

    if not owned:
        return latest.select(*map(of_last, changes.columns))
    met = F.concat(F.lit(f"[KEYS_MEET] {MEET}: "), F.array_join(ALIVE, " and "))
    sole = F.when(F.size(ALIVE) > 1, F.raise_error(met).cast("string")).otherwise(F.col(f"{LAST}.{OWNER}")).alias(OWNER)
    return latest.select(*(sole if name == OWNER else of_last(name) for name in changes.columns), LEFT)


def load_function(reference: str) -> Callable[[DataFrame], DataFrame]:
    """Import a spec's ``package.module:function``; raises SpecError when it is not there."""
    module, _, name = reference.partition(":")
    try:
        return cast("Callable[[DataFrame], DataFrame]", getattr(importlib.import_module(module), name))
    except (ImportError, AttributeError) as error:
        raise SpecError(reference, "transform.function", f"can't be imported: {error}") from error


def plan(
    spark: SparkSession, spec: Spec, table: Table, source: Sequence[Column], replica_identity: Sequence[str],
    existing: Sequence[Column] | None,
) -> Transform:  # fmt: skip
    """Return the transform of a table, its types found by Spark's own analysis (driver, reads no row).

    Args:
        spark: The Spark session.
        spec: The migration's spec.
        table: The table of the spec.
        source: The source table's columns.
        replica_identity: The columns by which the stream tells a row from others.
        existing: The columns of a target table that is there already, None where there is none.

    Returns:
        The transform.

    Raises:
        SpecError: An expression is not valid, or not the same at each run.
        UnsafePlan: Something stands against the plan; it has every reason.
    """
    wanted = derivations(table, source)
    _require_stable(spec, table, wanted)
    frame = _empty_frame(spark, source)
    shaped = load_function(table.function)(frame) if table.function else frame
    names = held(shaped.columns)
    row = hold(shaped, names)
    carried = {column.name: column.dataType.simpleString() for column in row.schema}  # one analysis for all of them
    spark_types = {
        name: carried.get(names.get(one.origin or "", "")) or _spark_type(spec, table, f"columns.{name}", row, names, one)
        for name, one in wanted.items()
    }
    if table.where is not None:
        _spark_type(spec, table, "where", row, names, Derivation(table.where))
    schema, name = table.target_name
    columns = (
        _existing_columns(spec, table, existing, spark_types)
        if existing is not None
        else _new_columns(spec, table, source, wanted, spark_types)
    )
    _require_key(spark, spec, table, source, replica_identity, wanted, [c.name for c in columns])
    by_name = {c.name: c for c in source}
    whole = TargetTable(schema, name, tuple(columns), table.key, owned(table, wanted, replica_identity))
    casts = {c.name: given for c in columns if (given := spark_types[c.name]) != c.spark_type and given not in PARSED}
    return Transform(table, tuple(source), whole, wanted, tuple(by_name[name] for name in replica_identity), casts=casts)


def _empty_frame(spark: SparkSession, columns: Sequence[Column]) -> DataFrame:
    schema = ", ".join(f"{nth(number)} {c.spark_type}" for number, c in enumerate(columns))
    return spark.createDataFrame([], schema).toDF(*(c.name for c in columns))


def _spark_type(
    spec: Spec, table: Table, where: str, frame: DataFrame, names: Mapping[str, str], derivation: Derivation
) -> str:  # fmt: skip
    from pyspark.errors import PySparkException

    text = derivation.expression
    try:
        analysed = frame.select(_filled(derivation, names))
        deterministic = cast("Any", analysed)._jdf.queryExecution().analyzed().deterministic()
    except PySparkException as error:
        problem = str(error).splitlines()[0]
        for name, other in names.items():
            problem = problem.replace(quoted(other), quoted(name))
        raise SpecError(spec.path, f"table {table.source}: {where}", f"{text!r} is not a valid expression: {problem}") from error
    if not deterministic:
        raise SpecError(spec.path, f"table {table.source}: {where}", f"{text!r} gives another value at each run")
    return analysed.schema.fields[0].dataType.simpleString()


def _expr(text: str, names: Mapping[str, str]) -> SparkColumn:
    """Return an expression of the spec's over a frame that holds columns by these names."""
    from pyspark.sql import functions as F

    return F.expr(resolved(text, names))


def _filled(derivation: Derivation, names: Mapping[str, str]) -> SparkColumn:
    """Return what fills a column; one that is carried is never read as SQL."""
    from pyspark.sql import functions as F

    if derivation.origin is None:
        return _expr(derivation.expression, names)
    return F.col(quoted(names[derivation.origin]))


def _require_stable(spec: Spec, table: Table, wanted: Mapping[str, Derivation]) -> None:
    for setting, text in [*((name, one.expression) for name, one in wanted.items()), ("where", table.where or "")]:
        bare = re.sub(r"'(?:[^']|'')*'|`[^`]*`", "", text)  # a literal or a quoted column may say now
        match = UNSTABLE.search(bare)
        if match:
            raise SpecError(spec.path, f"table {table.source}: {setting}", f"{match[1]} gives another value at each run")


def _existing_columns(spec: Spec, table: Table, existing: Sequence[Column], spark_types: Mapping[str, str]) -> list[Column]:
    """The target's own columns and types count; every one that the transform does not fill must be able to stay empty."""
    names = {c.name for c in existing}
    reasons = [f"target table {table.target} has no column {name}" for name in spark_types if name not in names]
    reasons += [f"column {c.name} of target table {table.target} is NOT NULL and nothing fills it" for c in existing
                if c.not_null and c.name not in spark_types]  # fmt: skip
    reasons += [f"column {c.name} of target table {table.target} has the type {c.type}, which is not proven exact"
                for c in existing if c.name in spark_types and not c.spark_type]  # fmt: skip
    if reasons:
        raise UnsafePlan(tuple(reasons))
    return [c for c in existing if c.name in spark_types]


def _new_columns(
    spec: Spec, table: Table, source: Sequence[Column], wanted: Mapping[str, Derivation], spark_types: Mapping[str, str]
) -> list[Column]:
    """A moved or carried column keeps its PostgreSQL type; a computed one gets the type of its Spark result."""
    by_name = {c.name: c for c in source}
    columns = []
    for name in [*table.key, *(n for n in wanted if n not in table.key)]:
        if name not in wanted:
            raise SpecError(spec.path, f"table {table.source}: key", f"nothing fills the key column {name}")
        derived = wanted[name].origin
        origin = by_name[derived] if derived is not None else None
        type_name = origin.type if origin else postgres_type(spark_types[name])
        if type_name is None:
            problem = f"gives {spark_types[name]}, which no column can hold"
            raise SpecError(spec.path, f"table {table.source}: columns.{name}", problem)
        spark_type = origin.spark_type if origin else spark_types[name]
        not_null = name in table.key or (origin is not None and origin.not_null)
        columns.append(Column(name, type_name, spark_type, not_null))
    return columns


def _require_key(
    spark: SparkSession, spec: Spec, table: Table, source: Sequence[Column], identity: Sequence[str],
    wanted: Mapping[str, Derivation], names: Sequence[str],
) -> None:  # fmt: skip
    """The target key must follow from the replica identity alone: a DELETE carries no more."""
    from pyspark.errors import PySparkException

    missing = [name for name in table.key if name not in names]
    if missing:
        raise SpecError(spec.path, f"table {table.source}: key", f"{missing[0]} is no column of the target")
    if table.function is not None:
        return
    own = held([c.name for c in source])
    alone = hold(_empty_frame(spark, [c for c in source if c.name in identity]), own)
    for name in table.key:
        try:
            _ = alone.select(_filled(wanted[name], own)).schema
        except PySparkException as error:
            raise UnsafePlan(
                (f"target key column {name} of {table.source} is computed from {wanted[name].expression!r}, which needs more than"
                 f" the replica identity ({', '.join(identity)}): a DELETE carries no more",)
            ) from error  # fmt: skip
