"""Planted bugs of what decides where to go on: whose offsets, whose topic, whose database they are."""

from __future__ import annotations

from tests.campaign.mutant import Change, bug

_NOT_ASKED_AT_THE_START: Change = (
    "eoframework/consume/start.py",
    "        refuse_set_back(stream, known, around.group_offsets)\n",
    "",
)
"""What sees, at a start, that the database was set back."""

BEGINNING = (
    bug(
        "another cluster's offsets",
        "what was stored for one cluster is used on another: messages are skipped, or done again",
        "identity.py",
        "        if row.cluster_id != stream.cluster_id:\n",
        "        if row.cluster_id != stream.cluster_id and not row.cluster_id:\n",
        "fail closed, consume",
    ),
    bug(
        "an empty database begins anew",
        "a group that has processed the whole topic processes it a second time",
        "consume/start.py",
        "        if around.group_offsets and not self._adopt_offsets:\n",
        "        if around.group_offsets and self._adopt_offsets is None:\n",
        "fail closed, consume",
    ),
    bug(
        "a refused claim leaves its epoch behind",
        "the first start refuses a restored database, the next takes the group's offset for an old one and goes on",
        "consume/ownership.py",
        "                refuse_moved_offset(self._stream, claim, offset, epoch_of_mark(mark))\n"
        "            return claim\n",
        "        if partition in offsets:\n"
        "            refuse_moved_offset(self._stream, claim, offset, epoch_of_mark(mark))\n"
        "        return claim\n",
        "fail closed, consume",
        also=(_NOT_ASKED_AT_THE_START,),
    ),
    bug(
        "a database set back under a worker",
        "batches that a failover took back are done again without a word, though what they sent has left",
        "consume/ownership.py",
        "            if renewed is not None and renewed.next_offset < doubtful.next_offset:\n",
        "            if renewed is not None and renewed.next_offset < 0:\n",
        "fail closed, consume",
    ),
    bug(
        "a standby that lagged taken for the same database",
        "after its promotion the lost batches are done again without a word",
        "consume/ownership.py",
        "            if renewed is not None and renewed.next_offset < doubtful.next_offset:\n",
        "            if renewed is not None and renewed.next_offset < 0:\n",
        "promotions",
        also=(
            _NOT_ASKED_AT_THE_START,
            (
                "eoframework/consume/start.py",
                "offset > position and committed_under >= claim.epoch - 1:",
                "offset > position and committed_under < 0:",
            ),
        ),
    ),
    bug(
        "a position outside the log",
        "nobody is told that what it stands at was deleted, or was never there",
        "consume/ownership.py",
        "        self._check_range(claim)\n",
        "",
        "fail closed, consume",
        # What the client says as soon as it fetches there.
        also=(
            (
                "eoframework/kafka/consumer.py",
                "frozenset({KafkaError._AUTO_OFFSET_RESET, KafkaError._LOG_TRUNCATION})",
                "frozenset({KafkaError._LOG_TRUNCATION})",
            ),
        ),
    ),
    bug(
        "another offset than the expected one moved on",
        "who believes in a position that is no longer so skips what lies between",
        "db/position.py",
        "    AND p.epoch = f.epoch AND p.next_offset = f.expected\nRETURNING",
        "    AND p.epoch = f.epoch\nRETURNING",
        "statements",
        "crash points, forked",
    ),
    bug(
        "a topic re-created between fetch and COMMIT",
        "messages of the new topic are booked, and booked again when it is processed from its beginning",
        "consume/executor.py",
        "        self._before_commit()\n",
        "",
        "fail closed, consume",
    ),
    bug(
        "a renamed handler begins anew",
        "the whole topic is processed a second time under the new name",
        "identity.py",
        "    if group in known or not undeclared:\n",
        "    if group in known or not undeclared or group:\n",
        "first starts",
    ),
    bug(
        "a new partition begun behind its first message",
        "what was sent to a partition before anybody noticed it is skipped",
        "db/position.py",
        "%(topic)s, %(cluster_id)s, 0,\n    1, %(owner)s",
        "%(topic)s, %(cluster_id)s, 1,\n    1, %(owner)s",
        "first starts",
    ),
    bug(
        "a transform goes on in another topic of the same name",
        "offsets of a deleted topic are used in its successor: its first messages are skipped",
        "transform/start.py",
        "            refuse_moved(stream, known)\n",
        "",
        "gone, transform",
    ),
    bug(
        "a topic re-created under a transform",
        "outputs are made of the new topic's messages at the old topic's offsets, and again after the remedy",
        "transform/transformer.py",
        "        confirm()\n",
        "        del confirm\n",
        "gone, transform",
    ),
    bug(
        "a handler's group taken by a transform",
        "it begins at offsets that lag behind the handler's positions, and does again what was done",
        "transform/start.py",
        "                self._refuse_handler(connection, stream)\n",
        "",
        "beginning, transform",
    ),
)
