"""The rollout of reads: contexts that read from the new store before the writes go there, by a percentage of the flag's.

The flag serves them live, at the stage shadow. The record says that reads may move, without which
no router acts on it: a rollout that was made elsewhere moves nobody. Every switch of the stage ends
it. Writes follow authority alone, so no fence is needed, and going back loses nothing.
"""

from __future__ import annotations

from ldclient.migrations.types import Stage

from changeover.errors import Refused, UsageError
from changeover.flags import flagfile, history, readiness
from changeover.flags.cutover.switch import Advanced, everybody, flag_and_file, require_open
from changeover.flags.observed import observations
from changeover.jobs.ledger.ledger import Ledger
from changeover.spec import Spec


def advance(spec: Spec, ledger: Ledger, percent: int, override: str | None) -> Advanced:
    """Have more contexts read from the new store, if the evidence says that it is ready; the caller has the flag's lease."""
    # what the flag serves and nobody put on record has moved no reads yet
    now = min(_between(spec, ledger, percent), ledger.reads())
    if percent <= now:
        raise Refused(f"flags advance: the reads of {now} % of contexts have moved: --reads goes up from there, rollback goes down")
    evidence = readiness.collect(spec, ledger, Stage.SHADOW, Stage.LIVE)
    entry = require_open(ledger, evidence, override, {"percent": percent}, reads=True)
    return _turn(spec, ledger, history.ADVANCED, percent, entry, tuple(evidence.rights.notes))


def rollback(spec: Spec, ledger: Ledger, percent: int) -> Advanced:
    """Have fewer contexts read from the new store, or none; asks for no evidence. The caller has the flag's lease."""
    now = _between(spec, ledger, percent)
    if percent >= now:
        raise Refused(f"flags rollback: the reads of {now} % of contexts have moved: --reads goes down from there")
    return _turn(spec, ledger, history.ROLLED_BACK, percent, {}, ())


def _turn(spec: Spec, ledger: Ledger, outcome: str, percent: int, entry: dict[str, object], notes: tuple[str, ...]) -> Advanced:
    flag, file = flag_and_file(spec)
    flagfile.write_reads(file, flag.key, percent)
    history.record_reads(ledger, outcome, percent, entry)
    epoch = observations(ledger.authorities()).epoch
    return Advanced(Stage.SHADOW, Stage.SHADOW, epoch, None, reads=percent, notes=notes)


def _between(spec: Spec, ledger: Ledger, percent: int) -> int:
    """Return the percentage that the flag serves now; raises where reads can't move before writes."""
    flag, file = flag_and_file(spec)
    if flag.context is not None:
        raise UsageError(f"rows move by tenants, the spec's {flag.context}, and their reads with them: --tenant names some")
    if not 0 <= percent <= 100:
        raise UsageError(f"--reads is {percent}: give a percentage, 0 to 100")
    stage = everybody(spec, ledger, observations(ledger.authorities()))
    if stage is not Stage.SHADOW:
        raise Refused(f"reads move before writes at the stage shadow, and this is {stage.value}")
    return flagfile.read_reads(file, flag.key)
