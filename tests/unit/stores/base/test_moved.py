"""A column that is only moved keeps PostgreSQL's text, and takes exactly what its decoded form takes."""

from __future__ import annotations

import pyarrow as pa
import pytest
from chispa import assert_df_equality
from pyspark.sql import DataFrame, SparkSession

from changeover.errors import RowRefused
from changeover.spark.failures import from_spark
from changeover.stores.base.pgtypes import movable, moved, unmovable


def as_they_are(spark: SparkSession, values: list[str | None]) -> DataFrame:
    return spark.createDataFrame([(value,) for value in values], "value string")


def texts(spark: SparkSession, type_name: str, values: list[str | None]) -> DataFrame:
    frame = as_they_are(spark, values).coalesce(1)
    return frame.select(moved(frame["value"], type_name).alias("value"))


TAKEN = [
    ("timestamp with time zone", ["2024-02-29 12:34:56.123456+00", None]),
    ("date", ["0001-01-01", None]),
    ("numeric(12,4)", ["-0.0001", "12345678.1000", None]),
    ("double precision", ["NaN", "-Infinity", "-0", "5e-324", None]),
    ("text[]", ["{}", '{"a,b",NULL,"","{{","NULL"}', None]),
    ("integer[]", ["{1,NULL,-3}", None]),
]

REFUSED = [
    ("timestamp with time zone", "infinity"), ("timestamp without time zone", "-infinity"), ("date", "0044-03-15 BC"),
    ("timestamp with time zone", "0044-03-15 00:00:00+00 BC"), ("numeric(12,4)", "NaN"), ("integer[]", "{{1,2},{3,4}}"),
    ("text[]", '{{"a"}}'), ("text[]", "[0:1]={a,b}"),
]  # fmt: skip


@pytest.mark.parametrize(("type_name", "values"), TAKEN)
def test_the_text_stays_as_it_is(spark: SparkSession, type_name: str, values: list[str | None]) -> None:
    assert movable(type_name)
    assert_df_equality(texts(spark, type_name, values), as_they_are(spark, values), ignore_nullable=True)


@pytest.mark.parametrize(("type_name", "value"), REFUSED)
def test_what_decoding_refuses_is_refused(spark: SparkSession, type_name: str, value: str) -> None:
    with pytest.raises(RowRefused, match=r"public\.odd"), from_spark("public.odd", "the place"):
        texts(spark, type_name, [value]).collect()


STREAMED = {
    "{{1,2},{3,4}}": "[[1,2],[3,4]]", '{{"a"}}': '[["a"]]', "[0:1]={a,b}": "[[[0:1]={a,b}", "{}": "[]",
    '{"a,b",NULL,"","{{","NULL"}': '["a,b", null, "", "{{", "NULL"]', "{1,NULL,-3}": '["1", null, "-3"]',
}  # fmt: skip
"""Arrays as the stream has them."""

YEARS = ["294246-12-31 23:59:59.999999+00", "294247-01-01 00:00:00+00", "294300-01-01 00:00:00+00", "1294-01-01 00:00:00+00"]


def test_what_is_passed_on_is_refused_for_the_same_values() -> None:
    for type_name, values in TAKEN:
        assert unmovable(pa.array([STREAMED.get(str(one), one) for one in values], pa.string()), type_name) is None
    for type_name, value in REFUSED:
        refused = unmovable(pa.array([None, STREAMED.get(value, value)], pa.string()), type_name)
        assert refused is not None
        assert type_name in refused
    for type_name in ("text", "bigint", "jsonb", "interval"):
        assert unmovable(pa.array(["NaN", "infinity", "x BC"]), type_name) is None


@pytest.mark.parametrize("value", YEARS)
def test_both_ways_end_at_the_same_year(spark: SparkSession, value: str) -> None:
    type_name = "timestamp with time zone"
    by_arrow = unmovable(pa.array([value]), type_name) is not None
    try:
        with from_spark("public.odd", "the place"):
            texts(spark, type_name, [value]).collect()
        by_spark = False
    except RowRefused:
        by_spark = True
    assert by_arrow == by_spark == (value in YEARS[1:3])


@pytest.mark.parametrize("type_name", ["date[]", "timestamp with time zone[]", "numeric(12,4)[]", "text", "bigint", "jsonb"])
def test_elements_that_must_be_parsed_are_not_moved(type_name: str) -> None:
    assert not movable(type_name)
