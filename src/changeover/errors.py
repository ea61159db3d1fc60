"""Everything that can go wrong, as one tree of exceptions.

Each class carries its inputs as fields and builds one sentence from them: what, where, what to do.
It knows the exit code of the command line and whether a retry may help (`transient`). It survives a
pickle round trip, because Spark sends exceptions from tasks to the driver. A wrong row is never an
exception: it is data in a verdict.

    ChangeoverError                    3
    ├── UsageError                     2   the request itself is wrong
    │   ├── SpecError                      the spec file, by key or line
    │   ├── SecretMissing                  an env: reference without a value
    │   └── StepOrder                      a step was asked for before the one that it needs
    ├── Refused                        1   the answer is no
    │   ├── UnsafePlan                     the preflight found reasons
    │   ├── TargetNotEmpty                 a target table had rows before prepare
    │   ├── NotReady                       the evidence for the next stage does not hold
    │   ├── ChangesUntold                  a mirrored write changed more rows than it told of
    │   └── TableStopped                   a table met what this version does not carry
    ├── CouldNotFinish                 3   nothing is lost, run it again
    │   ├── ServerUnavailable              a connection failed or broke
    │   ├── DatabaseFailed                 the server refused a statement
    │   ├── RowsHidden                     a policy would hide rows from our role
    │   ├── TextRefused                    a text that the other side's encoding has no place for
    │   ├── LockNotGranted                 a bounded wait for a lock ended
    │   ├── AuthorityMoving                an application's write met a fence
    │   ├── SlotBlocked                    open transactions held up a replication slot
    │   ├── SnapshotLost                   the exported snapshot is gone
    │   ├── SourceChanged                  another system, timeline, slot or table file than prepared
    │   ├── SpoolGap                       the slot is ahead of the durable spool
    │   ├── LeaseHeld                      another run of the same step is alive
    │   ├── CouldNotCheck                  a comparison that has no answer
    │   ├── FenceCalledOff                 the handover took longer than max_pause
    │   ├── RowRefused                     a row can't be represented in the target
    │   ├── FolderFailed                   a folder is full, read-only, gone or not ours
    │   ├── JavaMissing                    Spark can't start
    │   └── EmbeddedServerFailed           the server of our own could not be made, started or stopped
    └── Interrupted                  130   Ctrl-C
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, ClassVar


class ChangeoverError(Exception):
    """Base of all errors of changeover: one sentence, an exit code, and whether a retry may help."""

    exit_code: ClassVar[int] = 3
    transient: ClassVar[bool] = False

    def __reduce__(self) -> tuple[Any, ...]:
        """Rebuild from the fields, so that a task's error arrives whole on the driver."""
        return type(self), _values(self) if is_dataclass(type(self)) else self.args


def _values(error: Any) -> tuple[Any, ...]:
    return tuple(getattr(error, field.name) for field in fields(error))


class UsageError(ChangeoverError):
    """The request itself is wrong: another try of the same changes nothing."""

    exit_code = 2


class Refused(ChangeoverError):
    """The request is understood and the answer is no."""

    exit_code = 1


class CouldNotFinish(ChangeoverError):
    """The work did not end; what was done is kept and the same command goes on from there."""

    transient = True


def together(reasons: Sequence[Exception]) -> Exception:
    """Return what is raised for several errors that were gathered: the one reason, or all in one sentence.

    Args:
        reasons: The errors, one at least.

    Returns:
        The error to raise.
    """
    sentences = list(dict.fromkeys(map(sentence, reasons)))
    return reasons[0] if len(sentences) == 1 else CouldNotFinish("; ".join(sentences))


def sentence(error: Exception) -> str:
    """Return an error's sentence; that of somebody else's error may hold a row, so it is the name alone.

    Args:
        error: The error.

    Returns:
        The sentence, or the class's name.
    """
    return str(error) if isinstance(error, ChangeoverError) else type(error).__name__


@dataclass(eq=False)
class SpecError(UsageError):
    """The spec file is wrong at `where` (a key path or a line)."""

    path: str
    where: str
    problem: str

    def __str__(self) -> str:
        return f"{self.path}: {self.where}: {self.problem}"


@dataclass(eq=False)
class SecretMissing(UsageError):
    """A spec value refers to an environment variable that is not set."""

    key: str
    variable: str

    def __str__(self) -> str:
        return f"{self.key} refers to the environment variable {self.variable}, which is not set: export it and run again"


