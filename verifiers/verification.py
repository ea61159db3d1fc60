"""Verification: both sides brought to one moment, every row compared, the verdict put on record.

The moment is exact. A temporary slot, or a tick of the trigger log, gives an LSN X and its
snapshot. Replay applies every event below X and none at or above. Then each target is frozen and
replay goes on. After authority has moved it is the same with the new store's log: the old store and
the lakes get every event below X. While tenants are at both stores a position is taken of each log,
and each row is compared at that of its own authority. Only replay writes to the other stores, so
nothing is judged again.

It is not exact where the application mirrors its own writes (`flag.mirror = "application"`). A
target may then be ahead, so differing keys are judged again by positions (`recheck`, `passage`).
The lake is then compared with the rows that no mirrored write has touched ahead of the stream.
Without a reverse path the lake stays at the fence, and is compared with the rows that no later
write touched at all. A table that can't be checked keeps no other from its verdict: its reason is
raised when the others have theirs.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from changeover.errors import CouldNotCheck, RowRefused, TextRefused
from changeover.jobs.apply.rounds import Replay
from changeover.jobs.ledger.ledger import Ledger
from changeover.jobs.load import badrow
from changeover.jobs.load.prepared import require_prepared
from changeover.jobs.transform import masking
from changeover.jobs.transform.transform import Transform
from changeover.session import application_name
from changeover.spark.failures import from_spark
from changeover.spec import Spec
from changeover.stores import open_store
from changeover.stores.base.interface import Frozen
from changeover.stores.base.reader import ReadTable
from changeover.stores.postgres.store import freeze
from changeover.verifiers.compare import checks, recheck, unchanged
from changeover.verifiers.compare.coverage import SIDES, require_read
from changeover.verifiers.compare.diff import RANGE, compare
from changeover.verifiers.compare.planned import changed_types
from changeover.verifiers.compare.split_authority import Split
from changeover.verifiers.compare.verdict import CheckResult, Positions, Range, Recheck, TableDiff, TypeDifference, Verdict
from changeover.verifiers.moment import Moment, held_still, look_closed
from changeover.verifiers.passage import Passage
from changeover.verifiers.unchecked import Unchecked

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

log = logging.getLogger(__name__)


def verify(
    spec: Spec, spark: SparkSession, *, targets: Sequence[str] | None = None, on_verdict: Callable[[Verdict], object] | None = None
) -> list[Verdict]:
    """Compare every row of every table with each target (all unless named) and record the verdicts (driver).

    Once all tables have theirs that can, it raises for the others.

    Args:
        spec: The migration's spec.
        spark: The Spark session.
        targets: The targets' names; None is all.
        on_verdict: What is called with each verdict once it is on record.

    Returns:
        The verdicts, one a table and target.

    Raises:
        CouldNotCheck: A comparison has no answer.
        StepOrder: The backfill is not closed.
        TableStopped: A table met what is not carried.
        RowRefused: A row can't be in a target.
        CouldNotFinish: Several tables have no verdict; all reasons are named.
        LeaseHeld: Another verification is under way.
    """
    with Ledger.open(spec, "verify") as ledger, ledger.lease("verify"), ledger.recorded("verify") as entry:
        prepared = require_prepared(spec, spark, ledger, "verify")
        chosen = {names: t for names, t in prepared.transforms.items() if targets is None or names[1] in targets}
        unchecked = Unchecked()
        look_closed(ledger, chosen, unchecked)
        verdicts: list[Verdict] = []
        entry["verdicts"] = recorded = []
        if unchecked.left(chosen):
            split = Split(ledger.authorities())
            with held_still(spec, spark, ledger, prepared, chosen, split, unchecked) as moment:
                for (source, target), transform in unchecked.left(chosen).items():
                    with unchecked.at([(source, target)]):
                        verdict = _Comparison(spec, spark, ledger, transform, source, target, split, moment).run()
                        stage = recheck.last_stage(ledger)
                        ledger.record_verdict(source, target, verdict.word, stage, verdict.document())
                        log.info("%s in %s: %s at %s", source, target, verdict.word, verdict.positions)
                        verdicts.append(verdict)
                        recorded.append({"source": source, "target": target, "verdict": verdict.word, "rows": verdict.source_rows})
                        if on_verdict is not None:
                            on_verdict(verdict)
        unchecked.require_none()
        entry["outcome"] = "equal" if all(verdict.equal for verdict in verdicts) else "different"
        return verdicts


@dataclass(frozen=True)
class _Comparison:
    """One table against one target at one moment."""

    spec: Spec
    spark: SparkSession
    ledger: Ledger
    transform: Transform
    source: str
    target: str
    split: Split
    moment: Moment

    def run(self) -> Verdict:
        """Compare, judge in-flight keys again where both stores are written, and run the spec's own checks."""
        started = time.monotonic()
        run = f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{self.source}-{self.target}"
        old, new = self.moment.sources[self.source], self.moment.targets[self.source, self.target]
        frames = (self._ranged(old, self.transform), self._ranged(new, None))
        follows_new = self.split.at_new and not self._takes_over() and not self.moment.exact
        if follows_new:
            frames = unchanged.rows(self.spark, self.transform, old, frames, aligned=self.moment.new_lsn is not None)
        mask = masking.of_target(self.transform.table, self.transform.derivations)
        differences = self.spec.work / "differences"
        try:
            diff = compare(
                *frames, table=self.source, store=self.target, key=self.transform.target.key, pg_types=self.transform.pg_types,
                ranges=_ranges(old), target_ranges=_ranges(new), differences=differences, run=run,
                sensitive=mask.columns,
            )  # fmt: skip
        except (RowRefused, TextRefused) as refused:
            sides = zip(SIDES, (old, new), strict=True)
            refusals = (badrow.in_frozen(self.spark, self.transform, frozen, side) for side, frozen in sides)
            raise next(filter(None, refusals), refused) from refused
        self._require_whole(diff, old, new, every_row=not follows_new)
        again = None
        in_flight = self._takes_over() and not self.moment.exact and recheck.dual_written(self.ledger, self.split.changes)
        if diff.differing_keys and in_flight:
            diff, again = self._recheck(diff, differences, run)
        return Verdict.of(
            diff, run=run, positions=Positions(self.moment.source_lsn, new.position),
            checked_at=datetime.now(UTC).isoformat(timespec="seconds"), seconds=time.monotonic() - started,
            checks=[] if follows_new else self._checked(old, new), recheck=again,
            mask=mask,
            types=self._types(),
        )  # fmt: skip

    def _checked(self, old: Frozen, new: Frozen) -> list[CheckResult]:
        """Run the spec's own checks; while tenants are at both stores they see no one moment, so one that differs has no answer."""
        results = checks.run(self.source, self.transform.table.checks, old, new)
        differs = next((result for result in results if not result.equal), None)
        if differs is not None and self.split.apart:
            problem = f"the check {differs.name} differs, and while tenants are at both stores its queries see two moments"
            raise CouldNotCheck(self.source, f"{problem}: run verify in a quieter moment")
        return results

    def _types(self) -> list[TypeDifference]:
        """Return the columns that have another type than the one on record, when the target was opened or now."""
        table = self.transform.target
        with open_store(self.spec, self.spec.targets[self.target], "verify") as store:
            looks = [table.columns, store.columns(table.schema, table.name) or ()]
            now = [{column.name: store.type_of(column) for column in columns} for columns in looks]
        _, recorded = self.ledger.source_table(self.source)
        planned = {column.name: column.type for column in recorded}
        source = self.moment.tables.get(self.source)
        own = [{column.name: column.type for column in source.columns}] if source is not None else []
        return [
            *changed_types("source", planned, own),
            *changed_types("target", self.ledger.load(self.source, self.target).types, now),
        ]

    def _require_whole(self, diff: TableDiff, old: Frozen, new: Frozen, *, every_row: bool) -> None:
        """Prove that nothing was read as empty which is not: each range to its end, and from the file that the state was of."""
        filtered = self.transform.table.where is not None or self.transform.table.function is not None
        left_out = (filtered or not every_row, not every_row)
        sides = list(zip(SIDES, (old, new), left_out, strict=True))
        if not diff.source_rows and not diff.target_rows:
            with from_spark(self.source, f"a table without rows in {self.target}"):
                for side, frozen, some in sides:
                    parts = frozen.states * len(frozen.ranges)
                    require_read(frozen.frame(None), parts, table=self.source, side=side, empty=not some)
        for side, frozen, _ in sides:
            self._require_same_file(side, frozen)

    def _require_same_file(self, side: str, frozen: Frozen) -> None:
        if not frozen.same_file():
            problem = f"the {side} table was rewritten, truncated or repartitioned while it was read, which then reads as empty"
            raise CouldNotCheck(self.source, f"{problem}: run `changeover verify` again")

    def _recheck(self, diff: TableDiff, differences: Path, run: str) -> tuple[TableDiff, Recheck]:
        """Judge differing keys by the stores' present rows, once what was under way between them has passed."""
        dsn, application = self.spec.source.dsn.resolve(), application_name(self.spec.name, "verify")
        schema, name = self.transform.table.source_name
        read = ReadTable(schema, name, self.transform.source, self.transform.identity, self.transform.partitioned)
        moved = self.transform.source_key([c.name for c in self.transform.identity])
        with ExitStack() as held:
            ledger = held.enter_context(Ledger.open(self.spec, "verify"))
            store = held.enter_context(open_store(self.spec, self.spec.targets[self.target], "verify"))
            replay = Replay(self.spec, self.spark, ledger, require_prepared(self.spec, self.spark, ledger, "verify"))
            present = ExitStack()
            held.enter_context(present)

            def watched(side: str, frozen: Frozen) -> Frozen:
                present.callback(self._require_same_file, side, frozen)
                return frozen

            def source(keys: Sequence[recheck.Key]) -> DataFrame:
                places = [diff.key.index(column) for column in moved] if moved else []
                own = [tuple(key[position] for position in places) for key in keys] if moved else None
                now = watched("source", present.enter_context(freeze(self.spark, dsn, application, [read], 1))(read))
                rows = self.transform.uncast(now.frame(own))
                return rows if moved else recheck.only(rows, diff.key, keys)

            def target(keys: Sequence[recheck.Key]) -> DataFrame:
                hold = present.enter_context(store.freeze(self.spark, [self.transform.target], 1))
                now = watched("target", hold(self.transform.target))
                return now.frame(list(keys))

            under_way = Passage(self.spec, ledger, replay, self.transform, self.target, self.split, self.moment, present.close)
            with from_spark(self.source, f"keys of {self.target} that are judged again"):
                return recheck.judge(
                    diff, differences, run, pg_types=self.transform.pg_types, source=source, target=target,
                    leading=under_way.leading(diff.key), passage=under_way,
                )  # fmt: skip

    def _takes_over(self) -> bool:
        """Return whether this target is the one that the application writes to."""
        return self.spec.flag is not None and self.spec.flag.target == self.target

    def _ranged(self, frozen: Frozen, transform: Transform | None) -> DataFrame:
        from pyspark.sql import functions as F

        frame = transform.kept(frozen.frame(None)) if transform else frozen.frame(None)
        count = len(frozen.ranges)
        ranged = frame.withColumn(RANGE, F.lit(0) if count == 1 else F.spark_partition_id() % count)
        return transform.uncast(ranged, carry=[RANGE]) if transform else ranged


def _ranges(frozen: Frozen) -> list[Range]:
    return [Range(number, lower, upper) for number, (lower, upper) in enumerate(frozen.ranges)]
