"""Tenants by name without a fence: which there are, how they are written, who is astray, and what is refused before anything."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner, Result
from ldclient.migrations.types import Origin, Stage

from changeover.cli.main import main
from changeover.errors import Refused, UsageError
from changeover.flags import flagfile, history
from changeover.flags.cutover import commands as cutover
from changeover.flags.cutover import discovery
from changeover.flags.cutover.discovery import Astray, Census
from changeover.flags.cutover.moves import Apart, apart, some, together
from changeover.flags.observed import Observation, Observations
from changeover.jobs.ledger.records import Stream
from changeover.spec import Spec, load

if TYPE_CHECKING:
    from tests.support.fix_flags import Stores

FLAG, KIND = "follows-store", "from_user"
SPEC = """
name = "follows"
[source]
dsn = "env:OLD_DSN"
[target.new]
kind = "postgres"
dsn = "env:NEW_DSN"
[[table]]
source = "public.follows"
target = "public.associations"
key = ["subject", "object"]
[table.columns]
subject = "from_user"
object = "to_channel"
[work]
path = "{folder}"
[flag]
key = "follows-store"
target = "new"
file = "{folder}/flags.json"
"""
SPLIT = Observations(1, Observation(0, Origin.OLD), {"7": Observation(1, Origin.NEW)})


@pytest.fixture
def spec(stores: Stores, flag_file: Path, monkeypatch: pytest.MonkeyPatch) -> Spec:
    """Return the spec of a migration that is on record, its flag at shadow and its stores without a row."""
    monkeypatch.setenv("OLD_DSN", stores.old_dsn)
    monkeypatch.setenv("NEW_DSN", stores.new_dsn)
    path = flag_file.with_name("follows.toml")
    path.write_text(f'{SPEC.format(folder=flag_file.parent)}context = "{KIND}"\n')
    flagfile.write_stage(flag_file, FLAG, Stage.SHADOW)
    made = load(path)
    stores.ledger.record_migration(made, Stream(0, "1", 1, "none", "none", "none", "none"))
    return made


def run(command: str, spec: Spec, *more: str) -> Result:
    done = CliRunner().invoke(main, ["flags", command, spec.path, *more])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exc_info
    return done


def follows(stores: Stores, *users: int) -> None:
    for user in users:
        stores.old.execute("INSERT INTO public.follows SELECT %s, c FROM generate_series(1, 20) c", [user])


@pytest.fixture
def counted(spec: Spec) -> Callable[[Observations], Astray]:
    """Return a census that counts at every look."""
    made = Census(spec)

    def look(known: Observations) -> Astray:
        made._due = 0.0
        return made.look(known)

    return look


def rollout(flag_file: Path, live: int) -> None:
    """Turn the flag to live for some thousandths of a percent of the tenants, as LaunchDarkly's console does."""
    document = json.loads(flag_file.read_text())
    weights = [{"variation": 2, "weight": 100_000 - live}, {"variation": 3, "weight": live}]
    document["flags"][FLAG]["fallthrough"] = {"rollout": {"contextKind": KIND, "variations": weights}}
    flag_file.write_text(json.dumps(document))


def test_the_flag_is_asked_of_every_tenant_that_has_rows(
    stores: Stores, counted: Callable[[Observations], Astray], flag_file: Path
) -> None:
    assert counted(Observations()) == Astray()
    flagfile.write_tenants(flag_file, FLAG, KIND, ["7", "9"], Stage.LIVE)
    assert counted(Observations()) == Astray(), "nobody has a row"
    follows(stores, 7, 8)
    assert counted(Observations()) == Astray(up=("7",))
    assert counted(SPLIT) == Astray()
    flagfile.write_tenants(flag_file, FLAG, KIND, ["7"], Stage.SHADOW)
    assert counted(SPLIT) == Astray(back=("7",))
    stores.old.execute("DELETE FROM public.follows")
    assert counted(SPLIT) == Astray(back=("7",)), "it is on record"
    flagfile.write_stage(flag_file, FLAG, Stage.LIVE)
    assert counted(Observations(1, Observation(1, Origin.NEW))) == Astray()


