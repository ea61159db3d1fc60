"""The functions of the example of tenants, each called at once for a user who has moved and for one who has not."""

from __future__ import annotations

import runpy
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from ldclient.migrations.types import Origin, Stage

from changeover.api import Router, load
from changeover.flags import flagfile
from changeover.jobs.ledger.ledger import Ledger
from changeover.position import epoch_floor
from changeover.stores.postgres.gate import install_gate

if TYPE_CHECKING:
    from tests.support.fix_flags import Stores

EXAMPLE = Path(__file__).parents[4] / "examples" / "03-tenants"

TABLES = {
    Origin.OLD: "CREATE TABLE public.follows (from_user bigint, to_channel bigint, PRIMARY KEY (from_user, to_channel))",
    Origin.NEW: (
        "CREATE TABLE public.associations (entity_a bigint, kind text, entity_b bigint, PRIMARY KEY (entity_a, kind, entity_b))"
    ),
}


@pytest.fixture
def application(stores: Stores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Load the example in a folder with its spec, the flag at shadow but for user 7, who has moved."""
    monkeypatch.setenv("OLD_DSN", stores.old_dsn)
    monkeypatch.setenv("NEW_DSN", stores.new_dsn)
    monkeypatch.chdir(tmp_path)
    shutil.copy(EXAMPLE / "changeover.toml", tmp_path)
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
    return runpy.run_path(str(EXAMPLE / "app.py"))


def test_each_user_is_written_and_read_where_authority_over_their_rows_is(stores: Stores, application: dict[str, Any]) -> None:
    follow, follows = (application[name] for name in ("follow", "follows"))
    with Router.connect(load("changeover.toml")) as router:
        assert follow(router, 7, 1) == 1
        assert follow(router, 8, 2) == 1
        assert follows(router, 7) == [1]
        assert follows(router, 8) == [2]
    assert stores.old.execute("SELECT * FROM public.follows").fetchall() == [(8, 2)]
    assert stores.new.execute("SELECT * FROM public.associations").fetchall() == [(7, "follows", 1)]
