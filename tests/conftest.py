"""The fixtures of all tests: each concern is a plugin of its own.

Every fixture runs the real part: servers, Spark and the SDK are started by the tests, so that no test is skipped.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

pytest_plugins = [f"tests.support.{path.stem}" for path in sorted(Path(__file__).parent.glob("support/fix_*.py"))]

for plugin in pytest_plugins:  # before the first is loaded, since plugins import each other
    pytest.register_assert_rewrite(plugin)

# Every JVM of the suite compiles once and quickly: its rows are few, and compiling again for speed took half of all its CPU. What
# a query gives is the same. The cache is made large, because without the second compiler it is 48 MB, and a full one stops all.
os.environ.setdefault("SPARK_SUBMIT_OPTS", "-XX:TieredStopAtLevel=1 -XX:ReservedCodeCacheSize=400m -XX:+UseSerialGC")

# an example may take as long as the machine makes it; what fails is printed so that it can be run again
settings.register_profile("suite", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("long", settings.get_profile("suite"), max_examples=100)
settings.load_profile("suite")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let `make chaos` and the stress last longer than the suite's short forms."""
    parser.addoption("--chaos-seconds", type=float, default=25.0, help="how long processes are killed in test_chaos")
    parser.addoption("--stress-trials", type=int, default=6, help="trials under the product's rules in test_stress")
