"""What an exploration says of itself: a line a world, and the totals."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from tests.model.kernel import Explored


def lines(results: Mapping[str, Explored]) -> Iterator[str]:
    """Yield a line for each world, its wrong schedule if there is one, and the totals."""
    width = max(map(len, results), default=0)
    for name, one in results.items():
        yield f"{name:{width}} {one.states:>9,} states {one.steps:>11,} steps {one.schedules:>10.2g} schedules {one.seconds:6.1f} s"
        if one.wrong:
            yield str(one.wrong)
    yield total(results)


def total(results: Mapping[str, Explored]) -> str:
    """Return the totals in one sentence."""
    found = list(results.values())
    return (
        f"{len(found)} worlds: {sum(one.schedules for one in found):,} distinct schedules over"
        f" {sum(one.states for one in found):,} distinct states and {sum(one.steps for one in found):,} steps,"
        f" {sum(one.wrong is not None for one in found)} wrong ends, in {sum(one.seconds for one in found):.1f} s of one core"
    )
