"""The launch of Spark: one session with the settings that correctness needs, on a JVM without a word about itself.

`log4j2.properties` has Spark log errors alone, and not those that reach Python as exceptions
anyway. An environment that names a configuration of its own is left alone. What the runtime prints
before any logging is there is taken out of the JVM's standard error, line by line. Under
spark-submit the JVM is there before us, and `start` does nothing. Whatever else it says passes
through.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import threading
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from changeover.files.folders import umask
from changeover.spark import java

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

LOGGING = "LOG4J_CONFIGURATION_FILE"
"""Log4j's environment variable for its configuration."""

OF_ITSELF = re.compile(rb"WARNING: Using incubator modules: ")
"""What the runtime says about the options that Spark's launcher gives it, whoever starts it."""


def start(options: Mapping[str, object]) -> None:
    """Start the JVM with Spark's options unless this process has one already (driver)."""
    from pyspark import SparkConf, SparkContext
    from pyspark.java_gateway import launch_gateway

    if SparkContext._gateway is not None:
        return
    logging.getLogger("py4j").setLevel(logging.CRITICAL)  # it tells of a call that broke off, which it raises anyway
    os.environ.setdefault(LOGGING, str(resources.files(__package__).joinpath("log4j2.properties")))
    conf = SparkConf().setAll([(name, str(value)) for name, value in options.items()])
    ours, its = os.pipe()
    try:
        # a signal to our process group is ours to answer; the JVM ends with its standard input, which is when we do
        gateway = launch_gateway(conf, popen_kwargs={"stderr": its, "process_group": 0})  # type: ignore[no-untyped-call]
    finally:
        os.close(its)
        threading.Thread(target=_pass_on, args=(ours,), name="jvm-stderr", daemon=True).start()
    SparkContext._ensure_initialized(gateway=gateway, conf=conf)


def _pass_on(pipe: int) -> None:
    """Write what the JVM says to our own standard error, as if it had inherited it."""
    with open(pipe, "rb") as output:
        for line in output:
            if not OF_ITSELF.match(line):
                os.write(2, line)


def spark_session(
    app_name: str, *, cores: int | None = None, memory: str = "2g", shuffle_partitions: int = 4, scratch: Path | None = None,
    brief: bool = False,
) -> SparkSession:  # fmt: skip
    """Return a Spark session with Delta and the pinned settings (driver).

    What Spark spills, which are rows, goes to the folder `scratch`, else to where Spark's own
    default is. Under spark-submit the cluster's master and memory win; the SQL settings that
    correctness needs are set in any case.

    Args:
        app_name: The application's name.
        cores: On how many cores a session of our own runs; None takes all.
        memory: The driver's memory, as Spark reads it.
        shuffle_partitions: Into how many partitions a shuffle goes.
        scratch: The folder for what Spark spills.
        brief: Whether a JVM of our own lives for minutes and not for hours.

    Returns:
        The session, which may have been there before.

    Raises:
        JavaMissing: No fitting Java is there.
    """
    from pyspark import SparkContext
    from pyspark.logger import PySparkLogger
    from pyspark.sql import SparkSession

    java.require()
    options: dict[str, bool | float | int | str | None] = {
        "spark.app.name": app_name,
        "spark.sql.extensions": "io.delta.sql.DeltaSparkSessionExtension",
        "spark.sql.catalog.spark_catalog": "org.apache.spark.sql.delta.catalog.DeltaCatalog",
    }
    if SparkContext._active_spark_context is None and not _submitted():
        os.environ.setdefault("PYSPARK_PYTHON", sys.executable)  # tasks need the packages of this interpreter
        options |= {
            "spark.master": f"local[{cores or '*'}]",
            "spark.driver.memory": memory,
            "spark.driver.host": "127.0.0.1",
            "spark.driver.bindAddress": "127.0.0.1",
            "spark.ui.enabled": "false",
            "spark.ui.showConsoleProgress": "false",
            # else each call that builds a column asks the JVM ten times more: two thirds of what a plan costs
            "spark.python.sql.dataFrameDebugging.enabled": "false",
            "spark.sql.shuffle.partitions": str(shuffle_partitions),
            "spark.databricks.delta.snapshotPartitions": "1",
            "spark.scheduler.mode": "FAIR",
            "spark.hadoop.fs.permissions.umask-mode": f"{umask():03o}",  # Hadoop's own is not the process's
            **({"spark.driver.extraJavaOptions": BRIEF} if brief else {}),
            **({"spark.local.dir": str(scratch), "spark.sql.warehouse.dir": str(scratch / "warehouse")} if scratch else {}),
        }
        start(options)
    spark = SparkSession.builder.config(map=options).getOrCreate()
    for name in QUERY_LOGGERS:
        PySparkLogger.getLogger(name).setLevel(logging.CRITICAL)
    logging.getLogger().addFilter(_not_of_the_bridge)
    for name, value in SQL_SETTINGS.items():
        spark.conf.set(name, value)
    return spark


BRIEF = "-XX:TieredStopAtLevel=1 -XX:ReservedCodeCacheSize=400m -XX:+UseSerialGC"
"""Options of a JVM that lives for minutes: most of its time goes into compiling itself, which the first compiler does faster."""

QUERY_LOGGERS = ("SQLQueryContextLogger", "DataFrameQueryContextLogger")
"""PySpark's own: they print an error that is raised anyway, with the JVM's traceback and the values of rows."""


def _not_of_the_bridge(record: logging.LogRecord) -> bool:
    """Leave out what py4j logs as the root: a call that broke off, by Ctrl-C as by an error, which it raises anyway."""
    return f"{os.sep}py4j{os.sep}" not in record.pathname


SQL_SETTINGS = {
    "spark.sql.session.timeZone": "UTC",
    "spark.sql.ansi.enabled": "true",  # a value that does not fit is an error, never a NULL
    "spark.sql.execution.arrow.maxRecordsPerBatch": "20000",
    "spark.sql.adaptive.enabled": "false",  # our frames know their partitions; re-planning costs more than it gains
    "spark.databricks.delta.schema.autoMerge.enabled": "false",
    # one physical form for all files of a lake, whoever writes them: readers take INT96 and shifted days for other moments
    "spark.sql.parquet.outputTimestampType": "TIMESTAMP_MICROS",
    "spark.sql.parquet.writeLegacyFormat": "false",
    "spark.sql.parquet.datetimeRebaseModeInWrite": "CORRECTED",
    "spark.sql.parquet.datetimeRebaseModeInRead": "CORRECTED",
    "spark.sql.parquet.int96RebaseModeInWrite": "CORRECTED",
    "spark.sql.parquet.int96RebaseModeInRead": "CORRECTED",
}


def _submitted() -> bool:
    """Return whether spark-submit has already started the JVM, whose own configuration then counts."""
    return "PYSPARK_GATEWAY_PORT" in os.environ or "SPARK_ENV_LOADED" in os.environ
