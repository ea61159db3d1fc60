"""The flag file: atomic, durable, noticed every time, and never overwritten when it can't be read."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from ldclient import Context, LDClient
from ldclient.impl.integrations.files.file_data_source import _FileDataSource
from ldclient.migrations.types import Stage

from changeover.errors import SpecError
from changeover.flags import flagfile
from changeover.flags.router.desired import EVERYONE

FLAG = "follows-store"
SOMEONE = Context.create("someone")


@pytest.mark.parametrize("stage", list(Stage))
def test_a_stage_reads_back(tmp_path: Path, stage: Stage) -> None:
    path = tmp_path / "flags.json"
    assert flagfile.write_stage(path, FLAG, stage) == 1
    assert flagfile.read_stage(path, FLAG) is stage


def test_a_migration_variation_of_the_sdk_sees_it(flag_file: Path, flag_client: LDClient) -> None:
    stage, _ = flag_client.migration_variation(FLAG, SOMEONE, Stage.COMPLETE)
    assert stage is Stage.OFF


def test_each_write_raises_version_and_modification_time(flag_file: Path) -> None:
    seen = []
    for stage in [*Stage, *Stage]:
        version = flagfile.write_stage(flag_file, FLAG, stage)
        seen.append((version, flag_file.stat().st_mtime))
    assert [version for version, _ in seen] == list(range(2, 14))
    assert all(before < after for (_, before), (_, after) in itertools.pairwise(seen))


def test_other_flags_and_unknown_fields_stay(tmp_path: Path) -> None:
    path = tmp_path / "flags.json"
    path.write_text(
        json.dumps({"flags": {"else": {"key": "else"}, FLAG: {"key": FLAG, "version": 7, "salt": "s", "rules": []}}, "x": 1})
    )
    assert flagfile.write_stage(path, FLAG, Stage.SHADOW) == 8
    document = json.loads(path.read_text())
    assert document["x"] == 1
    assert document["flags"]["else"] == {"key": "else"}
    assert document["flags"][FLAG]["salt"] == "s"
    assert document["flags"][FLAG]["rules"] == []


KIND = "from_user"


@pytest.fixture
def asked(flag_file: Path) -> Callable[..., list[object]]:
    """Return what the real SDK, over its file data source, answers contexts of a kind, and first everybody."""

    def ask(*tenants: str, kind: str = KIND) -> list[object]:
        with flagfile.client(flag_file) as client:
            contexts = [EVERYONE, *(Context.create(tenant, kind) for tenant in tenants)]
            return [client.variation(FLAG, context, None) for context in contexts]

    return ask


@pytest.mark.parametrize("kind", [KIND, "user"])
def test_tenants_are_turned_and_taken_away_again(flag_file: Path, asked: Callable[..., list[object]], kind: str) -> None:
    flagfile.write_stage(flag_file, FLAG, Stage.SHADOW)
    before = flagfile.read_flag(flag_file, FLAG)
    flagfile.write_tenants(flag_file, FLAG, kind, ["7", "Zoë ☂"], Stage.LIVE)
    assert asked("7", "Zoë ☂", "8", kind=kind) == ["shadow", "live", "live", "shadow"]
    flagfile.write_tenants(flag_file, FLAG, kind, ["8"], Stage.LIVE)
    flagfile.write_tenants(flag_file, FLAG, kind, ["7"], Stage.SHADOW)
    assert asked("7", "Zoë ☂", "8", kind=kind) == ["shadow", "shadow", "live", "live"]
    flagfile.write_tenants(flag_file, FLAG, kind, ["8", "Zoë ☂"], Stage.SHADOW)
    left = flagfile.read_flag(flag_file, FLAG)
    assert {**left, "version": 0, "targets": [], "contextTargets": []} == {
        **before, "version": 0, "targets": [], "contextTargets": [],
    }  # fmt: skip
    assert not left.get("contextTargets")
    assert not left.get("targets")


def test_a_tenant_turned_away_from_everybody_goes_back_with_all(flag_file: Path, asked: Callable[..., list[object]]) -> None:
    flagfile.write_stage(flag_file, FLAG, Stage.LIVE)
    flagfile.write_tenants(flag_file, FLAG, KIND, ["7"], Stage.SHADOW)
    assert asked("7", "8") == ["live", "shadow", "live"]
    flagfile.write_stage(flag_file, FLAG, Stage.LIVE)
    assert asked("7", "8") == ["live", "shadow", "live"], "without a kind the targets stay"
    flagfile.write_stage(flag_file, FLAG, Stage.RAMPDOWN, KIND)
    assert asked("7", "8") == ["rampdown"] * 3


def test_targets_of_others_and_rules_stay_and_go_on_to_act(flag_file: Path, asked: Callable[..., list[object]]) -> None:
    flagfile.write_stage(flag_file, FLAG, Stage.SHADOW)
    document = json.loads(flag_file.read_text())
    rule = {"id": "r", "variation": 3, "clauses": [{"contextKind": KIND, "attribute": "key", "op": "in", "values": ["9", "8"]}]}
    document["flags"][FLAG].update(
        targets=[{"values": ["ann"], "variation": 1}], rules=[rule],
        contextTargets=[
            {"contextKind": "user", "values": [], "variation": 1}, {"contextKind": "org", "values": ["x"], "variation": 0},
        ],
    )  # fmt: skip
    flag_file.write_text(json.dumps(document))
    flagfile.write_tenants(flag_file, FLAG, KIND, ["8"], Stage.SHADOW)
    assert asked("8", "9") == ["shadow", "shadow", "live"], "a target for what everybody is asked for, because of the rule"
    assert asked("ann", kind="user") == ["shadow", "dualwrite"]
    assert asked("x", kind="org") == ["shadow", "off"]
    flagfile.write_stage(flag_file, FLAG, Stage.LIVE, KIND)
    assert asked("x", kind="org") == ["live", "off"]


def test_old_style_targets_of_users_go_on_to_act_beside_ours(flag_file: Path, asked: Callable[..., list[object]]) -> None:
    flagfile.write_stage(flag_file, FLAG, Stage.SHADOW)
    document = json.loads(flag_file.read_text())
    document["flags"][FLAG]["targets"] = [{"values": ["ann"], "variation": 1}]
    flag_file.write_text(json.dumps(document))
    assert asked("ann", kind="user") == ["shadow", "dualwrite"]
    flagfile.write_tenants(flag_file, FLAG, KIND, ["7"], Stage.LIVE)
    assert asked("ann", kind="user") == ["shadow", "dualwrite"]
    assert asked("7") == ["shadow", "live"]


def test_a_percentage_rollout_asks_of_everybody_its_first_variation(flag_file: Path, asked: Callable[..., list[object]]) -> None:
    flagfile.write_stage(flag_file, FLAG, Stage.SHADOW)
    former = flagfile.read_flag(flag_file, FLAG)
    document = json.loads(flag_file.read_text())
    weights = [{"variation": 2, "weight": 75_000}, {"variation": 3, "weight": 25_000}]
    document["flags"][FLAG]["fallthrough"] = {"rollout": {"contextKind": KIND, "variations": weights}}
    flag_file.write_text(json.dumps(document))
    assert flagfile.read_stage(flag_file, FLAG) is Stage.SHADOW
    everybody, *tenants = asked(*map(str, range(1_000)))
    assert everybody == "shadow"
    assert 200 < tenants.count("live") < 300
    flagfile.write_tenants(flag_file, FLAG, KIND, ["0", "1", "2", "3"], Stage.SHADOW)
    assert asked("0", "1", "2", "3") == ["shadow"] * 5
    version = flagfile.write_flag(flag_file, FLAG, former)
    assert flagfile.read_flag(flag_file, FLAG) == {**former, "version": version}


def test_a_flag_that_is_off_or_lacks_the_stage_is_one_sentence(flag_file: Path) -> None:
    document = json.loads(flag_file.read_text())
    document["flags"][FLAG]["on"] = False
    flag_file.write_text(json.dumps(document))
    with pytest.raises(SpecError, match="is switched off"):
        flagfile.write_tenants(flag_file, FLAG, KIND, ["7"], Stage.LIVE)
    document["flags"][FLAG].update(on=True, variations=["off", "shadow"])
    flag_file.write_text(json.dumps(document))
    with pytest.raises(SpecError, match="has no variation live"):
        flagfile.write_tenants(flag_file, FLAG, KIND, ["7"], Stage.LIVE)
    assert json.loads(flag_file.read_text()) == document


def test_nothing_is_left_beside_the_file(flag_file: Path) -> None:
    flagfile.write_stage(flag_file, FLAG, Stage.LIVE)
    assert [path.name for path in flag_file.parent.iterdir()] == [flag_file.name]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "not valid JSON"),
        ("[]", "must be an object"),
        ('{"flags": []}', "must be an object"),
        ('{"flags": {"other": {}}}', "there is no flag follows-store: the file has other"),
        (
            '{"flags": {"follows-store": {"on": true, "variations": ["on"], "fallthrough": {"variation": 0}}}}',
            "'on', which is no",
        ),
        (
            '{"flags": {"follows-store": {"on": true, "variations": ["off"], "fallthrough": {"variation": 4}}}}',
            "None, which is no",
        ),
    ],
)
def test_a_bad_file_is_one_sentence(tmp_path: Path, content: str, sentence: str) -> None:
    path = tmp_path / "flags.json"
    path.write_text(content)
    with pytest.raises(SpecError, match=sentence):
        flagfile.read_stage(path, FLAG)


def test_what_cannot_be_read_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "flags.json"
    path.write_text("{ half")
    with pytest.raises(SpecError, match="not valid JSON"):
        flagfile.write_stage(path, FLAG, Stage.LIVE)
    assert path.read_text() == "{ half"


def test_a_missing_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="can't be read"):
        flagfile.read_stage(tmp_path / "none.json", FLAG)


def test_a_running_client_follows_within_a_second(flag_file: Path, flag_client: LDClient, eventually: Callable[..., None]) -> None:
    for stage in [*Stage, Stage.OFF]:
        flagfile.write_stage(flag_file, FLAG, stage)
        eventually(lambda wanted=stage: flag_client.variation(FLAG, SOMEONE, None) == wanted.value, 1.0)


def test_bursts_of_replacements_end_at_the_last(flag_file: Path, flag_client: LDClient, eventually: Callable[..., None]) -> None:
    for last in (Stage.LIVE, Stage.DUALWRITE, Stage.COMPLETE):
        for stage in [*Stage, *Stage, last]:
            flagfile.write_stage(flag_file, FLAG, stage)
        eventually(lambda wanted=last: flag_client.variation(FLAG, SOMEONE, None) == wanted.value, 1.0)


@pytest.fixture
def replaced_while_starting(flag_file: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Replace the file between the SDK's loading it and its noting the time, at the next start."""

    def arm() -> None:
        start_polling = _FileDataSource._start_auto_updater
        missed = [Stage.LIVE]

        def replace_first(source: _FileDataSource) -> object:
            if missed:
                flagfile.write_stage(flag_file, FLAG, missed.pop())
            return start_polling(source)  # type: ignore[no-untyped-call]

        monkeypatch.setattr(_FileDataSource, "_start_auto_updater", replace_first)

    return arm


