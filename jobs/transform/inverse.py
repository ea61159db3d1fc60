"""The inverse: one table's transform the other way round, from the row of the store that took over to the old store's row.

A column that was only given another name goes back under its old one, where the values can't have
changed on the way. Every other column of the old table is stated in the spec (`[table.reverse]`).
Otherwise there is no reverse replication, and `missing` says for which column. The result is an
ordinary transform, built and analysed like the one it undoes, so that replay knows no direction.
Plans are made on the driver.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from changeover.errors import SpecError
from changeover.jobs.transform import transform
from changeover.jobs.transform.derivation import derivations
from changeover.jobs.transform.transform import Transform
from changeover.names import quoted
from changeover.spec import Spec, Table
from changeover.stores.base.fits import holds, lake_holds, refuses
from changeover.stores.base.pgtypes import Column

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


def derived(table: Table, old: Sequence[Column], new: Sequence[Column] | None) -> dict[str, str]:
    """Return the old table's columns whose values stand in the new table's row as they were, and where (pure).

    `new` are the new table's columns, or None where it is not there yet: `prepare` then gives a moved column its old type.
    """
    values: dict[str, str] = {}
    by_name = {c.name: c for c in old}
    for name, derivation in derivations(table, old).items():
        if derivation.origin is not None and _held(by_name[derivation.origin], name, new):
            values.setdefault(derivation.origin, quoted(name))
    return values


def _held(origin: Column, name: str, new: Sequence[Column] | None) -> bool:
    """Return whether a column of the new table gives the old one's values back, and no other value in silence as one of them.

    What the new type does not hold of the old one's values `check` has refused before.
    """
    if new is None:
        return True
    there = next((c for c in new if c.name == name), None)
    if there is None or not there.spark_type:
        return False
    alike = there.spark_type == origin.spark_type or holds(origin.type, there.type)
    return alike and refuses(there.type, origin.type)


def expressions(table: Table, old: Sequence[Column], new: Sequence[Column] | None) -> dict[str, str]:
    """Return the old table's columns as expressions over the new table's row, in the old table's order, as far as there are any."""
    given = {**derived(table, old, new), **table.reverse}
    return {c.name: given[c.name] for c in old if c.name in given}


def missing(spec: Spec, table: Table, old: Sequence[Column], new: Sequence[Column] | None) -> str | None:
    """Return why a table has no reverse replication (pure).

    Args:
        spec: The migration's spec.
        table: The table of the spec.
        old: The old table's columns.
        new: The new table's columns, None where it is not there yet.

    Returns:
        A sentence that says what to write, None where every column can be had back.

    Raises:
        SpecError: `[table.reverse]` names a column that the old table does not have.
    """
    names = [c.name for c in old]
    unknown = sorted(set(table.reverse) - set(names))
    if unknown:
        raise SpecError(
            spec.path, f"table {table.source}: reverse.{unknown[0]}", f"there is no such column in {table.source}: its columns are"
            f" {', '.join(names)}",
        )  # fmt: skip
    lacking = [name for name in names if name not in expressions(table, old, new)]
    if not lacking:
        return None
    return (
        f"{table.source} has no reverse replication from {table.target}: nothing gives its column{'s' * (len(lacking) > 1)}"
        f" {', '.join(lacking)} (state {'each' if len(lacking) > 1 else 'it'} in [table.reverse] as an expression over the row of"
        f" {table.target})"
    )


def plan(
    spark: SparkSession, spec: Spec, table: Table, old: tuple[Sequence[Column], Sequence[str]], new: Sequence[Column],
    new_key: Sequence[str],
) -> Transform:  # fmt: skip
    """Return the transform from the new table's rows to the old one's (driver, reads no row).

    Args:
        spark: The Spark session.
        spec: The migration's spec.
        table: The table of the spec.
        old: The old table's columns, and the names of its identity.
        new: The new table's columns.
        new_key: The names of the new table's key.

    Returns:
        The transform.

    Raises:
        SpecError: An expression is not valid.
        UnsafePlan: Something stands against the plan; it has every reason.
    """
    columns, identity = old
    back = Table(
        source=table.target, target=table.source, key=tuple(identity), columns=expressions(table, columns, new),
        drop=tuple(c.name for c in new),
    )  # fmt: skip
    return transform.plan(spark, spec, back, _carried(new), new_key, columns)


def same(
    spark: SparkSession, spec: Spec, table: Table, new: Sequence[Column], new_key: Sequence[str], columns: Sequence[Column]
) -> Transform:
    """Return the transform from the new table's rows to another target's (driver, reads no row).

    Args:
        spark: The Spark session.
        spec: The migration's spec.
        table: The table of the spec.
        new: The new table's columns.
        new_key: The names of the new table's key.
        columns: The other target's columns, of the same names.

    Returns:
        The transform.
    """
    kept = {c.name for c in columns}
    wanted = replace(
        table, source=table.target, columns={}, drop=tuple(c.name for c in new if c.name not in kept), where=None, function=None
    )
    return transform.plan(spark, spec, wanted, _carried(new), new_key, columns)


def cut(table: Table, new: Sequence[Column], columns: Sequence[Column]) -> list[str]:
    """Return which columns of another target would cut the new table's values in silence (pure).

    It is asked of a target that follows the new store once that has authority.

    Args:
        table: The table of the spec.
        new: The new table's columns.
        columns: The other target's columns.

    Returns:
        The columns' names.
    """
    there = {c.name: c for c in columns}
    return [
        f"{table.target}.{own.name} is {own.type} in the new store and {there[own.name].spark_type} in a lake, which would not hold"
        f" all that is written there after the hand-over: state the wider type by an expression in [table.columns], such as"
        f' {own.name} = "cast({own.name} as {own.spark_type})"'
        for own in new
        if own.spark_type and own.name in there and not lake_holds(own.spark_type, there[own.name].spark_type)
        if not refuses(own.type, there[own.name].type)
    ]


def _carried(columns: Sequence[Column]) -> list[Column]:
    """Return the columns that frames can hold; another one is the new store's own and goes nowhere."""
    return [c for c in columns if c.spark_type]
