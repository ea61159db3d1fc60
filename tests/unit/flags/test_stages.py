"""The table of stages says what the SDK's own migrator does, and a desired stage acts only as far as authority goes."""

from __future__ import annotations

import itertools

import pytest
from ldclient import Config, Context, LDClient, Result
from ldclient.integrations.test_data import TestData
from ldclient.migrations import MigratorBuilder
from ldclient.migrations.types import ExecutionOrder, Origin, Stage

from changeover.flags.stages import ORDER, TABLE, effective, needs_fence, next_stage, other, previous_stage


def asked_by_the_sdk(stage: Stage, operation: str) -> list[Origin]:
    """Return which stores the SDK's migrator asks at a stage, in its order."""
    data = TestData.data_source()
    data.update(data.flag("f").variations(*[s.value for s in Stage]).fallthrough_variation(list(Stage).index(stage)))
    asked: list[Origin] = []

    def ask(origin: Origin, _payload: object) -> Result:
        asked.append(origin)
        return Result.success(origin)

    with LDClient(Config("key", update_processor_class=data, send_events=False)) as client:
        builder = MigratorBuilder(client).read_execution_order(ExecutionOrder.SERIAL)
        for method in (builder.read, builder.write):
            method(lambda payload: ask(Origin.OLD, payload), lambda payload: ask(Origin.NEW, payload))
        migrator = builder.build()
        assert not isinstance(migrator, str)
        getattr(migrator, operation)("f", Context.create("c"), Stage.OFF)
    return asked


@pytest.mark.parametrize("stage", list(Stage))
def test_the_table_agrees_with_the_sdk(stage: Stage) -> None:
    rule = TABLE[stage]
    assert asked_by_the_sdk(stage, "read") == [rule.reads, other(rule.reads)][: 1 + rule.compares]
    assert asked_by_the_sdk(stage, "write") == [rule.writes, other(rule.writes)][: 1 + rule.mirrors]


def test_the_order_is_the_sdks() -> None:
    assert tuple(Stage) == ORDER


def test_steps_up_and_down() -> None:
    assert [next_stage(stage) for stage in ORDER] == [*ORDER[1:], None]
    assert [previous_stage(stage) for stage in ORDER] == [None, *ORDER[:4], None]


def test_a_flag_with_fewer_stages_goes_from_one_of_its_own_to_the_next() -> None:
    four = {Stage.OFF, Stage.SHADOW, Stage.LIVE, Stage.COMPLETE}
    assert [next_stage(stage, four) for stage in ORDER] == [
        Stage.SHADOW, Stage.SHADOW, Stage.LIVE, Stage.COMPLETE, Stage.COMPLETE, None,
    ]  # fmt: skip
    assert [previous_stage(stage, four) for stage in ORDER] == [None, Stage.OFF, Stage.OFF, Stage.SHADOW, Stage.LIVE, None]
    assert next_stage(Stage.OFF, {Stage.OFF, Stage.COMPLETE}) is Stage.COMPLETE


def test_fences_stand_where_authority_moves_and_where_the_old_store_stops_receiving() -> None:
    steps = {(low.value, high.value) for low, high in itertools.pairwise(ORDER) if needs_fence(low, high)}
    assert steps == {("shadow", "live"), ("rampdown", "complete")}
    back = {(high.value, low.value) for low, high in itertools.pairwise(ORDER) if needs_fence(high, low)}
    assert back == {("live", "shadow")}
    assert needs_fence(Stage.OFF, Stage.LIVE)
    assert needs_fence(Stage.RAMPDOWN, Stage.OFF)
    assert not needs_fence(Stage.OFF, Stage.SHADOW)
    assert not needs_fence(Stage.LIVE, Stage.LIVE)


@pytest.mark.parametrize("recorded", [None, *Stage])
@pytest.mark.parametrize("desired", list(Stage))
def test_nobody_acts_beyond_what_is_on_record_behind_the_fence(desired: Stage, recorded: Stage | None) -> None:
    stage = effective(desired, Origin.NEW, recorded)
    unbounded = effective(desired, Origin.NEW, Stage.COMPLETE)
    highest = recorded if recorded in (Stage.RAMPDOWN, Stage.COMPLETE) else Stage.LIVE
    assert stage is min(unbounded, highest, key=ORDER.index)
    assert effective(desired, Origin.OLD, recorded) is effective(desired, Origin.OLD, Stage.COMPLETE)


@pytest.mark.parametrize("desired", list(Stage))
@pytest.mark.parametrize("authority", list(Origin))
def test_a_wish_never_writes_where_authority_is_not(desired: Stage, authority: Origin) -> None:
    stage = effective(desired, authority, Stage.COMPLETE)
    assert TABLE[stage].writes is authority
    if TABLE[desired].writes is authority:
        assert stage is desired
    else:
        assert stage is (Stage.SHADOW if authority is Origin.OLD else Stage.LIVE)
