"""A range of a topic through its handler again, beside the live group: planned, counted, confirmed, run.

Effects already made are not repeated: their messages' ids are remembered. Where that cannot be known, because ids were
forgotten by age or never given, it is refused, unless the caller says that effects are to be repeated, and how many.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from uuid import UUID

from eoframework import clock
from eoframework.app import App
from eoframework.consume.assembly import make_unit
from eoframework.consume.batch import Delivery
from eoframework.consume.rerun import Rerun, Tally
from eoframework.consume.unit import Unit
from eoframework.db import audit
from eoframework.db.parking import Parking
from eoframework.db.position import Stream
from eoframework.db.reprocessing import Reprocessing, Stand
from eoframework.db.unit_of_work import Timeouts, WorkerConnection
from eoframework.errors import EoError, FailClosed, NotFound
from eoframework.handlers import Handler
from eoframework.identity import refuse_moved, topic_recreated
from eoframework.kafka.admin import Admin
from eoframework.kafka.ranges import RangeReader
from eoframework.message import Record
from eoframework.reprocess_range import Bound, Range, Resolver, refuse_inverted

__all__ = ["Bound", "Counts", "Plan", "Range", "Reprocess", "tally_document"]

_log = logging.getLogger(__name__)

_CHUNK = 1000
_TELL_EVERY = 10.0


@dataclass(slots=True)
class Counts:
    """What the messages of a range are, each counted in one of these."""

    new: int = 0
    """Never processed: their position was moved past them."""
    duplicates: int = 0
    """Processed, and remembered."""
    uncovered: int = 0
    """Not remembered, but lying where ids have been forgotten: processed or not, nobody knows."""
    without_id: int = 0
    parked: int = 0
    """Waiting in their key's lane, or their key waits: the group runs them."""
    dead: int = 0
    """Dead letters: `eo dead replay` runs them."""
    undecodable: int = 0

    @property
    def repeated(self) -> int:
        """How many would, or might, have their effects a second time with `forget`."""
        return self.duplicates + self.uncovered + self.without_id

    def would_run(self, *, forget: bool) -> int:
        return self.new + (self.repeated if forget else 0)


@dataclass(frozen=True, slots=True)
class Plan:
    """What a reprocessing would do, from reading the range once; the live group may change it meanwhile."""

    consumer: str
    topic: str
    ranges: tuple[Range, ...]
    counts: Counts = field(default_factory=Counts)

    @property
    def ends(self) -> dict[int, int]:
        """Partition -> the offset at which it will have been done."""
        return {span.partition: span.end for span in self.ranges if span.end > span.start}

    def refusal(self) -> FailClosed | None:
        """Why this is not done without `forget`, None if nothing speaks against it."""
        below = next((r for r in self.ranges if r.uncovered), None)
        if below is not None:
            return FailClosed(
                f"{self.consumer}: ids of {self.topic}[{below.partition}] are remembered from offset "
                f"{below.covered_from} on, the range begins at {below.start}: effects before it might be repeated.",
                remedy=f"Begin at {below.covered_from} (eo position show tells), or repeat effects with --forget.",
            )
        if self.counts.without_id:
            return FailClosed(
                f"{self.consumer}: {self.counts.without_id} messages of the range have no id: nobody could tell that "
                "their effects were made.",
                remedy="Leave them out of the range, or repeat effects with --forget.",
            )
        return None

    def document(self, *, forget: bool) -> dict[str, object]:
        """As JSON shows it."""
        counts = {**asdict(self.counts), "would_run": self.counts.would_run(forget=forget)}
        counts["would_repeat"] = self.counts.repeated if forget else 0
        ranges = [asdict(r) for r in self.ranges]
        return {"consumer": self.consumer, "topic": self.topic, "ranges": ranges, "counts": counts}


