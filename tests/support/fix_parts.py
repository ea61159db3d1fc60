"""The suite in two parts that can run side by side: the tests on the run's one Spark session, and all others.

A part has servers and folders of its own, as any run has, and each test is in one of the two. Without `--part` a run is of both.
"""

from __future__ import annotations

import pytest

PARTS = ("spark", "others")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let `.ci/run` ask for a part."""
    parser.addoption("--part", choices=PARTS, help="run the tests on the shared Spark session, or the others, alone")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is of the other part."""
    part = config.getoption("part")
    if part is None:
        return
    asked: dict[bool, list[pytest.Item]] = {True: [], False: []}
    for item in items:
        on_spark = "spark" in getattr(item, "fixturenames", ())
        asked[on_spark is (part == "spark")].append(item)
    items[:] = asked[True]
    config.hook.pytest_deselected(items=asked[False])
