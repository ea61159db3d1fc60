"""The README's lines for an application of tenants run as they stand, on its own example."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from ldclient.migrations.types import Origin, Stage

from changeover.flags import flagfile
from changeover.jobs.ledger.ledger import Ledger
from changeover.position import epoch_floor
from changeover.stores.postgres.gate import install_gate

if TYPE_CHECKING:
    from tests.support.fix_flags import Stores

ROOT = Path(__file__).parents[4]
BLOCKS = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
SET_UP = next(text for text in BLOCKS if "Router.connect" in text)
CALLS = next(text for text in BLOCKS if "tenant=user" in text)

TABLES = {
    Origin.OLD: "CREATE TABLE public.follows (from_user bigint, to_channel bigint, PRIMARY KEY (from_user, to_channel))",
    Origin.NEW: (
        "CREATE TABLE public.associations (entity_a bigint, kind text, entity_b bigint, PRIMARY KEY (entity_a, kind, entity_b))"
    ),
}


def to_new(row: Any) -> Any:
    return {"entity_a": row["from_user"], "kind": "follows", "entity_b": row["to_channel"]}


def to_old(row: Any) -> Any:
    return {"from_user": row["entity_a"], "to_channel": row["entity_b"]}


@pytest.fixture
def application(stores: Stores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run the README's set-up in a folder with its spec, the flag at shadow but for user 7, who has moved."""
    monkeypatch.setenv("OLD_DSN", stores.old_dsn)
    monkeypatch.setenv("NEW_DSN", stores.new_dsn)
    monkeypatch.chdir(tmp_path)
    Path("follows.toml").write_text((ROOT / "examples/tenants.toml").read_text(encoding="utf-8"))
    Path("work").mkdir()
    flagfile.write_stage("work/flags.json", "follows-store", Stage.SHADOW)
    flagfile.write_tenants("work/flags.json", "follows-store", "from_user", ["7"], Stage.LIVE)
    for session, origin, key in (
        (stores.old, Origin.OLD, ("from_user", "to_channel")), (stores.new, Origin.NEW, ("entity_a", "kind", "entity_b")),
    ):  # fmt: skip
        name = {Origin.OLD: "follows", Origin.NEW: "associations"}[origin]
        session.execute("DROP SCHEMA IF EXISTS changeover CASCADE")
        session.execute(f"DROP TABLE public.{name}")
        session.execute(TABLES[origin])
        install_gate(session, "public", name, key, epoch_floor(0))
    Ledger(stores.new, "follows", stores.new_dsn).create()
    stores.move(1, "new", "7")
    mapping = types.ModuleType("my_app.mapping")
    mapping.__dict__.update(to_new=to_new, to_old=to_old)
    monkeypatch.setitem(sys.modules, "my_app", types.ModuleType("my_app"))
    monkeypatch.setitem(sys.modules, "my_app.mapping", mapping)
    names: dict[str, Any] = {}
    exec(SET_UP, names)
    exec(CALLS, names)
    return names


def test_each_user_is_written_and_read_where_authority_over_their_rows_is(stores: Stores, application: dict[str, Any]) -> None:
    with application["router"] as router:
        application["follow"](7, 1)
        application["follow"](8, 2)
        assert application["follows"](7) == [1]
        assert application["follows"](8) == [2]
        assert router.drain(10)
        counters = router.counters()
        assert counters["mirror_old"]["applied"] == counters["mirror_new"]["applied"] == 1
        assert (counters["comparisons"]["compared"], counters["comparisons"]["mismatched"]) == (2, 0)
    assert stores.old.execute("SELECT * FROM public.follows ORDER BY 1").fetchall() == [(7, 1), (8, 2)]
    assert stores.new.execute("SELECT * FROM public.associations ORDER BY 1").fetchall() == [(7, "follows", 1), (8, "follows", 2)]
