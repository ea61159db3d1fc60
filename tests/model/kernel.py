"""The explorer: every state that a world can reach, breadth first, so that the first wrong one has a shortest schedule.

A world is a set of processes whose steps are atomic; the explorer takes every interleaving of them. States are hashed, so a
state that many schedules reach is judged once; how many schedules that covers is counted over the graph afterwards. Worlds
have bounded work and bounded crashes: their graphs have no cycle, and the count proves it.
"""

from __future__ import annotations

import time
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Protocol, TypeVar

State = TypeVar("State", bound=Hashable)


class World(Protocol[State]):
    """What the explorer asks of a world; all of it is pure."""

    @property
    def name(self) -> str:
        """Return how reports call it."""
        ...

    def start(self) -> State:
        """Return the state in which nothing has happened."""
        ...

    def steps(self, state: State) -> Iterable[tuple[str, State]]:
        """Yield (what happens, state after it) for every step that some process can take."""
        ...

    def wrong(self, state: State) -> str | None:
        """Return which invariant a state breaks, or None."""
        ...

    def wrong_end(self, state: State) -> str | None:
        """Return what is wrong where nothing more can happen, or None."""
        ...


@dataclass(frozen=True)
class Wrong:
    """A wrong state: what is broken there, and the steps that lead to it."""

    reason: str
    schedule: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join([f"wrong: {self.reason}", *(f"  {n:2d}. {step}" for n, step in enumerate(self.schedule, 1))])


@dataclass(frozen=True)
class Explored:
    """What an exploration saw, in seconds of one core; `schedules` is 0 where it ended at a wrong state."""

    world: str
    states: int
    steps: int
    schedules: int
    seconds: float
    wrong: Wrong | None


def explore(world: World[State]) -> Explored:
    """Visit every reachable state, or stop at the first wrong one; raises ValueError for a world that can go in a circle."""
    began = time.process_time()
    first = world.start()
    numbers, states = {first: 0}, [first]
    came: list[tuple[int, str]] = [(-1, "")]
    after: list[list[int]] = []
    for number, state in enumerate(states):  # grows while it is walked
        following = []
        for label, successor in world.steps(state):
            known = numbers.get(successor)
            if known is None:
                known = numbers[successor] = len(states)
                states.append(successor)
                came.append((number, label))
            following.append(known)
        after.append(following)
        reason = world.wrong(state) or (None if following else world.wrong_end(state))
        if reason:
            wrong = Wrong(reason, _schedule(came, number))
            return Explored(world.name, len(states), sum(map(len, after)), 0, time.process_time() - began, wrong)
    schedules = count_schedules(after)
    return Explored(world.name, len(states), sum(map(len, after)), schedules, time.process_time() - began, None)


def _schedule(came: list[tuple[int, str]], number: int) -> tuple[str, ...]:
    steps = []
    while number > 0:
        number, label = came[number]
        steps.append(label)
    return tuple(reversed(steps))


def count_schedules(after: list[list[int]]) -> int:
    """Return how many distinct paths lead from the first state to one without successors, given each state's successors."""
    before = [0] * len(after)
    for following in after:
        for number in following:
            before[number] += 1
    ways = [0] * len(after)
    ways[0], ready, done, ends = 1, [0], 0, 0
    while ready:
        number = ready.pop()
        done += 1
        if not after[number]:
            ends += ways[number]
        for successor in after[number]:
            ways[successor] += ways[number]
            before[successor] -= 1
            if not before[successor]:
                ready.append(successor)
    if done != len(after):
        raise ValueError("the world can go in a circle: its schedules have no number")
    return ends
