"""The writer: what a run of capture takes in, batch by batch made durable in the spool, and how far that is whole.

`durable` is a position up to which the spool holds everything, so it is what may be acknowledged; `whole` is where the next append
will bring it. A transaction that outgrows a batch goes in by parts, beyond which the spool's end does not move until all of it is
there. Small files are merged between appends. It knows no connection; both ways of capture, and both ways of reading a slot,
append through it. Runs where capture runs.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from changeover.errors import ChangeoverError, FolderFailed, StepOrder
from changeover.jobs.spool.events import SCHEMA, Event
from changeover.jobs.spool.table import Spool
from changeover.position import format_lsn

log = logging.getLogger(__name__)

BATCH_EVENTS = 50_000
BATCH_BYTES = 32 << 20
BATCH_SECONDS = 0.2

COMPACT_EVERY = 50
"""Appends after which their small files become one."""

WATCH_SECONDS = 60.0
"""How often to look whether the server is about to drop the slot, or the log of triggers has grown beyond measure."""

IDLE_STEP = 1 << 20
"""Bytes of other tables' WAL after which an idle source moves the spool's end, so that the server lets that WAL go."""


LONGEST_DELAY = 2.0
FOLDER_DELAY = 5.0
"""How long to wait at most between two tries: at the server's door, and at the folder's, where a try decodes all anew."""


class Patience:
    """How long a run waits for what comes back by itself: the server, or room in the work folder.

    The server is waited for some seconds. So is the folder at first; once a run has made anything durable it waits without
    end, since the server keeps what is not. Each trouble is logged once, and told to whoever keeps the record: why, then None.
    """

    def __init__(self, seconds: float, stop: threading.Event) -> None:
        self.seconds, self.stop = seconds, stop
        self.tell: Callable[[str | None], None] = lambda why: None
        self.reported: str | None = None
        self._since: float | None = None
        self._delay = 0.1
        self._folder = self._spooled = False

    def answered(self) -> None:
        """Take note that the server sent something; that says nothing of the folder."""
        if not self._folder:
            self._over()

    def spooled(self) -> None:
        """Take note that something was made durable."""
        self._spooled = True
        self._over()

    def wait(self, error: ChangeoverError) -> None:
        """Wait before the next try, or raise the error when there is no patience left.

        Args:
            error: What went wrong.

        Raises:
            ChangeoverError: That error, when patience has run out.
        """
        now, folder = time.monotonic(), isinstance(error, FolderFailed)
        longest = FOLDER_DELAY if folder else LONGEST_DELAY
        if self._since is None or folder != self._folder:
            self._since, self._delay = now, 0.1
        else:
            self._delay = min(2 * self._delay, longest)
        self._folder = folder
        if now - self._since > self.seconds and not (folder and self._spooled):
            raise error
        if str(error) != self.reported:
            self.reported = str(error)
            log.warning("%s; tried again until it does", error)
            self.tell(self.reported)
        self.stop.wait(self._delay)

    def _over(self) -> None:
        self._since, self._folder = None, False
        if self.reported is not None:
            log.info("capture goes on")
            self.reported = None
            self.tell(None)


@dataclass
class CaptureResult:
    """What a run of capture did; `end_lsn` is the spool's end, `interrupted` whether Ctrl-C or SIGTERM ended it."""

    events: int = 0
    transactions: int = 0
    appends: int = 0
    connections: int = 0
    end_lsn: int = 0
    seconds: float = 0.0
    interrupted: bool = False

    def recorded(self) -> dict[str, Any]:
        """Return what goes on record.

        Returns:
            Counts, the end as text of an LSN, and seconds, as JSON takes them.
        """
        counts = {"events": self.events, "transactions": self.transactions, "end": format_lsn(self.end_lsn)}
        return {**counts, "seconds": round(self.seconds, 1), **({"outcome": "interrupted"} if self.interrupted else {})}


class Intake:
    """The spool's writing end for one run: what is gathered, when it is due, and the counts."""

    def __init__(self, spool: Spool, result: CaptureResult, patience: Patience) -> None:
        self.spool = spool
        self.result = result
        self.patience = patience
        self.bytes, self.flush_at = 0, float("inf")
        self.whole = self.durable = 0

    def reopen(self) -> None:
        """Begin where the spool ends: what another connection took and did not flush is taken again."""
        self.bytes, self.flush_at = 0, float("inf")
        self.spool.settle()
        self.whole = self.durable = self.end()

    def end(self) -> int:
        """Return where the spool ends; a prepared migration that has none has lost it, or its folder is elsewhere for now.

        Returns:
            The end, as an LSN in bytes.

        Raises:
            FolderFailed: No spool is there.
        """
        try:
            return self.spool.end()
        except StepOrder as error:
            lost = "no spool is there: if it is lost for good, `changeover prepare --anew SPEC` begins anew"
            raise FolderFailed(str(self.spool.path), lost) from error

    def took(self, size: int, events: int) -> None:
        """Count bytes that were taken, and events that are held; a full batch is due at once.

        Args:
            size: How many bytes were taken.
            events: How many events are held now.
        """
        self.bytes += size
        if events >= BATCH_EVENTS or self.bytes >= BATCH_BYTES:
            self.flush_at = 0.0

    def committed(self, ends: Sequence[int], *, marker: bool) -> None:
        """Take note of commits by their end LSNs; a marker is due at once, anything else soon.

        Args:
            ends: The commits' end LSNs in bytes, rising.
            marker: Whether a marker is among them.
        """
        news = [end for end in ends if end > self.durable]
        if not news:
            return
        self.whole = news[-1]
        self.result.transactions += len(news)
        if marker:
            self.flush_at = 0.0
        elif self.flush_at == float("inf"):
            self.flush_at = time.monotonic() + BATCH_SECONDS

    def passed(self, position: int) -> None:
        """Take note that all which committed below a position was taken, and that whatever comes later lies above.

        Args:
            position: The position, as an LSN in bytes.
        """
        self.whole = max(self.whole, position)

    @property
    def due(self) -> bool:
        """Whether it is time to flush."""
        return time.monotonic() >= self.flush_at

    def flush(self, events: Sequence[pa.Table]) -> bool:
        """Make everything so far durable, and what there is of the next transaction (capture).

        Args:
            events: Tables of the spool's schema.

        Returns:
            Whether there was anything.

        Raises:
            FolderFailed: The work folder takes nothing.
        """
        self.bytes, self.flush_at = 0, float("inf")
        batch = pa.concat_tables([SCHEMA.empty_table(), *events])
        if not len(batch) and self.whole <= self.durable:
            return False
        self.append(batch, self.whole)
        return True

    def append(self, batch: Sequence[Event] | pa.Table, end: int) -> None:
        """Append to the spool, which is durable when this returns, and merge small files every so often.

        Args:
            batch: Events, or a table of the spool's schema.
            end: The commit END LSN of the last whole transaction.

        Raises:
            FolderFailed: The work folder takes nothing.
        """
        self.spool.append(batch, end)
        self.patience.spooled()
        self.result.events += len(batch)
        self.result.appends += 1
        self.durable = self.result.end_lsn = end
        if self.result.appends % COMPACT_EVERY == 0:
            self.spool.compact()
