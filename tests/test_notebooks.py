"""The notebook runs from top to bottom on what a comparison left behind, and names the cause."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from pyspark.sql import SparkSession

from changeover.jobs.transform.masking import MASK, hashed
from changeover.verifiers.compare.diff import compare
from changeover.verifiers.compare.differences import ensure_table
from changeover.verifiers.compare.verdict import Range

NOTEBOOK = Path(__file__).parent.parent / "notebooks" / "diff_investigation.ipynb"


def read_notebook() -> Any:
    """The library has no types for a notebook."""
    return nbformat.read(NOTEBOOK, as_version=4)  # type: ignore[no-untyped-call]


def run_notebook(work: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return all that its cells print or show."""
    monkeypatch.setenv("CHANGEOVER_WORK", str(work))
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(work / "jupyter"))
    monkeypatch.setenv("IPYTHONDIR", str(work / "ipython"))
    notebook = read_notebook()
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "\n".join(output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs)


def test_it_goes_from_the_differences_to_the_cause(spark: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = spark.sql("SELECT id, timestamp '2026-03-01 10:00:00' + make_interval(0,0,0,id) AS at FROM range(6)")
    source = source.selectExpr("cast(id AS int) id", "at", "'Ann ' name", "cast(NULL AS string) note", "0 _changeover_range")
    target = source.selectExpr("id", "at + interval 2 hours at", "trim(name) name", "'' note", "_changeover_range").where("id < 5")
    diff = compare(
        source, target, table="public.t", store="new", key=("id",), pg_types={}, ranges=(Range(0, None, None),),
        differences=tmp_path / "differences", run="r1",
    )  # fmt: skip
    assert diff.counts["mismatched"] == 5
    hidden = compare(
        source.where("id = 3"), target.where("id = 3"), table="public.t", store="new", key=("id",), pg_types={},
        ranges=(Range(0, None, None),), differences=tmp_path / "differences", run="r2", sensitive=("id", "name"),
    )  # fmt: skip
    assert hidden.counts["mismatched"] == 1

    text = run_notebook(tmp_path, monkeypatch)

    assert "7 differing rows of 2 runs" in text
    assert f"id={hashed('3')}" in text
    assert MASK in text
    assert "at: 6 keys: timezone shift: the target is off by 0 days 02:00:00 in every pair" in text
    assert "name: 6 keys: white space at the ends" in text
    assert "note: 6 keys: NULL on one side is empty text on the other" in text
    assert "missing" in text


def test_it_runs_where_nothing_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ensure_table(tmp_path / "differences")
    assert "0 differing rows of 0 runs" in run_notebook(tmp_path, monkeypatch)


def test_no_output_is_kept_in_the_repository() -> None:
    notebook = read_notebook()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)
