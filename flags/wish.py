"""The wish: which stage the flag asks for, with the last acknowledged one kept when there is no usable answer.

A missing flag, a misspelt variation, a value of another type, a bad file or a service that can't be reached never moves
a process: it stays where it was and says so, by a warning in the log and a counter. In particular it does not fall back
to `off` after `complete`, which would be the dead store. A forked child starts the SDK anew before its first
evaluation.
"""

from __future__ import annotations

import os
from typing import Protocol

from ldclient import Context, LDClient
from ldclient.interfaces import DataSourceState, DataSourceStatus
from ldclient.migrations.types import Stage

from changeover.flags.alarm import Alarm

EVERYONE = Context.builder("everyone").kind("changeover").build()
"""One context for all rows: they move at once, whatever a rule in the flag says of other contexts."""

_STAGES = {stage.value: stage for stage in Stage}


class StageSource(Protocol):
    """What the router asks for the wish."""

    alarm: Alarm

    def stage(self) -> Stage | None:
        """Return the stage wished for, the last known one, or None when none was ever known (caller's thread)."""
        ...

    def after_fork(self) -> None:
        """Make the source usable in a forked child (first use in the child)."""
        ...


class FlagStage:
    """The stage of one flag of an SDK client, migration flag or string flag alike; thread-safe."""

    def __init__(self, client: LDClient, key: str, context: Context = EVERYONE) -> None:
        self.client = client
        self.key = key
        self.context = context
        self._known: Stage | None = None
        self._pid = os.getpid()
        self._listen()

    def stage(self) -> Stage | None:
        """Evaluate the flag (about 10 microseconds).

        `variation` with None as default, not `migration_variation`: the latter answers its default stage alike when the
        flag says so and when there is no answer, and takes more than twice as long.
        """
        value = self.client.variation(self.key, self.context, None)
        stage = _STAGES.get(value) if isinstance(value, str) else None
        if stage is None:
            self.alarm.raise_for("no answer" if value is None else f"{value!r} is no stage")
            return self._known
        self._known = stage
        return stage

    def after_fork(self) -> None:
        """Restart the SDK's threads, which did not come along; without it the child keeps its first stage for ever."""
        if self._pid != os.getpid():
            self._pid = os.getpid()
            self.client.postfork()
            self._listen()

    def _listen(self) -> None:
        """Hear of a bad file or a lost service, during which the SDK goes on answering from what it has."""
        self.alarm = Alarm(f"flag {self.key} has no usable answer: the last acknowledged stage stays")
        self.client.data_source_status_provider.add_listener(self._source_changed)

    def _source_changed(self, status: DataSourceStatus) -> None:
        if status.state is not DataSourceState.VALID:
            self.alarm.raise_for(f"the flag's source is {status.state.value}")
