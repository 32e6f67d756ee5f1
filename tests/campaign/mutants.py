"""Planted bugs: one for each protection there is, each a small change of our own source.

A campaign that finds nothing has to show that it can find something: `python -m tests.campaign.mutation` plants them
one by one in a copy and runs the layers named here until one of them objects.
"""

from __future__ import annotations

from dataclasses import dataclass

LAYERS: dict[str, tuple[str, ...]] = {
    "statements": (
        "tests/consume/test_same_id_at_once.py",
        "tests/consume/test_one_message.py",
        "tests/consume/test_outcomes.py",
        "tests/consume/test_ownership.py",
        "tests/publish/test_order.py",
    ),
    "guards": ("tests/consume/test_guards.py",),
    "fetching": ("tests/consume/test_loss_guard.py",),
    "crash points, forked": (
        "tests/campaign/test_forked.py::test_a_crash_at_any_boundary_and_one_in_its_recovery_change_nothing",
    ),
    "stateful": ("tests/failure/test_parking_model.py",),
    "failures": ("tests/failure/test_parking.py", "tests/failure/test_dead_letters.py"),
    "operators": ("tests/failure/test_dead_replay.py",),
    "coverage": ("tests/failure/test_reprocess_coverage.py",),
    "external": ("tests/failure/test_external_step.py", "tests/failure/test_external_crashes.py"),
    "cuts of COMMIT": ("tests/consume/test_commit_cut.py",),
    "kills, consume": ("tests/consume/test_crashes.py", "tests/failure/test_crash_boundaries.py"),
    "freezes, consume": ("tests/consume/test_zombies.py",),
    "fail closed, consume": ("tests/consume/test_fail_closed.py",),
    "kills and freezes, relay": ("tests/relay/test_crashes.py",),
    "relay": ("tests/relay/test_flow.py", "tests/relay/test_broken_services.py"),
    "late EndTxn, relay": ("tests/relay/test_bounded.py", "tests/relay/test_broken_services.py"),
    "late requests, transform": ("tests/transform/test_late_requests.py",),
    "kills, transform": ("tests/transform/test_crashes.py",),
    "freezes, transform": ("tests/transform/test_zombies.py",),
    "doubts, transform": ("tests/transform/test_doubts.py", "tests/transform/test_failing.py"),
    "beginning, transform": ("tests/transform/test_beginning.py",),
}
"""What looks for them, by name: cheap layers first, where a mutant names several."""


@dataclass(frozen=True, slots=True)
class Mutant:
    """A protection taken out."""

    name: str
    what: str
    """What goes wrong without it."""
    path: str
    before: str
    after: str
    layers: tuple[str, ...]
    also: tuple[Change, ...] = ()
    """What stands behind it and would make good for it: taken out too."""

    @property
    def changes(self) -> tuple[Change, ...]:
        return ((self.path, self.before, self.after), *self.also)

    @property
    def paths(self) -> set[str]:
        return {path for path, _, _ in self.changes}


Change = tuple[str, str, str]


def _m(name: str, what: str, path: str, before: str, after: str, *layers: str, also: tuple[Change, ...] = ()) -> Mutant:
    unknown = set(layers) - LAYERS.keys()
    assert not unknown, unknown
    return Mutant(name, what, f"eoframework/{path}", before, after, layers, also)


_OWN = "with connection.engine.begin() as own:"

