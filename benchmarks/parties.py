"""The parties: the product's backfill, two psql pipes, and plain Spark JDBC, each in a process of its own.

A party does the same three things for each run: `set_up` (not timed), `copy` (timed) and `tear_down` (not timed). Both
Spark parties have a session of their own with the same cores and memory, kept warm for the whole benchmark.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Protocol

from psycopg.conninfo import conninfo_to_dict

from benchmarks.follows import Case
from changeover.session import connect
from changeover.spark import jdbc
from changeover.spark.launch import spark_session

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

CORES = 2
MEMORY = "2g"
APPLICATION = "changeover:benchmark:party"
PARTITIONS = 4


@dataclass(frozen=True)
class Job:
    """What a party has to copy, and where: two databases, the server's programs, and a folder of the party's own."""

    case: Case
    old: str
    new: str
    programs: Path
    folder: Path

    @property
    def delta(self) -> Path:
        """Return the folder of the Delta table."""
        return self.folder / "lake" / self.case.target


class Party(Protocol):
    """One way to copy the table."""

    def set_up(self, job: Job) -> None:
        """Make ready what is not part of the copy; the target table is there and empty."""

    def copy(self, job: Job) -> None:
        """Copy all rows."""

    def tear_down(self, job: Job) -> None:
        """Remove what `set_up` made."""


class Ours:
    """The backfill step: planned chunks, the kept snapshot, the gate, the ledger, and the closing of the table."""

    def __init__(self) -> None:
        self.spark = spark_session("benchmark-ours", cores=CORES, memory=MEMORY)

    def set_up(self, job: Job) -> None:
        """Prepare the migration: slot, snapshot, ledger, gate."""
        from changeover.jobs.prepare import prepare
        from changeover.spec import load

        os.environ["BENCHMARK_OLD"], os.environ["BENCHMARK_NEW"] = job.old, job.new
        path = job.folder / f"{job.case.name}.toml"
        path.write_text(spec_text(job), encoding="utf-8")
        self.spec = load(path)
        prepare(self.spec, self.spark)

    def copy(self, job: Job) -> None:
        """Run the backfill."""
        from changeover.jobs.load.copier import backfill

        backfill(self.spec, self.spark)

    def tear_down(self, job: Job) -> None:
        """Abort the migration."""
        from changeover.jobs.finalize import abort

        abort(self.spec)


def spec_text(job: Job) -> str:
    """Return the spec of a case as TOML."""
    case, folder = job.case, job.folder
    place = 'kind = "postgres"\ndsn = "env:BENCHMARK_NEW"'
    if case.kind == "delta":
        place = f'kind = "delta"\npath = "{folder}/lake"\n[ledger]\ndsn = "env:BENCHMARK_NEW"'
    columns = "\n".join(f'{name} = "{text}"' for name, text in case.columns.items())
    key = ", ".join(f'"{name}"' for name in case.key)
    return (
        f'name = "bench_{case.name}"\n[source]\ndsn = "env:BENCHMARK_OLD"\n[target.new]\n{place}\n'
        f'[[table]]\nsource = "public.follows"\ntarget = "{case.target}"\nkey = [{key}]\n[table.columns]\n{columns}\n'
        f'[work]\npath = "{folder}/work"\n'
    )


class SparkJdbc:
    """Plain Spark: a JDBC read in four ranges of the key, the same expressions, and a batched JDBC or Delta write."""

    def __init__(self) -> None:
        self.spark = spark_session("benchmark-peer", cores=CORES, memory=MEMORY)

    def set_up(self, job: Job) -> None:
        """Nothing: Spark reads and writes as it is."""

    def copy(self, job: Job) -> None:
        """Read, transform and write in one job."""
        case = job.case
        frame = self._source(job).selectExpr(*(f"{text} AS `{name}`" for name, text in case.expressions().items()))
        if case.kind == "delta":
            frame.write.format("delta").mode("append").save(str(job.delta))
            return
        options = jdbc.options(job.new, APPLICATION)
        # without stringtype the server takes no string for jsonb
        options["url"] += "?reWriteBatchedInserts=true&stringtype=unspecified"
        frame.write.format("jdbc").options(**options, dbtable=case.target, batchsize="10000").mode("append").save()

    def tear_down(self, job: Job) -> None:
        """Remove the Delta table."""
        shutil.rmtree(job.delta, ignore_errors=True)

    def _source(self, job: Job) -> DataFrame:
        with connect(job.old, APPLICATION) as old:
            row = old.execute("SELECT min(from_user), max(from_user) + 1 FROM follows").fetchone()
        assert row is not None
        return (
            self.spark.read.format("jdbc")
            .options(**jdbc.options(job.old, APPLICATION), dbtable="follows", fetchsize="10000")
            .options(partitionColumn="from_user", lowerBound=str(row[0]), upperBound=str(row[1]), numPartitions=PARTITIONS)
            .load()
        )


class PsqlPipe:
    """Two psql pipes side by side, each half of the key's range in COPY's binary format; no gate and no resume."""

    def set_up(self, job: Job) -> None:
        """Find the middle of the key."""
        with connect(job.old, APPLICATION) as old:
            row = old.execute("SELECT percentile_disc(0.5) WITHIN GROUP (ORDER BY from_user) FROM follows").fetchone()
        assert row is not None
        self.middle = int(row[0])

    def copy(self, job: Job) -> None:
        """Run both pipes to their end."""
        pipes = [_pipe(job, f"from_user {side} {self.middle}") for side in ("<=", ">")]
        codes = [process.wait() for pipe in pipes for process in pipe]
        if any(codes):
            raise RuntimeError(f"psql ended with {codes}")

    def tear_down(self, job: Job) -> None:
        """Nothing is left."""


def _pipe(job: Job, condition: str) -> list[subprocess.Popen[bytes]]:
    """Start one pipe: psql reads, psql writes."""
    read = f"COPY (SELECT * FROM follows WHERE {condition}) TO STDOUT (FORMAT binary)"
    reader = _psql(job, job.old, read, stdout=subprocess.PIPE)
    writer = _psql(job, job.new, f"COPY {job.case.target} FROM STDIN (FORMAT binary)", stdin=reader.stdout)
    assert reader.stdout is not None
    reader.stdout.close()  # the writer alone holds the pipe, so each sees the other's end
    return [reader, writer]


def _psql(job: Job, dsn: str, command: str, stdin: IO[bytes] | None = None, stdout: int | None = None) -> subprocess.Popen[bytes]:
    parts = {name: str(value) for name, value in conninfo_to_dict(dsn).items() if value is not None}
    names = {"PGHOST": "host", "PGPORT": "port", "PGUSER": "user", "PGPASSWORD": "password", "PGDATABASE": "dbname"}
    environment = {**os.environ, **{name: parts[key] for name, key in names.items()}}
    arguments = [str(job.programs / "psql"), "-X", "-q", "-v", "ON_ERROR_STOP=1", "-c", command]
    return subprocess.Popen(arguments, env=environment, stdin=stdin, stdout=stdout)


PARTIES: Mapping[str, Callable[[], Party]] = {"ours": Ours, "psql_pipe": PsqlPipe, "spark_jdbc": SparkJdbc}
