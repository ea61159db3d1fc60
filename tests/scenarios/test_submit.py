"""`spark-submit` from a checkout: the entry scripts are the commands, with their exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.fix_migration import Migration

pytestmark = pytest.mark.heavy

ROOT = Path(__file__).parents[2]


def submit(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).parent / "spark-submit"), "--master", "local[2]", "--driver-memory", "1g"]
    return subprocess.run(
        [*command, "--conf", "spark.ui.enabled=false", script, *arguments], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "PYSPARK_PYTHON": sys.executable}, check=False,
    )  # fmt: skip


def test_a_backfill_by_spark_submit(migration: Migration) -> None:
    migration.prepare()
    done = submit("jobs/backfill.py", migration.spec.path, "--json")
    assert done.returncode == 0, done.stderr[-2000:]
    loads = json.loads(done.stdout.splitlines()[-1])["loads"]
    assert [(load["target"], load["rows"]) for load in loads] == [("store", 2000), ("lake", 2000)]
    migration.assert_equal()


def test_a_wrong_spec_is_one_sentence_and_exit_code_2(tmp_path: Path) -> None:
    spec = tmp_path / "half.toml"
    spec.write_text('name = "half"\n[source', encoding="utf-8")
    done = submit("jobs/backfill.py", str(spec))
    assert done.returncode == 2
    assert "not valid TOML" in done.stdout + done.stderr  # spark-submit merges the two
    assert "Traceback" not in done.stdout + done.stderr
