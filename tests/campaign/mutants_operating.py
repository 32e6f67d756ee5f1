"""Planted bugs of what operators do: dead letters, positions, messages of the past once more."""

from __future__ import annotations

from tests.campaign.mutant import bug

DESK = (
    bug(
        "a replay forgets what was processed since",
        "another delivery of the message had its effects, and the replayed one has them again",
        "db/dead_letter_desk.py",
        "    AND message_id = %(message_id)s AND first_at <= %(died_at)s\n",
        "    AND message_id = %(message_id)s\n",
        "operators",
    ),
    bug(
        "a key released before its other letter is decided",
        "later messages of the key run before one that a person has yet to decide about",
        "db/dead_letter_desk.py",
        "            if self._run(connection, _OTHER_HOLDS, lane)[0][0]:\n"
        "                self._run(connection, _HOLD, lane, rows=False)\n",
        "",
        "operators",
    ),
    bug(
        "letters replayed in the order in which they died",
        "a later message of a key is due while an earlier one is still dead",
        "dead.py",
        "    chosen = sorted(found, key=lambda letter: letter.place)\n    for letter in chosen:\n",
        "    chosen = sorted(found, key=lambda letter: letter.id)\n    for letter in chosen:\n",
        "operators",
    ),
    bug(
        "discarded beyond what was asked",
        "what was parked since a person was asked is deleted too",
        "db/lane_desk.py",
        " AND parked_at <= %(up_to)s RETURNING",
        " RETURNING",
        "dead letter desk",
    ),
    bug(
        "discarded for an error that it no longer has",
        "a lane that the filter would not let through any more is deleted",
        "db/lane_desk.py",
        "            if not connection.exec_driver_sql(still, {**values, **place}).all():\n                return 0\n",
        "            del still, values\n",
        "dead letter desk",
    ),
    bug(
        "a discarded message's id not recorded",
        "its producer's duplicate is run, although it was to be left out",
        "db/lane_desk.py",
        "            ProcessedMessages(schema).claim(connection, lane.consumer_id, ids)\n",
        "            del ids\n",
        "dead letter desk",
    ),
    bug(
        "positions forgotten under what waits",
        "parked messages stand in no list as lost, and nobody runs them",
        "db/position_admin.py",
        "            # Under the locked positions: nobody parks another one.\n"
        '            _refuse(consumer, self._run(connection, _PARKED, {"consumer": consumer})[0][0])\n',
        "",
        "dead letter desk",
    ),
)

REPEATING = (
    bug(
        "reprocessed below the coverage",
        "effects whose ids were forgotten by age are repeated",
        "reprocess_range.py",
        "        return self.start < min(self.covered_from, self.end)\n",
        "        return self.start < min(self.covered_from, 0)\n",
        "reprocess",
    ),
    bug(
        "reprocessed before the group comes there",
        "messages that are the group's to process run beside it, and lose their order",
        "reprocess_range.py",
        "        if offset <= position:\n            return offset\n",
        "        if offset >= 0:\n            return offset\n",
        "reprocess",
    ),
    bug(
        "reprocessed beside a position set back",
        "the group comes by here, and both run the same messages",
        "consume/rerun.py",
        "        self._refuse_set_back(connection, deliveries)\n",
        "",
        "reprocess",
    ),
    bug(
        "reprocessed past what failed",
        "a later message of a key is booked before the one that failed",
        "consume/rerun.py",
        "        return failed_at is not None and delivery.record.offset > failed_at\n",
        "        return failed_at is not None and delivery.record.offset < failed_at\n",
        "reprocess",
    ),
    bug(
        "reprocessed beside its lane",
        "a message of a key in which something waits is run, and overtakes it",
        "consume/rerun.py",
        "            elif delivery.place in aside.parked or delivery.lane in shut:\n",
        "            elif delivery.place in aside.parked:\n",
        "reprocess",
    ),
    bug(
        "repeated at each of its places",
        "an id that stands in two batches has its repeated effect twice",
        "db/reprocessing.py",
        " AND first_at < %(before)s ORDER BY",
        " ORDER BY",
        "reprocess",
    ),
    bug(
        "a batch under way overlooked",
        "its ids are forgotten while its messages count as remembered: a reprocess repeats their effects",
        "db/coverage.py",
        "SELECT least(min(a.xact_start), clock_timestamp()\n",
        "SELECT least(clock_timestamp(), clock_timestamp()\n",
        "coverage",
    ),
    bug(
        "how far a position got is not noted",
        "set back, it counts as covered where its ids were forgotten long ago",
        "db/position_admin.py",
        "        note_reached(connection, self._database.schema, consumer, place)\n",
        "",
        "coverage",
    ),
    bug(
        "a duplicate does not keep its id",
        "the id is forgotten with the first message that bore it: a reprocess repeats the later one's effects",
        "db/processed.py",
        "            connection.exec_driver_sql(self._renew, seen)\n",
        "            del seen\n",
        "coverage",
    ),
)
