"""Planted bugs of what transforms and Producers do with Kafka's transactions, and of what brokers are asked."""

from __future__ import annotations

from tests.campaign.mutant import bug

KAFKA = (
    bug(
        "offsets in a transaction of their own",
        "a crash between the two makes the outputs again",
        "transform/transformer.py",
        "        self._producer.send_offsets(self._topic.name, offsets, membership)\n        self._producer.commit()\n",
        "        self._producer.commit()\n        self._producer.make_ready()\n        self._producer.begin()\n"
        "        self._producer.send_offsets(self._topic.name, offsets, membership)\n        self._producer.commit()\n",
        "kills, transform",
    ),
    bug(
        "a step that failed goes on with the next records",
        "those it had fetched are skipped, and the offset moves past them",
        "transform/worker.py",
        "                # They count as handed out: to go on with the next ones would skip them.\n"
        "                self._doubt(consumer, trouble)\n",
        "                del trouble\n",
        "doubts, transform",
    ),
    bug(
        "a partition goes on past the message that it waits for",
        "outputs come out of their order",
        "transform/worker.py",
        "        consumer.pause([partition])\n        if held.retry_in is not None:\n",
        "        if held.retry_in is not None:\n",
        "doubts, transform",
    ),
    bug(
        "innocents refused with the culprit",
        "all messages of a transaction are given up for one whose output Kafka refuses",
        "transform/transformer.py",
        "        if work.records > 1:\n",
        "        if work.records > 100_000:\n",
        "doubts, transform",
    ),
    bug(
        "counted past the message that is waited for",
        "the count of the next message in flight moves the offset past one that failed",
        "transform/transformer.py",
        "                elif left[0].partition in outcome.held:\n",
        "                elif left[0].partition in outcome.held and left[0].offset < 0:\n",
        "deadly, transform",
    ),
    bug(
        "a block that failed is committed",
        "readers see messages of work that was given up",
        "producer_transaction.py",
        "            if error is not None:\n                self._abort()\n                return\n",
        "",
        "transactions, producer",
    ),
    bug(
        "a failure caught in the block is forgotten",
        "the rest of its messages are committed without the one that failed",
        "producer_transaction.py",
        "            if self._broken is not None:\n                raise self._broken\n            if self._batch",
        "            if self._batch",
        "transactions, producer",
    ),
    bug(
        "an unanswered commit taken for none",
        "the caller is told to send again what is there already",
        "producer_transaction.py",
        "            committed = self._read_back(deadline)\n",
        "            committed = self._read_back(deadline) and not self._batch.tickets\n",
        "outages, producer",
    ),
    bug(
        "a producer used on after an error",
        "a late request of its earlier transaction ends the next one",
        "kafka/transaction.py",
        '        self.doubt(f"{what} failed: {kafka_error(error).str()}")\n',
        "",
        "client errors",
    ),
    bug(
        "the leader remembered from before asked for ever",
        "after each broker's restart no partition can be claimed for minutes",
        "kafka/admin.py",
        "        self._look_around()\n"
        "        # One that is missing or forbidden has no leaders either, and only this question is told why.\n"
        "        self.ask_topic_id(topic)()\n",
        "",
        "brokers",
    ),
    bug(
        "a handler's lost client not noticed",
        "it stands still for good, as if there were nothing to read",
        "consume/worker.py",
        "                consumer.contact.check()\n",
        "                pass\n",
        "lost clients",
    ),
    bug(
        "a transform's lost client not noticed",
        "it stands still for good, as if there were nothing to read",
        "transform/worker.py",
        "                self._member().contact.check()\n",
        "",
        "lost clients",
    ),
    bug(
        "a lost client asked for ever",
        "no partition is claimed any more, no topic checked",
        "kafka/admin.py",
        "                if self._client_made is client:\n                    self._client_made = None\n",
        "                pass\n",
        "lost clients",
    ),
    bug(
        "a lost client sends for ever",
        "every message times out until the process is started again",
        "kafka/sending.py",
        "                self._break_if_lost()\n",
        "",
        "lost clients, producer",
    ),
    bug(
        "a slow producer taken for lost",
        "all that it holds is given up, although it was on its way",
        "kafka/sending.py",
        "now < max(self._next_check, self._confirmed_at + self._patience):",
        "now < self._next_check:",
        "lost clients, producer",
    ),
    bug(
        "a moment's silence not forgiven",
        "a sound worker ends beside each frozen broker",
        "kafka/contact.py",
        "            self._silent_since = None\n            return\n",
        "            return\n",
        "lost clients",
    ),
    bug(
        "group offsets told once",
        "what Kafka refused while its coordinator moved is lag for ever",
        "consume/worker.py",
        "            self._uncommitted |= self._ownership.claims\n",
        "",
        "lost clients",
    ),
)
