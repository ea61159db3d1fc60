"""The suite in parts: the tests on the run's one Spark session, all others, and of those the quick ones.

`spark` and `others` run side by side: a part has servers and folders of its own, and each test is in one of the two. `quick` is of
the others those that need neither server nor Java nor many seconds. A test says so by its fixtures or by the mark `heavy`, and a
quick run refuses to start a server or Java. Without `--part` a run is of all tests.
"""

from __future__ import annotations

import os
import runpy
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

SPARK, OTHERS, QUICK = PARTS = ("spark", "others", "quick")

NEED = frozenset({"any_server", "demo", "exploration", "kept_demo", "server", "tls_server"})
"""Fixtures that a quick test does without: servers, a run of the demo, the whole model."""

REFUSING = Path(__file__).parent / "quick" / "sitecustomize.py"
RECORD = pytest.StashKey[Path]()
"""The file in which a quick run's refusals stand."""

EXAMPLES = 15
"""Examples of a property in a quick run. `make test` tries as many as the suite's own settings say."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let `make quick` and `make test` ask for a part."""
    parser.addoption("--part", choices=PARTS, help="run the tests on Spark, the others, or the quick ones of these")


def pytest_configure(config: pytest.Config) -> None:
    """Name the mark, and keep a quick run quick."""
    config.addinivalue_line("markers", "heavy: not in the quick part: starts a server or Java by itself, or takes seconds")
    if config.getoption("part") == QUICK:
        settings.register_profile(QUICK, settings.get_profile("suite"), max_examples=EXAMPLES)
        settings.load_profile(QUICK)
        refuse(config)


def refuse(config: pytest.Config) -> None:
    """Refuse servers and Java from now on, here and in all Python processes that are started from here."""
    handle, record = tempfile.mkstemp(prefix="changeover-refused-")
    os.close(handle)
    config.stash[RECORD] = Path(record)
    config.add_cleanup(config.stash[RECORD].unlink)
    path = os.pathsep.join([str(REFUSING.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = pytest.MonkeyPatch()
    config.add_cleanup(environment.undo)
    environment.setenv("PYTHONPATH", path)
    environment.setenv(runpy.run_path(str(REFUSING))["VARIABLE"], record)


@pytest.fixture(autouse=True)
def no_server_and_no_java(pytestconfig: pytest.Config) -> Iterator[None]:
    """Fail a quick test that was refused a server or Java, even if nobody let the exception through."""
    yield
    record = pytestconfig.stash.get(RECORD, None)
    if record is not None and (refused := record.read_text()):
        record.write_text("")
        pytest.fail(f"a quick test starts a server or Java: {refused}")


def in_part(part: str, item: pytest.Item) -> bool:
    """Return whether a test belongs to a part."""
    fixtures = frozenset(getattr(item, "fixturenames", ()))
    if part == SPARK or SPARK in fixtures:
        return part == SPARK and SPARK in fixtures
    return part == OTHERS or not (fixtures & NEED or item.get_closest_marker("heavy"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is not of the part."""
    part = config.getoption("part")
    if part is None:
        return
    asked: dict[bool, list[pytest.Item]] = {True: [], False: []}
    for item in items:
        asked[in_part(part, item)].append(item)
    items[:] = asked[True]
    config.hook.pytest_deselected(items=asked[False])
