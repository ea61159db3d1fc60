"""An experiment: how one kind of read is compared, in the words of GitHub's Scientist.

`clean`, `compare` and `ignore` are the application's own code, as are `publish` and `describe`. Whatever they raise goes to
`raised`, which may be overridden too, and hurts no reader.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psycopg
from ldclient.migrations.types import Origin, Stage

from changeover.flags.alarm import reason_of

log = logging.getLogger("changeover.flags")

Read = Callable[[psycopg.Cursor[Any]], Any]
Answer = Callable[[], Any]
"""What a secondary answers: a cache, a search index, another service; it takes no cursor."""


@dataclass(frozen=True)
class Observation:
    """What a store, or a secondary by its name, answered: a value or an error, and how long that took."""

    origin: Origin | str
    value: Any
    error: BaseException | None
    seconds: float


@dataclass(frozen=True)
class Result:
    """The end of one comparison; `control` is the authority. It matched, mismatched, was ignored, stayed open, or failed.

    `apart` says that it was of a tenant at another store than all the others, and so at another stage.
    """

    experiment: str
    stage: Stage
    control: Observation
    candidate: Observation
    matched: bool
    ignored: bool
    looks: int
    apart: bool = False
    inconclusive: bool = False

    @property
    def failed(self) -> bool:
        """Return whether one had no answer: nothing was compared."""
        return self.control.error is not None or self.candidate.error is not None

    @property
    def mismatched(self) -> bool:
        """Return whether the two differ: two stores for good, a secondary at its one look."""
        return not (self.matched or self.ignored or self.failed or self.inconclusive)

    @property
    def outcome(self) -> str:
        """Return what came of it: matched, mismatched, ignored, inconclusive or failed."""
        known = {"failed": self.failed, "matched": self.matched, "ignored": self.ignored, "inconclusive": self.inconclusive}
        return next((name for name, holds in known.items() if holds), "mismatched")

    @property
    def beside(self) -> str | None:
        """Return the name of the secondary that was asked, None where it was the other store."""
        return self.candidate.origin if isinstance(self.candidate.origin, str) else None


class Experiment:
    """The hooks of one kind of read; override what differs.

    `compare` and those like it get the old store's answer and the new one's. Of a secondary they get
    the authority's answer and the secondary's.
    """

    name = "read"

    def clean(self, value: Any) -> Any:
        """Return what is to be compared of an answer.

        Args:
            value: What a read function returned.

        Returns:
            What is compared in its place.
        """
        return value

    def compare(self, old: Any, new: Any) -> bool:
        """Return whether two cleaned answers are the same.

        Args:
            old: The old store's answer, cleaned.
            new: The new store's answer, cleaned.

        Returns:
            Whether they count as equal.
        """
        return bool(old == new)

    def ignore(self, old: Any, new: Any) -> bool:
        """Return whether this difference is known and doesn't count.

        Args:
            old: The old store's answer, cleaned.
            new: The new store's answer, cleaned.

        Returns:
            Whether the difference is left out of the counts.
        """
        return False

    def run_if(self) -> bool:
        """Return whether this read is compared at all (caller's thread: be quick).

        Returns:
            Whether the other store is asked.
        """
        return True

    def describe(self, old: Any, new: Any) -> str | None:
        """Return a text that names a mismatched read in the ledger, such as its key. It is kept there and shown as it is.

        Args:
            old: The old store's answer, cleaned.
            new: The new store's answer, cleaned.

        Returns:
            The text, of which 200 characters are kept. None keeps nothing of what was read.
        """
        return None

    def publish(self, result: Result) -> None:
        """Take the end of one comparison.

        Args:
            result: Both answers, and how they compare; it may hold values of rows.
        """

    def raised(self, operation: str, error: Exception) -> None:
        """Take a failure of one of the hooks above; raising here would hurt the caller in `run_if` alone.

        Args:
            operation: The hook that raised.
            error: What it raised.
        """
        log.error("experiment %s: %s raised %s", self.name, operation, reason_of(error))


class HookRaised(Exception):
    """A hook failed and `raised` was told; the comparison has no end to publish."""


def hooked(experiment: Experiment, name: str, *values: Any) -> Any:
    """Call a hook by Scientist's rule: its failure goes to the one method that may be overridden.

    Args:
        experiment: Whose hook it is.
        name: The hook.
        values: What it gets.

    Returns:
        What it returns.

    Raises:
        HookRaised: It raised, and `raised` was told.
    """
    try:
        return getattr(experiment, name)(*values)
    except Exception as error:
        experiment.raised(name, error)
        raise HookRaised(name) from error


def ordered(control: Observation, candidate: Observation) -> tuple[Observation, Observation]:
    """Return two answers as the hooks get them: the old store's first, or the authority's before a secondary's (pure).

    Args:
        control: The authority's answer.
        candidate: The other one.

    Returns:
        Both, in order.
    """
    return (candidate, control) if candidate.origin is Origin.OLD else (control, candidate)


def judged(experiment: Experiment, control: Observation, candidate: Observation) -> tuple[bool, bool]:
    """Return whether two answers match, and whether their difference is ignored.

    Args:
        experiment: How they are compared.
        control: The authority's answer.
        candidate: The other one.

    Returns:
        (matched, ignored); neither, where one has no answer.

    Raises:
        HookRaised: A hook raised, and `raised` was told.
    """
    if control.error is not None or candidate.error is not None:
        return False, False
    both = [hooked(experiment, "clean", one.value) for one in ordered(control, candidate)]
    matched = bool(hooked(experiment, "compare", *both))
    return matched, not matched and bool(hooked(experiment, "ignore", *both))


def repeated(experiment: Experiment, one: Observation, again: Observation) -> bool:
    """Return whether a store gave the same answer twice.

    Args:
        experiment: How answers are compared.
        one: Its first answer.
        again: Its second one.

    Returns:
        Whether both are the same, cleaned.

    Raises:
        HookRaised: A hook raised, and `raised` was told.
    """
    both = [hooked(experiment, "clean", answer.value) for answer in (one, again)]
    return bool(hooked(experiment, "compare", *both))