@dataclass(eq=False)
class StepOrder(UsageError):
    """A step was asked for before the one that it needs."""

    step: str
    needs: str

    def __str__(self) -> str:
        return f"{self.step} needs {self.needs} first: run `changeover {self.needs} SPEC`, or `changeover run SPEC` for all steps"


@dataclass(eq=False)
class UnsafePlan(Refused):
    """The preflight found reasons against the plan."""

    reasons: tuple[str, ...]

    def __str__(self) -> str:
        return "refused: " + "; ".join(self.reasons)


@dataclass(eq=False)
class TargetNotEmpty(Refused):
    """A target table had rows before prepare."""

    target: str
    table: str

    def __str__(self) -> str:
        return (
            f"target {self.target}: table {self.table} has rows from before prepare, which nothing could tell from migrated "
            f"ones: empty it or name another table in the spec"
        )


@dataclass(eq=False)
class NotReady(Refused):
    """The evidence for the next stage does not hold."""

    stage: str
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        return f"not ready for {self.stage}: " + "; ".join(self.reasons)


@dataclass(eq=False)
class ChangesUntold(Refused):
    """A write of an application that mirrors changed more rows than it told the mirror of, and was rolled back.

    It bears the SQLSTATE of a serialization failure, so that `Router.run` runs the unit anew, as often as it does for one.
    Two transactions that insert one key by ON CONFLICT may leave a row in the counts that is nobody's.
    """

    table: str
    changed: int
    told: int

    sqlstate = "40001"

    def __str__(self) -> str:
        return (
            f"a write changed {self.changed} rows of {self.table} and told the mirror of {self.told}, so nothing was committed:"
            " give store.mirror() every row, as returned(cursor) after RETURNING *; what triggers and cascades change counts, too"
        )


@dataclass(eq=False)
class TableStopped(Refused):
    """A table met something that this version does not carry; the table stops, nothing is ignored."""

    table: str
    reason: str

    def __str__(self) -> str:
        return (
            f"table {self.table} is stopped: {self.reason}; its target is as it was before that point: "
            f"`changeover prepare --anew SPEC` begins all anew, `changeover abort SPEC` leaves the old store as it was"
        )


@dataclass(eq=False)
class ServerUnavailable(CouldNotFinish):
    """A connection failed or broke midway."""

    server: str
    problem: str

    def __str__(self) -> str:
        return (
            f"{self.server} can't be reached or broke off ({self.problem}): check the DSN and the server, then run the same"
            f" command again"
        )


@dataclass(eq=False)
class DatabaseFailed(CouldNotFinish):
    """The server refused a statement."""

    server: str
    doing: str
    problem: str

    def __str__(self) -> str:
        return f"{self.server} refused while {self.doing}: {self.problem}"


@dataclass(eq=False)
class RowsHidden(CouldNotFinish):
    """A policy would hide rows from our role, so the server refused the statement instead of leaving them out.

    `role` is as it stands in a statement, quoted where we know it.
    """

    server: str
    role: str
    problem: str
    transient: ClassVar[bool] = False

    def __str__(self) -> str:
        return (
            f"{self.server}: row-level security would hide rows from {self.role} ({self.problem}): ALTER ROLE {self.role}"
            f" BYPASSRLS, or GRANT the table's owner to {self.role} where the table has no FORCE ROW LEVEL SECURITY; then run again"
        )


@dataclass(eq=False)
class TextRefused(CouldNotFinish):
    """A text, or bytes that are none, for which the other side's encoding has no place."""

    server: str
    doing: str
    problem: str
    transient: ClassVar[bool] = False

    def __str__(self) -> str:
        return (
            f"{self.server}: a text has no place in the other side's encoding, met while {self.doing} ({self.problem}): correct it,"
            f" `changeover check SPEC` finds bytes that are no UTF-8; then run again, or `changeover prepare --anew SPEC` where the"
            f" change stream has it already"
        )


@dataclass(eq=False)
class LockNotGranted(CouldNotFinish):
    """A bounded wait for a lock ended without it."""

    server: str
    lock: str
    holder: str

    def __str__(self) -> str:
        return f"{self.server}: no {self.lock} within the limit, held up by {self.holder}: run again when that has ended"


@dataclass(eq=False)
class AuthorityMoving(CouldNotFinish):
    """A store refused an application's write, because write authority moves to the other one."""

    endpoint: str

    def __str__(self) -> str:
        return f"{self.endpoint}: write authority is moving, and nothing was written: run the request again from its first read"


