"""The one Spark session of a test run, made the way the product makes it.

A session costs seconds and a JVM, so all tests share it: a test takes a folder or a database of its own and leaves the
session's settings as they were.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from pyspark.sql import SparkSession

from changeover.spark.launch import spark_session


@pytest.fixture(scope="session")
def spark() -> Iterator[SparkSession]:
    """Yield the session with Delta and the pinned settings."""
    session = spark_session("changeover-tests", cores=2, memory="1500m", shuffle_partitions=2)
    yield session
    session.stop()