def test_a_replacement_while_the_sdk_starts_is_not_missed(
    flag_file: Path, replaced_while_starting: Callable[[], None], eventually: Callable[..., None]
) -> None:
    replaced_while_starting()
    client = flagfile.client(flag_file)
    assert flagfile.read_stage(flag_file, FLAG) is Stage.LIVE
    eventually(lambda: client.variation(FLAG, SOMEONE, None) == "live", 1.0)
    client.close()  # type: ignore[no-untyped-call]


def test_a_replacement_while_the_sdk_starts_again_in_a_forked_child_is_not_missed(
    flag_client: LDClient,
    replaced_while_starting: Callable[[], None],
    eventually: Callable[..., None],
    in_child: Callable[[Callable[[], object]], AbstractContextManager[None]],
) -> None:
    def start_again() -> None:
        replaced_while_starting()
        flag_client.postfork()
        eventually(lambda: flag_client.variation(FLAG, SOMEONE, None) == "live", 2.0)

    with in_child(start_again):
        pass


def test_writers_wait_for_each_other_and_readers_see_whole_files(flag_file: Path) -> None:
    def write() -> None:
        for _ in range(25):
            flagfile.write_stage(flag_file, FLAG, Stage.SHADOW)

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    until = time.monotonic() + 120
    while any(thread.is_alive() for thread in threads) and time.monotonic() < until:
        assert flagfile.read_stage(flag_file, FLAG) in Stage
    for thread in threads:
        thread.join()
    assert json.loads(flag_file.read_text())["flags"][FLAG]["version"] == 101
