"""The JVM's launch: Java and Spark start without a word about themselves, and whatever else they say passes through.

Spark's logging is told by `log4j2.properties` to speak of errors alone, and not of those that reach Python as exceptions anyway;
an environment that names a configuration of its own is left alone. What the runtime prints before any logging is there is taken
out of the JVM's standard error, line by line. Under spark-submit the JVM is there before us, and this module does nothing.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Mapping
from importlib import resources

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
    os.environ.setdefault(LOGGING, str(resources.files(__package__).joinpath("log4j2.properties")))
    conf = SparkConf().setAll([(name, str(value)) for name, value in options.items()])
    ours, its = os.pipe()
    try:
        gateway = launch_gateway(conf, popen_kwargs={"stderr": its})  # type: ignore[no-untyped-call]
    finally:
        os.close(its)
        threading.Thread(target=_pass_on, args=(ours,), name="jvm-stderr", daemon=True).start()
    SparkContext._ensure_initialized(gateway=gateway, conf=conf)


def _pass_on(pipe: int) -> None:
    """Write what the JVM says to our own standard error, as if it had inherited it."""
    with open(pipe, "rb") as said:
        for line in said:
            if not OF_ITSELF.match(line):
                os.write(2, line)
