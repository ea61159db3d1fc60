"""The desired stage: no answer never moves a process, and says so."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from ldclient import Config, LDClient
from ldclient.integrations.test_data import TestData
from ldclient.migrations.types import Stage

from changeover.flags import flagfile
from changeover.flags.router import desired as desired_module
from changeover.flags.router import desired as wishing
from changeover.flags.router.desired import FlagStage

FLAG = "follows-store"
InChild = Callable[[Callable[[], object]], AbstractContextManager[None]]


def drop_flag(document: dict[str, object]) -> None:
    document["flags"] = {}


def misspell(document: dict[str, object]) -> None:
    document["flags"][FLAG]["variations"] = ["Live"] * 6  # type: ignore[index]


def retype(document: dict[str, object]) -> None:
    document["flags"][FLAG]["variations"] = [True] * 6  # type: ignore[index]


def unindex(document: dict[str, object]) -> None:
    document["flags"][FLAG]["fallthrough"] = {"variation": 17}  # type: ignore[index]


@pytest.fixture(autouse=True)
def asked_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the flag asked at each call: a test sees what it has just switched."""
    monkeypatch.setattr(desired_module, "FRESH_SECONDS", 0.0)


@pytest.mark.parametrize("damage", [drop_flag, misspell, retype, unindex])
def test_a_flag_without_an_answer_keeps_the_last_stage_with_an_alarm(
    flag_file: Path, flag_client: LDClient, eventually: Callable[..., None], caplog: pytest.LogCaptureFixture,
    damage: Callable[[dict[str, object]], None],
) -> None:  # fmt: skip
    desired = FlagStage(flag_client, FLAG)
    flagfile.write_stage(flag_file, FLAG, Stage.COMPLETE)
    eventually(lambda: desired.stage() is Stage.COMPLETE)
    document = json.loads(flag_file.read_text())
    damage(document)
    with caplog.at_level(logging.WARNING, "changeover.flags"):
        flag_file.write_text(json.dumps(document))
        eventually(lambda: desired.stage() is Stage.COMPLETE and desired.alarm.count > 0)
        for _ in range(100):
            assert desired.stage() is Stage.COMPLETE
    assert desired.alarm.count > 100
    assert sum("the last acknowledged stage stays" in message for message in caplog.messages) == 1


def test_a_bad_file_keeps_the_last_stage_with_an_alarm(
    flag_file: Path, flag_client: LDClient, eventually: Callable[..., None]
) -> None:
    desired = FlagStage(flag_client, FLAG)
    flagfile.write_stage(flag_file, FLAG, Stage.COMPLETE)
    eventually(lambda: desired.stage() is Stage.COMPLETE)
    good = flag_file.read_text()
    flag_file.write_text("{ half a fi")
    eventually(lambda: desired.alarm.count == 1)
    assert desired.stage() is Stage.COMPLETE
    flag_file.write_text(good)
    flagfile.write_stage(flag_file, FLAG, Stage.RAMPDOWN)
    eventually(lambda: desired.stage() is Stage.RAMPDOWN)
    assert desired.alarm.count == 1


def test_a_process_that_never_had_an_answer_has_no_wish(tmp_path: Path) -> None:
    client = flagfile.client(tmp_path / "none.json")
    desired = FlagStage(client, FLAG)
    assert desired.stage() is None
    assert desired.alarm.count == 1
    client.close()  # type: ignore[no-untyped-call]


def test_a_plain_string_flag_does_as_well() -> None:
    data = TestData.data_source()
    with LDClient(Config("key", update_processor_class=data, send_events=False)) as client:
        desired = FlagStage(client, FLAG)
        for place, stage in enumerate(Stage):
            data.update(data.flag(FLAG).variations(*[s.value for s in Stage]).fallthrough_variation(place))
            assert desired.stage() is stage


def test_a_forked_child_follows_the_flag(
    flag_file: Path, flag_client: LDClient, eventually: Callable[..., None], in_child: InChild
) -> None:
    desired = FlagStage(flag_client, FLAG)
    assert desired.stage() is Stage.OFF

    def follow() -> None:
        desired.after_fork()
        eventually(lambda: desired.stage() is Stage.LIVE)

    with in_child(follow):
        flagfile.write_stage(flag_file, FLAG, Stage.LIVE)


KIND = "from_user"


def test_a_tenant_is_a_context_of_its_own_kind(flag_file: Path, flag_client: LDClient, eventually: Callable[..., None]) -> None:
    desired = FlagStage(flag_client, FLAG, kind=KIND)
    flagfile.write_stage(flag_file, FLAG, Stage.SHADOW)
    flagfile.write_tenants(flag_file, FLAG, KIND, ["7"], Stage.LIVE)
    eventually(lambda: desired.stage("7") is Stage.LIVE)
    assert (desired.stage(), desired.stage("8")) == (Stage.SHADOW, Stage.SHADOW)
    assert FlagStage(flag_client, FLAG).stage("7") is Stage.SHADOW, "without a kind all rows are one context"


def test_a_tenant_without_an_answer_keeps_its_own_last_stage(
    flag_file: Path, flag_client: LDClient, eventually: Callable[..., None]
) -> None:
    desired = FlagStage(flag_client, FLAG, kind=KIND)
    flagfile.write_stage(flag_file, FLAG, Stage.SHADOW)
    flagfile.write_tenants(flag_file, FLAG, KIND, ["7", "8"], Stage.LIVE)
    eventually(lambda: desired.stage("7") is Stage.LIVE)
    assert desired.stage() is Stage.SHADOW
    document = json.loads(flag_file.read_text())
    drop_flag(document)
    flag_file.write_text(json.dumps(document))
    eventually(lambda: desired.stage() and desired.alarm.count > 0)
    assert (desired.stage("7"), desired.stage("9"), desired.stage()) == (Stage.LIVE, Stage.SHADOW, Stage.SHADOW)
    assert desired.stage("8") is Stage.SHADOW, "never asked for before: as everybody"


def test_what_is_kept_of_tenants_is_bounded_and_only_what_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wishing, "KEPT", 3)
    data = TestData.data_source()
    flag = data.flag(FLAG).variations(*[s.value for s in Stage])
    with LDClient(Config("key", update_processor_class=data, send_events=False)) as client:
        desired = FlagStage(client, FLAG, kind=KIND)
        data.update(flag.fallthrough_variation(2).variation_for_key(KIND, "7", 3))
        assert desired.stage() is Stage.SHADOW
        for tenant in map(str, range(20)):
            desired.stage(tenant)
        assert desired._apart == {"7": Stage.LIVE}
        for tenant in map(str, range(20)):
            flag = flag.variation_for_key(KIND, tenant, 3)
        data.update(flag)
        for tenant in map(str, range(20)):
            assert desired.stage(tenant) is Stage.LIVE
        assert desired._apart == dict.fromkeys(["17", "18", "19"], Stage.LIVE)
        data.update(flag.fallthrough_variation(3))
        assert desired.stage() is Stage.LIVE
        assert desired._apart == {}, "now it is everybody's"


def test_no_tenant_is_at_complete_before_everybody() -> None:
    data = TestData.data_source()
    flag = data.flag(FLAG).variations(*[s.value for s in Stage])
    with LDClient(Config("key", update_processor_class=data, send_events=False)) as client:
        desired = FlagStage(client, FLAG, kind=KIND)
        data.update(flag.fallthrough_variation(3).variation_for_key(KIND, "7", 5))
        assert desired.stage("7") is Stage.RAMPDOWN
        data.update(flag.fallthrough_variation(5))
        assert desired.stage("7") is Stage.COMPLETE
