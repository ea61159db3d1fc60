"""A load and a fence under `python -O`, which takes out every assert: the product guards what it does by errors.

The child is one interpreter with one JVM; its Spark workers are optimized as it is. It judges nothing: this process does, by SQL.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psycopg
import pytest
from ldclient.migrations.types import Origin, Stage

from changeover.flags.fence.fence import fence
from changeover.session import connect
from changeover.spark.launch import spark_session
from changeover.spec import load
from changeover.stores.postgres.gate import FENCED
from tests.support.fix_accounts import ACCOUNTS, MAX_PAUSE, ROWS, SPEC, following, rows, switch
from tests.support.fix_migration import STORE, Migration, spec_text

SECONDS = 900.0
"""How long the child may take: on a busy machine its JVM alone takes a minute."""


def test_a_load_and_a_fence_hold_without_any_assert(old_dsn: str, new_dsn: str, tmp_path: Path) -> None:
    path = tmp_path / "spec.toml"
    path.write_text(spec_text("optimized", SPEC, tmp_path, (STORE,)), encoding="utf-8")
    with connect(old_dsn, "test-old") as old, connect(new_dsn, "test-new") as new:
        old.execute(ACCOUNTS)
        old.execute("INSERT INTO accounts SELECT i, i * 1.5, 'n' || i FROM generate_series(1, %s) i", [ROWS])
        child = subprocess.run(
            [sys.executable, "-O", "-m", "tests.scenarios.test_optimized", str(path)],
            cwd=Path(__file__).parents[2],
            env={**os.environ, "PYTHONOPTIMIZE": "1", "OLD_DSN": old_dsn, "NEW_DSN": new_dsn},
            capture_output=True, text=True, timeout=SECONDS, check=False,
        )  # fmt: skip
        assert child.returncode == 0, child.stderr
        assert json.loads(child.stdout.splitlines()[-1]) == {"debug": False, "loaded": [ROWS], "fence": [1, "new"]}
        assert new.execute("SELECT note FROM ledgers WHERE id = 1").fetchone() == ("before the fence",)
        assert rows(old, "accounts") == rows(new, "ledgers")
        with pytest.raises(psycopg.Error) as refused:
            old.execute("UPDATE accounts SET note = 'beyond the fence' WHERE id = 1")
        assert refused.value.sqlstate == FENCED


def walk(path: str) -> dict[str, Any]:
    """Load, write, and fence the old store; return what came of it."""
    spec = load(path)
    spark = spark_session("optimized", cores=2, memory="1500m", shuffle_partitions=2)
    with connect(spec.source.dsn.resolve(), "test-old") as old, connect(spec.targets[STORE].dsn_value, "test-new") as new:
        migration = Migration(spec, spark, old, new)
        migration.prepare()
        loaded = [part.rows for part in migration.backfill()]
        switch(migration, Stage.SHADOW)
        with following(migration):
            old.execute("UPDATE accounts SET note = 'before the fence' WHERE id = 1")
            fenced = fence(spec, Origin.NEW, max_pause=MAX_PAUSE)
    return {"debug": __debug__, "loaded": loaded, "fence": [fenced.epoch, fenced.store]}


if __name__ == "__main__":
    print(json.dumps(walk(sys.argv[1])))