@dataclass(eq=False)
class SlotBlocked(CouldNotFinish):
    """Creating a slot waits for all open transactions, and one did not end in time."""

    server: str
    seconds: float
    oldest: str

    def __str__(self) -> str:
        return (
            f"{self.server}: no replication slot within {self.seconds:g} s, because an open transaction has to end first "
            f"({self.oldest}); nothing was left behind: end it or run again later"
        )


@dataclass(eq=False)
class SnapshotLost(CouldNotFinish):
    """The exported snapshot can't be imported any more."""

    snapshot: str
    problem: str

    def __str__(self) -> str:
        return (
            f"the exported snapshot {self.snapshot} is gone ({self.problem}): run the same command again, and it takes a new one,"
            f" which the change stream joins to the first"
        )


@dataclass(eq=False)
class SourceChanged(CouldNotFinish):
    """The source is not the one that was prepared."""

    what: str
    prepared: str
    found: str
    transient: ClassVar[bool] = False

    def __str__(self) -> str:
        return (
            f"the source's {self.what} is {self.found}, but {self.prepared} was prepared: its change stream has a gap; "
            f"`changeover prepare --anew SPEC` empties the target tables, and every chunk is copied again"
        )


@dataclass(eq=False)
class SpoolGap(CouldNotFinish):
    """The slot has acknowledged more than the spool holds."""

    acknowledged: str
    durable: str
    transient: ClassVar[bool] = False

    def __str__(self) -> str:
        return (
            f"the slot acknowledged {self.acknowledged} but the spool ends at {self.durable}: changes between them are lost "
            f"to this run; `changeover prepare --anew SPEC` empties the target tables, and every chunk is copied again"
        )


@dataclass(eq=False)
class LeaseHeld(CouldNotFinish):
    """Another run of the same step is alive."""

    step: str
    holder: str

    def __str__(self) -> str:
        return f"another {self.step} of this migration is running ({self.holder}): let it end, or stop it and run again"


@dataclass(eq=False)
class CouldNotCheck(CouldNotFinish):
    """A comparison that has no answer; never to be read as "equal"."""

    table: str
    problem: str

    def __str__(self) -> str:
        return f"could not check {self.table}: {self.problem}"


@dataclass(eq=False)
class FenceCalledOff(CouldNotFinish):
    """The handover took longer than allowed; writers went on where they were."""

    seconds: float
    waiting_for: str

    def __str__(self) -> str:
        return (
            f"the fence was called off after {self.seconds:g} s while waiting for {self.waiting_for}; "
            f"writers go on with the old authority: run again when that is fast"
        )


@dataclass(eq=False)
class RowRefused(CouldNotFinish):
    """A row can't be represented in the target."""

    table: str
    where: str
    problem: str
    transient: ClassVar[bool] = False

    def __str__(self) -> str:
        return (
            f"table {self.table}, {self.where}: a row can't be carried over ({self.problem}): correct it in the source, then run"
            f" the same command again, which goes on from there"
        )


@dataclass(eq=False)
class FolderFailed(CouldNotFinish):
    """A folder can't be written or read: full, read-only, removed, not ours, over its quota."""

    folder: str
    problem: str

    def __str__(self) -> str:
        return (
            f"{self.folder} can't be written or read ({self.problem}): make room there, or bring it back writable; nothing is lost,"
            f" and the same command goes on from there"
        )


@dataclass(eq=False)
class JavaMissing(CouldNotFinish):
    """Spark needs a Java runtime and none fits."""

    problem: str
    command: str
    transient: ClassVar[bool] = False

    def __str__(self) -> str:
        return f"Spark needs Java 17 or later and {self.problem}: install it with `{self.command}` or set JAVA_HOME"


@dataclass(eq=False)
class EmbeddedServerFailed(CouldNotFinish):
    """The server of our own could not be made, started or stopped."""

    root: str
    problem: str
    transient: ClassVar[bool] = False

    def __str__(self) -> str:
        return f"embedded PostgreSQL in {self.root}: {self.problem}"


@dataclass(eq=False)
class Interrupted(ChangeoverError):
    """The person at the terminal stopped the run; `then` says what is left of it and how to go on."""

    step: str
    then: str = "nothing is lost, the same command goes on from here"
    exit_code: ClassVar[int] = 130

    def __str__(self) -> str:
        return f"interrupted in {self.step}: {self.then}"
