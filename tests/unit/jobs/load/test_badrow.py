"""The search for a bad row: the first one of many, with few tries, and none where rows fail together alone."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
import pytest

from changeover.errors import RowRefused
from changeover.jobs.apply.batch import without
from changeover.jobs.load.badrow import in_two, narrowed
from changeover.jobs.transform.transform import AT_LSN, AT_ORDINAL
from changeover.spark.failures import translated


@pytest.mark.parametrize("bad", [{0}, {7}, {99}, {41, 7, 99}, set(range(100))])
def test_the_first_bad_one_is_found_with_few_tries(bad: set[int]) -> None:
    tried = []
    numbers: Sequence[int] = range(100)

    def refused(some: Sequence[int]) -> RowRefused | None:
        tried.append(some)
        return RowRefused("t", "here", "why") if bad & set(some) else None

    found = narrowed(numbers, in_two, refused)
    assert found is not None
    assert list(found[0]) == [min(bad)]
    assert len(tried) <= 8


def test_rows_that_fail_together_alone_are_nobodys_fault() -> None:
    numbers: Sequence[int] = range(8)
    assert narrowed(numbers, in_two, lambda some: RowRefused("t", "", "") if len(some) > 1 else None) is None
    assert narrowed(numbers[:0], in_two, lambda some: None) is None


def test_what_came_before_a_later_change_of_its_key_is_left_out() -> None:
    changes = pa.table({"a": ["1", "1", "2"], "b": ["x", None, "x"], AT_LSN: [5, 5, 5], AT_ORDINAL: [2, 2, 2]})
    assert without(changes, ["a", "b"], {}).num_rows == 3
    assert without(changes, ["a", "b"], {("1", None): (5, 3), ("2", "x"): (5, 2)})["b"].to_pylist() == ["x", "x"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[CAST_INVALID_INPUT] The value 'secret' of the type \"STRING\" cannot be cast to \"INT\". SQLSTATE: 22018",
         'CAST_INVALID_INPUT: A value of the type "STRING" cannot be cast to "INT".'),
        ("PSQLException: ERROR: invalid input syntax for type \"UTF8\": 0xff", 'invalid input syntax for type "UTF8"'),
        ("PSQLException: Bad value for type timestamp/date/time: secret", "Bad value for type timestamp/date/time"),
    ],
)  # fmt: skip
def test_a_refused_value_is_not_repeated(text: str, said: str) -> None:
    error = translated(text, "public.t", "here")
    assert isinstance(error, RowRefused)
    assert (error.problem, "secret" in str(error)) == (said, False)