MUTANTS = (
    # --- from Kafka to the database ---
    _m(
        "offset committed first",
        "a crash after the position and before the effects loses the batch",
        "consume/unit.py",
        "lost = self.stores.positions.advance(connection, self.stream, held, to)",
        f"{_OWN}\n            lost = self.stores.positions.advance(own, self.stream, held, to)",
        "crash points, forked",
        "statements",
        "kills, consume",
    ),
    _m(
        "effects before the fence",
        "an owner that was taken over writes effects, and only then is told",
        "consume/unit.py",
        "        if lost:\n            raise Fence(lost)",
        "        del lost",
        "crash points, forked",
        "statements",
        "freezes, consume",
    ),
    _m(
        "no epoch and no offset check",
        "a frozen owner moves the position of its successor",
        "db/position.py",
        "    AND p.epoch = f.epoch AND p.next_offset = f.expected\nRETURNING",
        "RETURNING",
        "crash points, forked",
        "statements",
        "freezes, consume",
    ),
    _m(
        "ids not looked at",
        "a producer's duplicate is booked twice",
        "consume/unit.py",
        "new = self.stores.processed.claim(connection, self.stream.consumer_id, ids)",
        "self.stores.processed.claim(connection, self.stream.consumer_id, ids)\n        new = set(ids)",
        "crash points, forked",
        "statements",
    ),
    _m(
        "ids not recorded",
        "a producer's duplicate in a later batch is booked twice",
        "consume/unit.py",
        "new = self.stores.processed.claim(connection, self.stream.consumer_id, ids)",
        "new = set(ids)",
        "statements",
    ),
    _m(
        "select, then insert",
        "two workers with one id are both first, or one fails",
        "db/processed.py",
        "ON CONFLICT ON CONSTRAINT processed_message_pkey DO NOTHING RETURNING message_id",
        "ON CONFLICT ON CONSTRAINT processed_message_pkey DO UPDATE SET processed_at = now() RETURNING message_id",
        "statements",
    ),
    _m(
        "ids inserted unsorted",
        "two workers with the same ids deadlock",
        "db/processed.py",
        "AS given(id) ORDER BY id\n",
        "AS given(id) ORDER BY random()\n",
        "statements",
        "stateful",
    ),
    _m(
        "ids not taken back",
        "a message that was not run, for want of time, is later taken for a duplicate",
        "consume/executor.py",
        "        stores.processed.forget(connection, stream.consumer_id, unrun)\n",
        "        del unrun\n",
        "guards",
    ),
    _m(
        "positions not taken back",
        "a message that was not run, for want of time, is skipped",
        "consume/executor.py",
        "        stores.positions.cut(connection, stream, ends)\n",
        "        del ends\n",
        "guards",
    ),
    _m(
        "outbox rows in a transaction of their own",
        "messages of a batch that was rolled back are sent",
        "consume/unit.py",
        "        self.stores.outbox.insert(connection, messages)\n",
        f"        {_OWN}\n            self.stores.outbox.insert(own, messages)\n",
        "crash points, forked",
        "kills, consume",
    ),
    _m(
        "a failed statement swallowed",
        "PostgreSQL turns the COMMIT into a ROLLBACK, and the message counts as done",
        "db/unit_of_work.py",
        "        status = self.status()\n        if status is TransactionStatus.INTRANS:\n            return\n",
        "        status = self.status()\n        return\n",
        "guards",
    ),
    _m(
        "an unconfirmed COMMIT taken for one that did not happen",
        "the batch is booked twice",
        "consume/ownership.py",
        "        return self._hold(renewed)\n\n    def _claim",
        "        return self._hold(renewed.moved(doubtful.next_offset))\n\n    def _claim",
        "cuts of COMMIT",
        also=(
            (
                "eoframework/db/position.py",
                "    AND p.epoch = f.epoch AND p.next_offset = f.expected\nRETURNING",
                "    AND p.epoch = f.epoch\nRETURNING",
            ),
        ),
    ),
    _m(
        "records lost by the client not noticed",
        "what an exception out of the client left behind is skipped",
        "kafka/consumer.py",
        "        self._check_nothing_was_lost()\n        self._client_at.clear()\n",
        "        self._client_at.clear()\n",
        "fetching",
        also=(
            (
                "eoframework/kafka/consumer.py",
                "            self._raise_callback_error()\n            self.rewind(self._handed)\n"
                "            if isinstance(",
                "            self._raise_callback_error()\n            if isinstance(",
            ),
        ),
    ),
    _m(
        "records of before a rebalance kept",
        "records beyond the new claim's position come first, and those between are skipped",
        "kafka/consumer.py",
        "        if self._rebalances != before:\n",
        "        if self._rebalances < before:\n",
        "fetching",
    ),
    _m(
        "a lost offset guessed",
        "a consumer whose positions are gone begins anew, and books everything again",
        "kafka/config.py",
        '"auto.offset.reset": "error"',
        '"auto.offset.reset": "earliest"',
        "fail closed, consume",
    ),
    _m(
        "a moved offset obeyed",
        "a database set back repeats what was sent long ago",
        "consume/ownership.py",
        "                refuse_moved_offset(self._stream, claim, offset, epoch_of_mark(mark))\n",
        "                epoch_of_mark(mark)\n",
        "fail closed, consume",
    ),
    _m(
        "another topic of the same name",
        "offsets of a deleted topic are used in its successor",
        "identity.py",
        "        if row.topic_id != stream.topic_id:\n",
        "        if row.topic_id != stream.topic_id and not row.topic_id:\n",
        "fail closed, consume",
    ),
    # --- when a handler fails ---
    _m(
        "lanes not read",
        "a later message of a key overtakes the one that waits",
        "consume/executor.py",
        "            shut = unit.failures.shut_lanes(connection, batch.deliveries)\n",
        "            shut: set[Lane] = set()\n",
        "crash points, forked",
        "stateful",
    ),
    _m(
        "a parked message's id kept",
        "its turn comes, and it is taken for a duplicate of itself",
        "consume/failure.py",
        "        self._stores.processed.forget(connection, self._stream.consumer_id,"
        " {i for i in recorded if i is not None})\n",
        "        del recorded\n",
        "crash points, forked",
        "stateful",
    ),
    _m(
        "a parked message run without the fence",
        "two owners run it",
        "consume/drain.py",
        "                self._unit.fence(connection, [claim])\n                parked = self._parking.head(",
        "                parked = self._parking.head(",
        "stateful",
        "failures",
    ),
    _m(
        "dead letter in a transaction of its own",
        "a message is dead, and also an effect",
        "consume/failure.py",
        "        number = self._stores.dead_letters.bury(\n            connection, self._stream,"
        " Dead(parked, delivery.id, verdict.why, cause, holds)\n        )\n",
        f"        {_OWN}\n            number = self._stores.dead_letters.bury(\n"
        "                own, self._stream, Dead(parked, delivery.id, verdict.why, cause, holds)\n            )\n",
        "crash points, forked",
        "kills, consume",
    ),
    _m(
        "a replayed message's id kept",
        "the replay is a duplicate, and nothing happens",
        "db/dead_letter_desk.py",
        '            self._run(connection, _FORGET, {**_identity(letter), "died_at": died_at}, rows=False)\n',
        "            del died_at\n",
        "operators",
        "stateful",
    ),
    _m(
        "pruned before it is recorded",
        "ids are forgotten that count as remembered: a reprocess repeats effects",
        "prune.py",
        "            self._before = covered.before\n",
        "            self._before = clock.now()\n",
        "crash points, forked",
        "coverage",
    ),
    _m(
        "a call's claim without a fence",
        "a caller that was given up stores its result over its successor's",
        "db/external_calls.py",
        '_MINE = f"{_ONE} AND fence = %(fence)s AND done_at IS NULL"',
        '_MINE = f"{_ONE} AND done_at IS NULL"',
        "external",
    ),
    # --- from the database to Kafka ---
    _m(
        "key locks left out",
        "two transactions of one key are sent in another order than they were committed in",
        "db/outbox.py",
        'f"SELECT pg_advisory_xact_lock({self._lock_class}, bucket)',
        'f"SELECT length(({self._lock_class} + bucket)::text)',
        "statements",
    ),
    _m(
        "checkpoint ignored",
        "a batch that was sent and not deleted is sent again",
        "relay/recovery.py",
        "    return place, last.batch_no\n",
        "    return place, state.batch_no\n",
        "crash points, forked",
        "kills and freezes, relay",
    ),
    _m(
        "checkpoint outside the Kafka transaction",
        "a crash between the two leaves a batch that was sent and has no checkpoint",
        "relay/relay.py",
        "            self._sender.send([self._checkpoint(rows)])\n"
        '        events.emit("relay.produced", shard=self.claim.shard, rows=len(rows))\n'
        "        self._sender.commit()\n",
        '            events.emit("relay.produced", shard=self.claim.shard, rows=len(rows))\n'
        "            self._sender.commit()\n"
        "            self._sender.begin()\n"
        "            self._sender.send([self._checkpoint(rows)])\n"
        "        self._sender.commit()\n",
        "kills and freezes, relay",
    ),
    _m(
        "rows deleted before they are sent",
        "a crash between the two loses them",
        "relay/relay.py",
        "            self._publish(rows)\n        except Rejected as rejected:\n"
        "            self._set_aside(rows, rejected)\n            return\n        self._remove(rows)\n",
        "            self._remove(rows)\n            self._publish(rows)\n        except Rejected as rejected:\n"
        "            self._set_aside(rows, rejected)\n            return\n",
        "crash points, forked",
        "kills and freezes, relay",
        "relay",
    ),
    _m(
        "no fencing at Kafka",
        "a relay that was taken over goes on sending",
        "relay/relay.py",
        "        name = transactional_id(self._around.checkpoints.outbox_id, self.claim.shard)\n",
        "        name = transactional_id(self._around.checkpoints.outbox_id, self.claim.shard) + self.claim.owner\n",
        "kills and freezes, relay",
    ),
    _m(
        "ownership checked before the producer fences",
        "a frozen relay wakes up, fences its successor and sends again what that one has sent",
        "relay/relay.py",
        "        self._sender.make_ready()\n        rows, taken = self._select()\n",
        "        rows, taken = self._select()\n        self._sender.make_ready()\n",
        "kills and freezes, relay",
    ),
    _m(
        "cursor poll",
        "a row committed later than one with a higher number is never sent",
        "relay/relay.py",
        "        return found.rows, taken\n",
        "        rows = [row for row in found.rows if row.seq > getattr(self, '_seen', 0)]\n"
        "        self._seen = max((row.seq for row in rows), default=getattr(self, '_seen', 0))\n"
        "        return rows, taken\n",
        "relay",
        "kills and freezes, relay",
    ),
    # --- from Kafka to Kafka ---
    _m(
        "no quarantine",
        "a late EndTxn or TxnOffsetCommit ends, or moves, a later transaction",
        "kafka/transaction.py",
        "        if taken >= self._quarantine_after:\n",
        "        if taken >= self._quarantine_after + 3600:\n",
        "late requests, transform",
    ),
    _m(
        "metadata taken at the commit",
        "a member that was thrown out meanwhile moves its successor's offsets",
        "kafka/consumer.py",
        "        return Membership.read(self._consumer.consumer_group_metadata())\n",
        "        read = self._consumer.consumer_group_metadata\n"
        '        return type("Late", (), {"raw": property(lambda _: read())})()\n',
        "freezes, transform",
    ),
    _m(
        "metadata of no member",
        "Kafka takes offsets of a stranger unchecked",
        "kafka/membership.py",
        "        if generation < 0 or not member:\n",
        "        if generation < -1:\n",
        "freezes, transform",
        "doubts, transform",
    ),
    _m(
        "offsets of what was fetched",
        "what waits behind a message that failed is skipped",
        "transform/transformer.py",
        "            work.stands[record.partition] = Stand(record.offset, after(verdict, mark))\n",
        "            work.stands[record.partition] = Stand(record.offset + 1, after(verdict, mark))\n",
        "doubts, transform",
    ),
    _m(
        "an unconfirmed transaction taken for one that did not happen",
        "outputs are made again of what was committed",
        "transform/worker.py",
        "            self._doubt(consumer, outcome.trouble)\n            return\n        for partition, end",
        "            consumer.rewind({p: stand.offset for p, stand in self._stands.items()})\n            return\n"
        "        for partition, end",
        "doubts, transform",
        "late requests, transform",
    ),
    _m(
        "given up without a letter",
        "a message that failed for good is in no dead letter topic",
        "transform/transformer.py",
        "        return [letter]\n",
        "        del letter\n        return []\n",
        "doubts, transform",
    ),
    _m(
        "missing offsets begun anew",
        "a group whose offsets expired makes all outputs again",
        "transform/start.py",
        "                raise self._lost(stream, lost)\n",
        "                self._lost(stream, lost)\n",
        "beginning, transform",
    ),
    _m(
        "uncommitted records read",
        "outputs are made of inputs that were aborted",
        "kafka/config.py",
        '"isolation.level": "read_committed"',
        '"isolation.level": "read_uncommitted"',
        "kills, transform",
    ),
)
