"""Planted bugs of what leads from the database to Kafka, and from Kafka to Kafka."""

from __future__ import annotations

from tests.campaign.mutant import bug

RELAYING = (
    bug(
        "published in AUTOCOMMIT",
        "a message is sent of a change that is rolled back",
        "db/publishing.py",
        "    if driver.autocommit:\n",
        "    if driver.autocommit is None:\n",
        "publishing",
    ),
    bug(
        "key locks taken unsorted",
        "two transactions that publish for the same keys deadlock",
        "db/outbox.py",
        "        buckets = sorted({order_bucket(key) for key in ordered})\n",
        "        buckets = [*dict.fromkeys(order_bucket(key) for key in ordered)]\n",
        "statements",
    ),
    bug(
        "key locks left out",
        "two transactions of one key are sent in another order than they were committed in",
        "db/outbox.py",
        'f"SELECT pg_advisory_xact_lock({self._lock_class}, bucket)',
        'f"SELECT length(({self._lock_class} + bucket)::text)',
        "statements",
    ),
    bug(
        "checkpoint ignored",
        "a batch that was sent and not deleted is sent again",
        "relay/recovery.py",
        "    return place, last.batch_no\n",
        "    return place, state.batch_no\n",
        "crash points, forked",
        "kills and freezes, relay",
    ),
    bug(
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
    bug(
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
    bug(
        "no fencing at Kafka",
        "a relay that was taken over goes on sending",
        "relay/relay.py",
        "        name = transactional_id(self._around.checkpoints.outbox_id, self.claim.shard)\n",
        "        name = transactional_id(self._around.checkpoints.outbox_id, self.claim.shard) + self.claim.owner\n",
        "kills and freezes, relay",
    ),
    bug(
        "ownership checked before the producer fences",
        "a frozen relay wakes up, fences its successor and sends again what that one has sent",
        "relay/relay.py",
        "        self._sender.make_ready()\n        rows, taken = self._select()\n",
        "        rows, taken = self._select()\n        self._sender.make_ready()\n",
        "kills and freezes, relay",
    ),
    bug(
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
)

TRANSFORMING = (
    bug(
        "no quarantine",
        "a late EndTxn or TxnOffsetCommit ends, or moves, a later transaction",
        "kafka/transaction.py",
        "        if taken >= self._quarantine_after:\n",
        "        if taken >= self._quarantine_after + 3600:\n",
        "late requests, transform",
    ),
    bug(
        "metadata taken at the commit",
        "a member that was thrown out meanwhile moves its successor's offsets",
        "kafka/consumer.py",
        "        return Membership.read(self._consumer.consumer_group_metadata())\n",
        "        read = self._consumer.consumer_group_metadata\n"
        "        now = Membership.read(read())\n"
        '        late = {"raw": property(lambda _: read()), "generation": now.generation, "member": now.member}\n'
        '        return type("Late", (), {**late, "group": now.group})()\n',
        "doubts, transform",
        "freezes, transform",
    ),
    bug(
        "metadata of no member",
        "Kafka takes offsets of a stranger unchecked",
        "kafka/membership.py",
        "        if generation < 0 or not member:\n",
        "        if generation < -1:\n",
        "beginning, transform",
        "freezes, transform",
        "doubts, transform",
    ),
    bug(
        "offsets of what was fetched",
        "what waits behind a message that failed is skipped",
        "transform/transformer.py",
        "            work.stands[record.partition] = Stand(record.offset, after(verdict, mark))\n",
        "            work.stands[record.partition] = Stand(record.offset + 1, after(verdict, mark))\n",
        "doubts, transform",
    ),
    bug(
        "an unconfirmed transaction taken for one that did not happen",
        "outputs are made again of what was committed",
        "transform/worker.py",
        "            self._doubt(consumer, outcome.trouble)\n            return\n        for partition, end",
        "            consumer.rewind({p: stand.offset for p, stand in self._stands.items()})\n            return\n"
        "        for partition, end",
        "doubts, transform",
        "late requests, transform",
    ),
    bug(
        "given up without a letter",
        "a message that failed for good is in no dead letter topic",
        "transform/transformer.py",
        "        return [letter]\n",
        "        del letter\n        return []\n",
        "doubts, transform",
    ),
    bug(
        "missing offsets begun anew",
        "a group whose offsets expired makes all outputs again",
        "transform/start.py",
        "                raise self._lost(stream, lost)\n",
        "                self._lost(stream, lost)\n",
        "beginning, transform",
    ),
    bug(
        "uncommitted records read",
        "outputs are made of inputs that were aborted",
        "kafka/config.py",
        '"isolation.level": "read_committed"',
        '"isolation.level": "read_uncommitted"',
        "kills, transform",
    ),
)
