"""The spec's own checks through real stores: they see what the row comparison can't, and a query that fails is no verdict."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from changeover.cli.main import main
from tests.support.fix_migration import LAKE, STORE, MakeMigration, Migration

ORDERS = """
CREATE TABLE orders (id integer PRIMARY KEY, amount numeric(38,2) NOT NULL, paid_at timestamptz, noted_at timestamptz NOT NULL);
CREATE TABLE helper (id integer);
INSERT INTO orders SELECT i, 12345678901234567890123456789012345.25, timestamptz '2024-03-01 12:00Z' + i * interval '1 hour',
    timestamptz '2024-03-01 00:00:00.000001Z' + i * interval '1 hour' FROM generate_series(1, 9) i
"""

AN_HOUR_OFF = """
[[table]]
source = "public.orders"
target = "payments"
key = ["id"]
[table.columns]
paid_at = "paid_at - interval 1 hour"
[[table.check]]
name = "last paid"
source = "SELECT max(paid_at) FROM orders"
target = "SELECT max(paid_at) FROM payments"
[[table.check]]
name = "per day"
source = "SELECT CAST(noted_at AS date) AS day, count(*), sum(amount), sum(amount), max(noted_at) FROM orders GROUP BY 1"
target = "SELECT CAST(noted_at AS date) AS day, count(*), sum(amount), sum(amount), max(noted_at) FROM payments GROUP BY 1"
[[table.check]]
name = "the helper's"
source = "SELECT count(*) FROM helper"
target = "SELECT count(*) FROM helper"
"""


@pytest.fixture
def tokyo() -> Iterator[None]:
    """Put this process into another zone than UTC: a moment is the same in it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TZ", "Asia/Tokyo")
        time.tzset()
        yield
    time.tzset()


@pytest.fixture
def wrong(make_migration: MakeMigration) -> Migration:
    """Migrate by a transform that is an hour off, through which both sides of the row comparison go."""
    made = make_migration(AN_HOUR_OFF, ORDERS)
    made.new.execute("CREATE TABLE helper (id integer)")
    made.spark.range(0).createOrReplaceTempView("helper")
    made.prepare()
    made.catch_up()
    made.backfill()
    return made


def verified(migration: Migration, *arguments: str) -> Result:
    with migration.capturing():
        return CliRunner().invoke(main, ["verify", migration.spec.path, *arguments])


@pytest.mark.usefixtures("tokyo")
def test_a_check_sees_what_the_comparison_cannot(wrong: Migration, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    done = verified(wrong, "--json", "--report", str(page))
    assert done.exit_code == 1, done.output
    for verdict in json.loads(done.stdout)["verdicts"]:
        assert verdict["verdict"] == "different"
        assert not any(verdict["counts"].values()), "both sides of the row comparison go through the transform"
        checks = {check["name"]: check for check in verdict["checks"]}
        assert {name: check["equal"] for name, check in checks.items()} == {
            "last paid": False, "per day": True, "the helper's": True,
        }  # fmt: skip
        assert checks["last paid"]["first_difference"] == "target alone: ('2024-03-01T20:00:00+00:00',)"
        assert (checks["per day"]["source_rows"], checks["per day"]["target_rows"]) == (1, 1)
    assert page.read_text().count("last paid") == 2
    text = verified(wrong, "--target", LAKE)
    assert text.exit_code == 1
    assert text.stdout.startswith("different\n")
    assert "public.orders in lake: check last paid: different:" in text.stdout
    assert "public.orders in lake: check per day: equal" in text.stdout


def test_a_query_that_fails_is_no_verdict(wrong: Migration) -> None:
    before = {target: verdict.word for target, verdict in wrong.verify().items()}
    assert before == {STORE: "different", LAKE: "different"}
    wrong.spark.catalog.dropTempView("helper")
    lake = verified(wrong, "--target", LAKE, "--json")
    assert (lake.exit_code, lake.stdout) == (3, "")
    assert "could not check public.orders: the target's query of the check the helper's failed (" in lake.stderr
    assert "helper" in lake.stderr.partition("failed (")[2]
    wrong.old.execute("DROP TABLE helper")
    store = verified(wrong, "--target", STORE, "--json")
    assert (store.exit_code, store.stdout) == (3, "")
    said = "the source's query of the check the helper's failed (relation \"helper\" does not exist"
    assert said in store.stderr
    assert len(store.stderr.strip().splitlines()) == 1
    spec = Path(wrong.spec.path)
    spec.write_text(spec.read_text().replace("FROM helper", "FROM public.orders WHERE false", 1))
    assert verified(wrong, "--target", STORE).exit_code == 1, "a check may be corrected midway"