class Reprocess:
    """One handler's past. Joins no group, commits no offsets, moves no position."""

    def __init__(self, app: App, handler: Handler, admin: Admin) -> None:
        """`app` with an answering database, `admin` of the answering cluster; reads nothing yet."""
        self._app = app
        self._handler = handler
        self._admin = admin
        self._settings = app.settings
        self._tables = Reprocessing(app.database)
        self._parking = Parking(app.database.schema)

    def plan(self, start: Bound, end: Bound | None = None, *, partitions: Sequence[int] = ()) -> Plan:
        """Read the range and count what its messages are; changes nothing.

        end: default where the live consumer stands. partitions: default all in which it stands. A producer's
        duplicates among messages that were never processed are counted as often as they occur.
        Raises NotFound for what is not there; FailClosed for a range beyond the live consumer's position, a topic that
        was re-created, another cluster; InvertedRange for an end before the start.
        """
        refuse_inverted(start, end)
        stream, stands = self._stream()
        with self._reader() as reader:
            chosen = self._choose(stands, partitions)
            if isinstance(start, int) or isinstance(end, int):
                self._refuse_vague_offset(stands, partitions)
            ranges = tuple(Resolver(stream, reader, stand).range(start, end) for stand in chosen)
            plan = Plan(stream.consumer, stream.topic, ranges)
            unit = self._unit(stream, self._connection())
            try:
                for span, records in _chunks(reader, ranges, _CHUNK):
                    self._count(plan.counts, span, [unit.decode(record) for record in records], unit)
            finally:
                unit.connection.discard()
        return plan

    def run(
        self,
        plan: Plan,
        *,
        forget: bool = False,
        confirmed: int | None = None,
        rate: float | None = None,
        stop: threading.Event | None = None,
        actor: str | None = None,
        on_progress: Callable[[Tally], None] = lambda tally: None,
    ) -> Tally:
        """Send the planned ranges through the handler; returns what became of their messages.

        On a crash: each batch is committed as a whole or not at all; run it again, and what was committed counts as
        duplicates. With `forget` a second run repeats effects a second time: begin it where `reached` says.
        forget: repeat effects; `confirmed` must be `plan.counts.repeated`. rate: messages a second at most. stop: ends
        it after the transaction under way. actor: for the audit rows, default user@host.
        Raises FailClosed when the plan is refused, the topic was re-created or the position was set back meanwhile.
        """
        stream, _ = self._stream()
        self._refuse(plan, forget=forget, confirmed=confirmed)
        who, subject, stop = audit.whoever(actor), f"consumer/{plan.consumer}", stop or threading.Event()
        detail = {**plan.document(forget=forget), "forget": forget}
        begun = self._tables.note(who, "reprocess.begin", subject, detail)
        unit = self._unit(stream, self._connection())
        rerun = Rerun(
            unit,
            self._parking,
            self._tables,
            repeat_before=begun if forget else None,
            ask_topic=lambda: self._ask_topic(stream),
            stop=stop,
            failure_text=self._settings.failure_text,
        )
        ended = "reprocess.failed"
        try:
            self._run(plan, rerun, rate, stop, on_progress)
            ended = "reprocess.stopped" if stop.is_set() else "reprocess.end"
        finally:
            unit.connection.discard()
            self._note_end(who, ended, subject, rerun.tally)
        return rerun.tally

    def _note_end(self, who: str, ended: str, subject: str, tally: Tally) -> None:
        # Away together, PostgreSQL would otherwise be heard twice: this error in the place of the one that ended it.
        try:
            self._tables.note(who, ended, subject, tally_document(tally))
        except EoError as error:
            _log.error(
                "%s of %s could not be recorded: %s The audit lacks this row; what was committed stays, up to %s.",
                *(ended, subject, error, tally.reached),
            )

    def _run(
        self,
        plan: Plan,
        rerun: Rerun,
        rate: float | None,
        stop: threading.Event,
        on_progress: Callable[[Tally], None],
    ) -> None:
        largest = self._handler.max_batch or self._settings.max_batch
        limit = largest if rate is None else max(1, min(largest, int(rate)))
        with self._reader() as reader:
            next_at = tell_at = clock.monotonic()
            for _, records in _chunks(reader, plan.ranges, limit):
                clock.wait(stop, max(0.0, next_at - clock.monotonic()))
                if stop.is_set():
                    return
                next_at = clock.monotonic() + (len(records) / rate if rate is not None else 0.0)
                rerun.run(records)
                on_progress(rerun.tally)
                if clock.monotonic() >= tell_at:
                    tell_at = clock.monotonic() + _TELL_EVERY
                    _log.info("%s: reached %s of %s", plan.consumer, rerun.tally.reached, plan.ends)

    # --- what there is ---

    def _stream(self) -> tuple[Stream, list[Stand]]:
        topic, group = self._handler.topic.name, self._handler.group
        info, cluster_id = self._admin.describe(topic), self._admin.cluster_id()
        stands = self._tables.stands(group, topic)
        if not stands:
            raise NotFound(
                f"consumer {group!r} has no position in {topic!r}: it has never run, or was forgotten.",
                remedy="Start it: eo run; what it then finds is its own to process.",
            )
        stream = Stream(stands[0].consumer_id, group, topic, info.id, cluster_id)
        refuse_moved(stream, [stand.row for stand in stands])
        return stream, stands

    def _choose(self, stands: Sequence[Stand], partitions: Sequence[int]) -> list[Stand]:
        here = {stand.row.partition: stand for stand in stands}
        missing = sorted(set(partitions) - here.keys())
        if missing:
            raise NotFound(
                f"{self._handler.group} has no position in partition {missing[0]}.",
                remedy=f"It has: {', '.join(map(str, sorted(here)))}.",
            )
        return [here[partition] for partition in sorted(set(partitions) or here)]

    def _refuse_vague_offset(self, stands: Sequence[Stand], partitions: Sequence[int]) -> None:
        if not partitions and len(stands) > 1:
            raise NotFound(
                f"an offset counts the messages of one partition, {self._handler.topic.name!r} has {len(stands)}.",
                remedy="Say which: --partition N.",
            )

    def _refuse(self, plan: Plan, *, forget: bool, confirmed: int | None) -> None:
        refusal = plan.refusal()
        if not forget and refusal is not None:
            raise refusal
        if forget and confirmed != plan.counts.repeated:
            raise FailClosed(
                f"{plan.consumer}: the effects of {plan.counts.repeated} messages would be repeated, and "
                f"{'no number' if confirmed is None else confirmed} was confirmed.",
                remedy=f"If they are to be repeated: --yes-repeat {plan.counts.repeated}",
            )

    def _ask_topic(self, stream: Stream) -> Callable[[], None]:
        answer = self._admin.ask_topic_id(stream.topic)

        def confirm() -> None:
            found: UUID = answer()
            if found != stream.topic_id:
                raise topic_recreated(stream.consumer, stream.topic, stream.topic_id, found)

        return confirm

    # --- counting ---

    def _count(self, counts: Counts, span: Range, deliveries: Sequence[Delivery], unit: Unit) -> None:
        stream, tables = unit.stream, self._tables
        ids = {delivery.id for delivery in deliveries if delivery.id is not None}
        with self._app.database.begin("counting what would be reprocessed") as connection:
            waiting = tables.waiting(connection, stream, {delivery.lane for delivery in deliveries})
            aside = tables.set_aside(connection, stream, [delivery.place for delivery in deliveries])
            remembered = tables.remembered(connection, stream.consumer_id, ids)
        seen: set[UUID] = set()
        for delivery in deliveries:
            if delivery.place in aside.dead:
                counts.dead += 1
            elif delivery.place in aside.parked or delivery.lane in waiting:
                counts.parked += 1
            elif delivery.message is None:
                counts.undecodable += 1
            elif delivery.id is None:
                counts.without_id += 1
            elif delivery.id in remembered or delivery.id in seen:
                counts.duplicates += 1
            else:
                seen.add(delivery.id)
                uncovered = delivery.record.offset < span.covered_from
                counts.uncovered += uncovered
                counts.new += not uncovered

    # --- parts ---

    def _unit(self, stream: Stream, connection: WorkerConnection) -> Unit:
        return make_unit(self._handler, self._app, stream, connection, self._settings)

    def _connection(self) -> WorkerConnection:
        settings = self._settings
        timeouts = Timeouts(settings.statement_timeout, settings.lock_timeout, settings.idle_in_transaction_timeout)
        return WorkerConnection(self._app.database, timeouts, handler=self._handler.group)

    def _reader(self) -> RangeReader:
        return RangeReader(self._settings, self._handler.topic.name, group=self._handler.group)


def _chunks(reader: RangeReader, ranges: Sequence[Range], limit: int) -> Iterator[tuple[Range, list[Record]]]:
    for span in ranges:
        with closing(reader.read(span.partition, span.start, span.end, limit=limit)) as lists:
            for records in lists:
                yield span, records


def tally_document(tally: Tally) -> dict[str, object]:
    """As JSON shows it; of many failures the first hundred."""
    document = asdict(tally)
    listed = [
        {"partition": f.partition, "offset": f.offset, "error": str(f.cause), "text": f.cause.error}
        for f in tally.failed[:100]
    ]
    return {**document, "failed": len(tally.failed), "failures": listed}
