"""The model's explorations: each world once a run, and what they came to on the terminal."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.model.kernel import Explored
from tests.model.report import total
from tests.model.worlds import explored

RESULTS = pytest.StashKey[dict[str, Explored]]()


@pytest.fixture(scope="session")
def exploration(request: pytest.FixtureRequest) -> Callable[[str], Explored]:
    """Return the function that explores a world of that name under the product's rules."""
    results = request.config.stash.setdefault(RESULTS, {})

    def explore(name: str) -> Explored:
        results[name] = explored(name)
        return results[name]

    return explore


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the count and the time."""
    results = config.stash.get(RESULTS, {})
    if results:
        terminalreporter.write_line(f"model: {total(results)}")
