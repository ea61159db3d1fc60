"""The benchmark runs from end to end on little data and prints what it promises; no figure is judged here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ldclient.migrations.types import Stage

from benchmarks import tenants, triggers

pytestmark = pytest.mark.heavy

ROOT = Path(__file__).parents[1]
PEERS = {"identity": {"psql_pipe", "spark_jdbc"}, "transformed": {"spark_jdbc"}, "delta": {"spark_jdbc"}}


def ran(*words: str) -> dict[str, Any]:
    """Run a benchmark and return the object that it prints last."""
    command = [sys.executable, "benchmarks/run.py", *words, "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def test_copy_prints_one_object_last() -> None:
    result = ran("copy", "--rows", "2000", "--repeat", "1")
    assert set(result) == {"benchmark", "rows", "cases", "peak_rss_mb"}
    assert (result["benchmark"], result["rows"]) == ("copy", 2000)
    assert {case["case"]: set(case["peers"]) for case in result["cases"]} == PEERS
    for case in result["cases"]:
        assert set(case) == {"case", "ours_s", "peers", "versus"}
        assert case["ours_s"] > 0
        assert set(case["versus"]) == PEERS[case["case"]]
    assert all(result["peak_rss_mb"][party] > 0 for party in ("ours", "psql_pipe", "spark_jdbc"))


def test_lag_prints_one_object_of_the_same_form() -> None:
    result = ran("lag", "--rate", "100", "--seconds", "1")
    assert [case["case"] for case in result["cases"]] == ["100/s p50", "100/s p99"]
    for case in result["cases"]:
        assert case["ours_s"] > 0
        assert case["peers"].keys() == case["versus"].keys() == {"native"}
    assert all(result["peak_rss_mb"][party] > 0 for party in ("ours", "native"))


def test_writer_prints_one_object_of_the_same_form() -> None:
    result = ran("writer", "--rows", "2000", "--repeat", "1", "--seconds", "1")
    assert set(result) == {"benchmark", "rows", "cases", "peak_rss_mb"}
    assert (result["benchmark"], result["rows"]) == ("writer", 2000)
    assert [case["case"] for case in result["cases"]] == ["backfill p50", "backfill p99", "rest p50", "rest p99"]
    for case in result["cases"]:
        assert set(case) == {"case", "ours_s", "peers", "versus"}
        assert case["ours_s"] > 0
        assert case["peers"].keys() == case["versus"].keys() == {"upsert"}
    assert result["peak_rss_mb"]["ours"] > 0


def test_router_prints_one_object_of_the_same_form() -> None:
    result = ran("router", "--calls", "10", "--repeat", "1", "--writes", "2")
    stages = [name for stage in Stage for name in (stage.value, f"read {stage.value}", f"write {stage.value}")]
    others = ["shadow_slow_secondary", "write_8_threads", "mirrored_8_threads"]
    assert [case["case"] for case in result["cases"]] == [*stages, *others]
    assert all(case["ours_us"] > 0 for case in result["cases"])
    peers = {"write_8_threads": {"psycopg"}, "mirrored_8_threads": {"migrator"}}
    for case in result["cases"]:
        assert case["peers"].keys() == case["versus"].keys() == peers.get(case["case"], {"migrator", "migrator_serial"})


def test_fence_prints_one_object_of_the_same_form() -> None:
    result = ran("fence", "--fences", "2")
    assert (result["benchmark"], result["rows"]) == ("fence", 2)
    assert [case["case"] for case in result["cases"]] == ["pause p50", "pause p99"]
    assert all(case["ours_s"] > 0 and case["peers"].keys() == {"no_fence"} for case in result["cases"])


def test_the_cost_of_triggers_is_told_for_both_tables(old_dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triggers, "ROUNDS", 1)
    monkeypatch.setattr(triggers, "WRITES", 3)
    monkeypatch.setattr(triggers, "LARGE", 50)
    found = triggers.costs(old_dsn)
    kinds = ("insert", "update", "insert_20000_rows")
    assert found.keys() == {f"{what} {where}" for what in kinds for where in ("plain", "logged")}
    assert all(0 < figures["p50"] <= figures["p99"] for figures in found.values())


def test_the_cost_of_tenants_is_told_for_each_way_to_refuse_them(old_dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tenants, "ROUNDS", 1)
    monkeypatch.setattr(tenants, "WRITES", 5)
    found = tenants.measure(old_dsn)
    assert found.keys() == {f"{name} {writers}" for name in ("plain", "share", *tenants.REFUSED) for writers in (1, 4)}
    assert all(0 < figures["p50"] <= figures["p99"] for figures in found.values())