def test_a_percentage_rollout_is_followed_by_tenant(
    stores: Stores, counted: Callable[[Observations], Astray], flag_file: Path
) -> None:
    follows(stores, *range(200))
    rollout(flag_file, 25_000)
    quarter = counted(Observations()).up
    assert 25 < len(quarter) < 75
    rollout(flag_file, 50_000)
    half = counted(Observations()).up
    assert set(quarter) < set(half)
    known = Observations(1, Observation(0, Origin.OLD), {name: Observation(1, Origin.NEW) for name in half})
    assert counted(known) == Astray()
    rollout(flag_file, 25_000)
    assert set(counted(known).back) == set(half) - set(quarter)


def test_an_answer_that_is_no_stage_moves_nobody(counted: Callable[[Observations], Astray], flag_file: Path) -> None:
    document = json.loads(flag_file.read_text())
    document["flags"][FLAG]["variations"][2] = "Shadow"
    flag_file.write_text(json.dumps(document))
    assert counted(SPLIT) == Astray()
    flag_file.write_text("{ half a fi")
    assert counted(SPLIT) == Astray()


def test_a_count_is_repeated_less_often_the_longer_it_takes_and_the_flag_is_asked_only_when_it_changed(
    stores: Stores, spec: Spec, flag_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[Any] = []
    lent: list[Any] = []
    count, lend = discovery.present, flagfile.loaded
    monkeypatch.setattr(discovery, "present", lambda *told: (counts.append(told), count(*told))[1])  # type: ignore[func-returns-value]
    monkeypatch.setattr(flagfile, "loaded", lambda path: (lent.append(path), lend(path))[1])  # type: ignore[func-returns-value]
    monkeypatch.setattr(discovery, "SHARE", 1e6)
    made = Census(spec)
    for _ in range(5):
        made.look(Observations())
    assert (len(counts), len(lent)) == (1, 1)
    flagfile.write_stage(flag_file, FLAG, Stage.LIVE)
    for _ in range(5):
        made.look(Observations())
    for _ in range(5):
        made.look(SPLIT)
    assert (len(counts), len(lent)) == (1, 3)


@pytest.mark.parametrize("indexed", [True, False])
def test_the_tenants_of_a_table_are_counted_with_an_index_and_without(stores: Stores, indexed: bool) -> None:
    key = "(org, n)" if indexed else "(n, org)"
    stores.old.execute(f"CREATE TABLE public.members (org text, n integer, PRIMARY KEY {key})")
    stores.old.execute(
        'INSERT INTO public.members SELECT o, n FROM unnest(\'{b,a,"Zoë ☂",""}\'::text[]) o, generate_series(1, 9) n'
    )
    assert set(discovery.present(stores.old, "public", "members", "org", 10)) == {"Zoë ☂", "a", "b"}
    assert len(discovery.present(stores.old, "public", "members", "org", 2)) <= 2
    row = stores.old.execute(discovery.LEADS_AN_INDEX, ["public.members", "org"]).fetchone()
    assert row == (indexed,)


def test_many_rows_of_few_tenants_are_not_read(stores: Stores) -> None:
    stores.old.execute("INSERT INTO public.follows SELECT u, c FROM generate_series(1, 5) u, generate_series(1, 20000) c")
    stores.old.execute("VACUUM ANALYZE public.follows")
    with stores.old.transaction():
        stores.old.execute("SELECT pg_stat_force_next_flush()")
    before = _read(stores)
    assert discovery.present(stores.old, "public", "follows", KIND, 100) == ["1", "2", "3", "4", "5"]
    stores.old.execute("SELECT pg_stat_force_next_flush()")
    assert _read(stores) - before < 100


def _read(stores: Stores) -> int:
    row = stores.old.execute(
        "SELECT seq_tup_read + coalesce((SELECT sum(idx_tup_read) FROM pg_stat_user_indexes WHERE relname = 'follows'), 0)"
        " FROM pg_stat_user_tables WHERE relname = 'follows'"
    ).fetchone()
    assert row is not None
    return int(row[0])


def test_a_name_is_brought_to_the_form_that_postgresql_prints(stores: Stores, spec: Spec) -> None:
    assert discovery.spelled(spec, ["007", "7", "-3"]) == ["7", "-3"]
    for name in ("ann", "7_0", "1.5", "9" * 20):
        with pytest.raises(UsageError, match=f"tenant {name} is no bigint, which from_user is"):
            discovery.spelled(spec, [name])
    stores.old.execute("ALTER TABLE public.follows ALTER from_user TYPE uuid USING NULL::uuid")
    assert discovery.spelled(spec, ["A0EEBC999C0B4EF8BB6D6BB9BD380A11"]) == ["a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"]
    stores.old.execute("ALTER TABLE public.follows ALTER from_user TYPE text USING from_user::text")
    assert discovery.spelled(spec, [" 007"]) == [" 007"]


def test_tenants_without_a_row_in_either_store_are_told(stores: Stores, spec: Spec) -> None:
    follows(stores, 7)
    stores.new.execute("INSERT INTO public.associations VALUES (8, 1, '{}', NULL, now())")
    assert discovery.unknown(spec, ["7", "8", "9"]) == ("9",)
    for kind in ("text", "varchar(9)"):
        stores.old.execute(f"ALTER TABLE public.follows ALTER from_user TYPE {kind}")
        stores.new.execute(f"ALTER TABLE public.associations ALTER subject TYPE {kind}")
        assert discovery.unknown(spec, ["7", "8", "Zoë ☂"]) == ("Zoë ☂",)
    stores.old.execute("ALTER TABLE public.follows ALTER from_user TYPE uuid USING md5(from_user)::uuid")
    stores.new.execute("ALTER TABLE public.associations ALTER subject TYPE uuid USING md5(subject)::uuid")
    assert discovery.unknown(spec, ["8f14e45f-ceea-167a-5a36-dedd4bea2543", "8" * 32]) == ("8" * 32,)


BAD = [
    (["--tenant", ""], 2, "a tenant's name is empty: name one, or leave --tenant out and all rows move"),
    (["--tenant", "ann"], 2, "tenant ann is no bigint, which from_user is: give the value as a row has it"),
    ([part for name in range(10_001) for part in ("--tenant", str(name))], 2, "10,001 tenants are more than 10,000 at once"),
]


@pytest.mark.parametrize("command", ["advance", "rollback"])
@pytest.mark.parametrize(("options", "code", "sentence"), BAD, ids=["empty", "type", "many"])
def test_bad_names_are_one_sentence(spec: Spec, command: str, options: list[str], code: int, sentence: str) -> None:
    before = flagfile.read_flag(spec.work / "flags.json", FLAG)
    refused = run(command, spec, *options)
    assert refused.exit_code == code
    assert refused.stderr.startswith(f"changeover: {sentence}")
    assert refused.stderr.count("\n") == 1
    assert flagfile.read_flag(spec.work / "flags.json", FLAG) == before


@pytest.mark.parametrize("command", ["advance", "rollback"])
def test_without_a_column_no_tenant_is_named(spec: Spec, command: str) -> None:
    path = Path(spec.path)
    path.write_text(path.read_text().replace(f'context = "{KIND}"', ""))
    refused = run(command, load(path), "--tenant", "7")
    assert (refused.exit_code, "flag.context: is missing: name the column" in refused.stderr) == (2, True)


def test_tenants_move_between_shadow_and_live_alone(stores: Stores, spec: Spec) -> None:
    file = spec.work / "flags.json"
    for stage in (Stage.OFF, Stage.DUALWRITE):
        flagfile.write_stage(file, FLAG, stage)
        refused = run("advance", spec, "--tenant", "7", "--override", "test")
        assert (refused.exit_code, f"and everybody is at {stage.value}" in refused.stderr) == (1, True)
    flagfile.write_stage(file, FLAG, Stage.SHADOW)
    refused = run("rollback", spec, "--tenant", "7")
    assert (refused.exit_code, refused.stderr) == (
        1, "changeover: flags rollback: 1 tenant (7) at the old store already: below shadow all rows go together\n",
    )  # fmt: skip
    stores.move(1, "new", "7")
    refused = run("advance", spec, "--tenant", "7", "--override", "test")
    assert (refused.exit_code, "1 tenant (7) live already: rampdown and complete are of all rows" in refused.stderr) == (1, True)


def test_at_rampdown_no_tenant_goes_back_alone_and_below_shadow_it_may(stores: Stores, spec: Spec) -> None:
    file = spec.work / "flags.json"
    stores.move(1, "new", "7")
    flagfile.write_stage(file, FLAG, Stage.DUALWRITE)
    refused = run("rollback", spec, "--tenant", "8")
    assert (refused.exit_code, "at the old store already" in refused.stderr) == (1, True), "it is asked where it is, no more"
    stores.move(2, "new")
    stores.record(Stage.RAMPDOWN)
    flagfile.write_stage(file, FLAG, Stage.RAMPDOWN)
    refused = run("rollback", spec, "--tenant", "7")
    assert (refused.exit_code, "and everybody is at rampdown" in refused.stderr) == (1, True)


def test_the_gate_is_asked_and_its_no_is_on_record(stores: Stores, spec: Spec) -> None:
    refused = run("advance", spec, "--tenant", "7")
    assert refused.exit_code == 1
    assert "not ready for live" in refused.stderr
    assert flagfile.read_flag(spec.work / "flags.json", FLAG).get("contextTargets", []) == []
    _, step, outcome, told = stores.ledger.audits()[0]
    assert (step, outcome, told["tenants"], told["count"]) == (history.STEP, "refused", ["7"], 1)


def test_a_fence_that_does_not_come_about_puts_the_flag_back_as_it_was(spec: Spec, flag_file: Path) -> None:
    rollout(flag_file, 0)
    flagfile.write_tenants(flag_file, FLAG, KIND, ["9"], Stage.LIVE)
    former = flagfile.read_flag(flag_file, FLAG)
    refused = run("advance", spec, "--tenant", "7", "--override", "test")
    assert (
        refused.exit_code,
        "no tenant moves alone: tenants move one by one only where they can come back" in refused.stderr,
    ) == (1, True), refused.stderr
    found = flagfile.read_flag(flag_file, FLAG)
    assert found == {**former, "version": former["version"] + 2}


def test_rampdown_waits_until_no_tenant_is_at_the_old_store(stores: Stores, spec: Spec) -> None:
    file = spec.work / "flags.json"
    stores.move(1, "new")
    stores.move(2, "old", "7", "8")
    flagfile.write_stage(file, FLAG, Stage.LIVE)
    flagfile.write_tenants(file, FLAG, KIND, ["7", "8"], Stage.SHADOW)
    refused = run("advance", spec, "--override", "test")
    sentence = "rampdown is of all rows, and 2 tenants (7, 8) are at the old store: `changeover flags advance --tenant` comes first"
    assert (refused.exit_code, refused.stderr) == (1, f"changeover: flags advance: {sentence}\n")
    shown = run("show", spec)
    assert sentence in shown.stdout
    assert "at the old store: 2 tenants (7, 8), epoch 2" in shown.stdout
    flagfile.write_stage(file, FLAG, Stage.RAMPDOWN)
    with pytest.raises(Refused, match="rampdown is of all rows"):
        cutover._follow(spec)


def test_the_page_names_the_tenants_that_stand_apart(stores: Stores, spec: Spec) -> None:
    stores.move(1, "new", *map(str, range(10, 1_010)))
    stores.move(2, "new", "7")
    shown = run("show", spec)
    assert (
        "stage shadow, authority old (epoch 0)\nat the new store: 1,001 tenants (10, 100, 1000, 1001, 1002, …), epoch 1, 2\n"
        in (shown.stdout)
    )
    assert "next: live: no-go" in shown.stdout
    assert "back: shadow: every write since the new store has authority would be lost" in shown.stdout
    told = json.loads(run("show", spec, "--json").stdout)
    assert told["apart"] == {
        "store": "new", "count": 1_001, "first": ["10", "100", "1000", "1001", "1002"], "epochs": [1, 2],
    }  # fmt: skip
    assert (told["stage"], told["back"]) == ("shadow", "shadow")


def test_what_is_told_of_some_tenants() -> None:
    assert some(["9"]) == "1 tenant (9)"
    assert some(list("hgfedcba")) == "8 tenants (a, b, c, d, e, …)"
    assert apart(Observations()) is None
    assert apart(SPLIT) == Apart("new", 1, ("7",), (1,))
    for stage in Stage:
        assert together(SPLIT, stage) is None, "the others are at the old store, so they go with all"


@pytest.mark.parametrize("told", [(["7"], "7"), ([7], "7"), ([], "empty"), ([None], "empty"), ("77", "are one text, '77'")])
def test_in_python_it_is_the_same(spec: Spec, told: Any) -> None:
    names, said = told
    with pytest.raises((Refused, UsageError), match=said):
        cutover.rollback(spec, tenants=names)
