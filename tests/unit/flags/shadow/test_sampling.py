"""Sampling: a share of one's own and the flag's check ratio, which the SDK's tracker does not apply once more."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ldclient import LDClient
from ldclient.migrations.types import Origin, Stage

from changeover.flags import flagfile
from changeover.flags.router.desired import FlagStage
from changeover.flags.router.endpoint import Cursor
from changeover.flags.router.router import Router
from changeover.flags.shadow import sampling as sampled
from changeover.flags.shadow.sampling import Sampling
from tests.support.fix_flags import FLAG, PATIENCE, PATIENT, Follow, FollowRead, MakeRouter, Stores, wait_until


def ask(path: Path, ratio: int | None) -> None:
    """Make the flag file ask for a check ratio, as LaunchDarkly's console does."""
    flag = flagfile.read_flag(path, FLAG)
    flagfile.write_flag(path, FLAG, {**flag, "migration": {} if ratio is None else {"checkRatio": ratio}})


@pytest.mark.parametrize(("share", "ratio", "expected"), [
    (1.0, 1, 1.0), (0.5, 1, 0.5), (1.0, 4, 0.25), (0.5, 4, 0.125), (0.0, 1, 0.0), (1.0, 0, 0.0),
])  # fmt: skip
def test_both_ratios_count(monkeypatch: pytest.MonkeyPatch, share: float, ratio: int, expected: float) -> None:
    numbers = iter([number / 1000 for number in range(1000)])
    monkeypatch.setattr(sampled, "random", lambda: next(numbers))
    sampling = Sampling(share, lambda: ratio)
    taken = sum(sampling.takes() for _ in range(1000))
    assert (taken, sampling.left_out) == (1000 * expected, 1000 - 1000 * expected)


@pytest.mark.parametrize("share", [-0.1, 1.1])
def test_a_share_is_one(share: float) -> None:
    with pytest.raises(ValueError, match="from 0 to 1"):
        Sampling(share)


def test_the_ratio_is_the_flags_and_each_read_counts_without_one(flag_file: Path, flag_client: LDClient) -> None:
    stage = FlagStage(flag_client, FLAG)
    assert stage.check_ratio() == 1
    for asked, ratio in ((10, 10), (0, 0), (-1, 0), (1, 1), (None, 1), (25, 25)):
        ask(flag_file, asked)
        wait_until(lambda ratio=ratio: stage.check_ratio() == ratio)  # type: ignore[misc]
    flagfile.write_stage(flag_file, FLAG, Stage.LIVE)
    wait_until(lambda: stage.stage() is Stage.LIVE)
    assert stage.check_ratio() == 25, "a switch keeps it"
    assert FlagStage(flag_client, "nowhere").check_ratio() == 1


def test_a_read_that_is_left_out_is_answered_and_counted_and_no_other_store_is_asked(
    stores: Stores, flag_file: Path, make_router: MakeRouter, set_stage: Callable[[Router, Stage], None],
    make_follow: Callable[..., Follow],
) -> None:  # fmt: skip
    router, follow, asked = make_router(), make_follow(1), []
    set_stage(router, Stage.SHADOW)
    stores.old.execute("INSERT INTO follows (from_user, to_channel) VALUES (1, 1)")

    def other(cursor: Cursor) -> Any:
        asked.append("the other store")
        return follow.find_new(cursor)

    def read() -> int:
        beside = {"cache": lambda: asked.append("cache")}
        return len(router.compare(old=follow.find_old, new=other, experiment=FollowRead(), beside=beside))

    ask(flag_file, 0)
    wait_until(lambda: router._running().comparisons.sampling.share == 0.0)
    assert [read() for _ in range(20)] == [1] * 20
    assert router.drain(PATIENCE)
    counters = router.counters()["comparisons"]
    assert (counters["sampled_out"], counters["compared"], counters["dropped"], asked) == (20, 0, 0, [])
    ask(flag_file, 1)
    wait_until(lambda: router._running().comparisons.sampling.share == 1.0)
    assert read() == 1
    wait_until(lambda: {*asked} == {"the other store", "cache"})


def test_a_share_of_the_process_holds_without_a_flag_that_says_anything(
    stores: Stores, make_router: MakeRouter, set_stage: Callable[[Router, Stage], None], make_follow: Callable[..., Follow]
) -> None:
    router = make_router(limits=replace(PATIENT, compare_share=0.0))
    set_stage(router, Stage.SHADOW)
    follow = make_follow(1)
    assert router.compare(old=follow.find_old, new=follow.find_new) == []
    assert router.counters()["comparisons"]["sampled_out"] == 1
    assert stores.rows(Origin.OLD) == []
