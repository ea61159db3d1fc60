"""COPY's CSV format, written by Spark: one string column that PostgreSQL takes as it is.

The whole row is formatted inside the JVM, so a task's Python only hands Arrow's bytes on, never a row or a value. PostgreSQL's
documentation of COPY gives the rules: nothing at all is NULL, and whatever may hold a special character stands in double
quotes, where a double quote alone is doubled. So one search in a text does what the text format needs four for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyspark.sql import functions as F
from pyspark.sql.types import ArrayType, BinaryType, BooleanType, DataType, DatetimeType, StringType

from changeover.names import quoted

if TYPE_CHECKING:
    from pyspark.sql import Column as SparkColumn
    from pyspark.sql import DataFrame

NULL = ""


def copy_lines(frame: DataFrame, lsn_columns: tuple[str, ...] = ()) -> DataFrame:
    """Return a frame with the one column `line`: each row in COPY's CSV format, with its newline.

    A column named in `lsn_columns` is a 64-bit position, written as pg_lsn.
    """
    fields = []
    for field in frame.schema.fields:
        column = F.col(quoted(field.name))
        text = _lsn(column) if field.name in lsn_columns else _guarded(_text(column, field.dataType), field.dataType)
        fields.append(F.coalesce(text, F.lit(NULL)))
    return frame.select(F.concat(F.concat_ws(",", *fields), F.lit("\n")).alias("line"))


def _lsn(column: SparkColumn) -> SparkColumn:
    high, low = F.shiftrightunsigned(column, 32), column.bitwiseAND(F.lit(0xFFFFFFFF).cast("bigint"))
    return F.concat(F.hex(high), F.lit("/"), F.hex(low))


def _text(column: SparkColumn, kind: DataType) -> SparkColumn:
    """Return a value as PostgreSQL's input function reads it."""
    if isinstance(kind, ArrayType):
        quoted = isinstance(kind.elementType, StringType | BinaryType)

        def element(value: SparkColumn) -> SparkColumn:
            text = _text(value, kind.elementType)
            return F.coalesce(_quoted(text) if quoted else text, F.lit("NULL"))

        return F.concat(F.lit("{"), F.array_join(F.transform(column, element), ","), F.lit("}"))
    if isinstance(kind, BinaryType):
        return F.concat(F.lit("\\x"), F.hex(column))
    if isinstance(kind, BooleanType):
        return F.when(column, "t").otherwise(F.when(~column, "f"))
    if isinstance(kind, DatetimeType):
        return F.ltrim(column.cast("string"), F.lit("+"))  # the sign of a year beyond 9999, which PostgreSQL takes for a zone's
    return column.cast("string")


def _quoted(text: SparkColumn) -> SparkColumn:
    """Return an array element in double quotes; see PostgreSQL's documentation, Array Input and Output Syntax."""
    escaped = F.replace(F.replace(text, F.lit("\\"), F.lit("\\\\")), F.lit('"'), F.lit('\\"'))
    return F.concat(F.lit('"'), escaped, F.lit('"'))


def _guarded(text: SparkColumn, kind: DataType) -> SparkColumn:
    """Return a text in double quotes; numbers and times hold no special character and are never empty."""
    if not isinstance(kind, StringType | ArrayType):
        return text
    return F.concat(F.lit('"'), F.replace(text, F.lit('"'), F.lit('""')), F.lit('"'))
