"""Planted bugs of the outbox: how durable it is, in which order, and whether Kafka and the database belong together."""

from __future__ import annotations

from tests.campaign.mutant import bug

DURABLE = (
    bug(
        "a published message without a durable COMMIT",
        "a crash of the server takes back what was published already: a message without a cause",
        "db/outbox.py",
        "WHERE current_setting('synchronous_commit') IN ('off', 'local')",
        "WHERE current_setting('synchronous_commit') IN ('none')",
        "durability",
    ),
    bug(
        "a batch without a durable COMMIT",
        "a crash of the server takes back effects whose offset the group counts as done",
        "db/unit_of_work.py",
        "CASE WHEN current_setting('synchronous_commit') IN ('off', 'local') THEN 'on'",
        "CASE WHEN current_setting('synchronous_commit') IN ('none') THEN 'on'",
        "durability",
        "sessions of a pooler",
    ),
    bug(
        "a deletion of the relay's without a durable COMMIT",
        "a crash of the server leaves the database two batches behind its checkpoint",
        "db/shards.py",
        "CASE WHEN current_setting('synchronous_commit') IN ('off', 'local') THEN 'on'",
        "CASE WHEN current_setting('synchronous_commit') IN ('none') THEN 'on'",
        "durability",
    ),
    bug(
        "a claim or a command without a durable COMMIT",
        "a crash of the server takes back that a call is being made: it is made a second time",
        "db/session.py",
        "CASE WHEN current_setting('synchronous_commit') IN ('off', 'local') THEN 'on'",
        "CASE WHEN current_setting('synchronous_commit') IN ('none') THEN 'on'",
        "durability",
    ),
    bug(
        "published before the standby has it",
        "a failover takes back the cause of a message that was sent",
        "relay/relay.py",
        "            if found.replicated:\n                self._rows.settle_on_standby(self.claim)\n",
        "",
        "standby, relay",
    ),
    bug(
        "a COMMIT whose wait was cancelled believed by a worker",
        "a batch counts as done that a failover takes back",
        "db/unit_of_work.py",
        "        check_confirmed(transaction.connection, what)\n",
        "        del what\n",
        "cancelled COMMITs",
    ),
    bug(
        "a COMMIT whose wait was cancelled believed by the relay",
        "it sends a message whose row a failover takes back",
        "db/shards.py",
        "            yield connection.execution_options(isolation_level=isolation)\n"
        "            check_confirmed(connection, what)\n",
        "            yield connection.execution_options(isolation_level=isolation)\n",
        "cancelled COMMITs",
    ),
)

OUTBOX = (
    bug(
        "a savepoint's messages kept",
        "a message is sent of what was rolled back with its savepoint",
        "db/publishing.py",
        "if kept.savepoint < number]",
        "if kept.savepoint <= number]",
        "publishing",
    ),
    bug(
        "no ROLLBACK after a COMMIT that failed",
        "the next COMMIT on the connection makes effects durable without their messages",
        "db/publishing.py",
        "            connection.dialect.do_rollback(connection.connection)\n",
        "            pass\n",
        "sessions",
    ),
    bug(
        "rows of a held key sent",
        "later messages of a key overtake the one that waits for a person",
        "db/pending.py",
        "                       AND {not_held}\n                     ORDER BY seq LIMIT",
        "                     ORDER BY seq LIMIT",
        "held keys",
    ),
    bug(
        "a retried message behind its successors",
        "it is sent after the later messages of its key that waited for it",
        "db/outbox_desk.py",
        "            exact = letter.outbox_seq is not None\n",
        "            exact = False\n",
        "held keys",
    ),
    bug(
        "a refused batch given up",
        "innocent messages become dead letters with the one that Kafka refuses",
        "relay/relay.py",
        "        elif len(rows) > 1:\n            self._limit = len(rows) // 2\n",
        "",
        "unsendable",
    ),
    bug(
        "delayed messages in the order in which they were published",
        "of two that are due at once, the one that is to come later comes first",
        "db/pending.py",
        "SELECT {_MESSAGE} FROM due ORDER BY deliver_at, seq",
        "SELECT {_MESSAGE} FROM due ORDER BY seq",
        "delayed",
    ),
    bug(
        "an outbox relayed to another cluster",
        "its checkpoints are on the first one: what was sent there is sent again, or deleted unsent",
        "relay/recovery.py",
        "        if state.cluster_id is not None and state.cluster_id != cluster_id:\n",
        "        if state.cluster_id is not None and not state.cluster_id:\n",
        "fail closed, relay",
    ),
    bug(
        "a checkpoint topic made anew",
        "what was published last is lost with the old one, and it is sent again",
        "relay/recovery.py",
        "        if state.topic_id is not None and state.topic_id != place.topic_id:\n",
        "        if state.topic_id is not None and not state.topic_id:\n",
        "fail closed, relay",
        also=(("eoframework/relay/recovery.py", "    if state.batch_no != 0:\n", "    if state.batch_no < 0:\n"),),
    ),
    bug(
        "a checkpoint that was copied there",
        "a mirrored or restored one says of batches that they were sent, which this cluster never had",
        "relay/recovery.py",
        "    if found != (checkpoints.outbox_id, shard, place.cluster_id, place.topic_id):\n",
        "    if found is None:\n",
        "fail closed, relay",
    ),
    bug(
        "other rows taken for those that were published",
        "a restored database gives their numbers to others, which are deleted unsent",
        "db/pending.py",
        "            if digest_of((row[0], row[1]) for row in found) != checkpoint.digest:\n",
        "            if len(found) != len(checkpoint.seqs):\n",
        "fail closed, relay",
        also=(
            (
                "eoframework/db/pending.py",
                "        return None if digest_of(rows) == checkpoint.digest else _differing(len(rows), checkpoint)\n",
                "        return None if len(rows) == len(checkpoint.seqs) else _differing(len(rows), checkpoint)\n",
            ),
        ),
    ),
    bug(
        "a lagging replica's end taken for the checkpoints'",
        "an older checkpoint counts as the last, and the batch behind it is sent again",
        "kafka/checkpoint.py",
        "                elif error.code() not in _NO_TROUBLE:\n",
        "                elif error.code() == KafkaError._PARTITION_EOF:\n                    return last\n"
        "                elif error.code() not in _NO_TROUBLE:\n",
        "fail closed, relay",
    ),
    bug(
        "what transactions left not settled without them",
        "relay_mode=idempotent sends a batch again that the mode before it had sent",
        "relay/relay.py",
        "                self._settle_earlier_transactions()\n",
        "                pass\n",
        "modes, relay",
    ),
)
