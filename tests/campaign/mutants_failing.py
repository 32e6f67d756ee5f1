"""Planted bugs of what is done with messages that fail, and of the calls that a handler makes outside."""

from __future__ import annotations

from tests.campaign.mutant import bug

PARKING = (
    bug(
        "what was rolled back is not fetched again",
        "the client goes on behind a batch that was not committed, and the position follows it",
        "consume/worker.py",
        "        self._rewind_rest(consumer, records)\n",
        "",
        "failures, consume",
    ),
    bug(
        "a Session's other engine",
        "effects go to a connection of their own: they stay when the batch is rolled back",
        "db/unit_of_work.py",
        '    setattr(session, "get_bind", lambda *_, **__: connection)  # noqa: B010 - mypy\n',
        "",
        "guards",
    ),
    bug(
        "objects of before a savepoint fell back",
        "a handler adds to what it read of effects that were taken back: they count twice",
        "consume/calls.py",
        "            tx.session.expire_all()\n",
        "",
        "stale objects",
    ),
    bug(
        "a failure does not shut its lane",
        "a later message of its key in the same batch overtakes it",
        "consume/calls.py",
        "            self.shut.add(delivery.lane)\n",
        "            pass\n",
        "failures",
    ),
    bug(
        "the order of culprits in a list",
        "a later message of the failing one's key was in the same list, and stays done",
        "consume/calls.py",
        "            elif errors and delivery.lane in walk.shut:\n                raise culprits\n",
        "",
        "lists",
    ),
    bug(
        "the last of a lane first",
        "parked messages of a key run in the wrong order",
        "db/parking.py",
        'FROM {{eo}}.parked_message WHERE {_LANE} ORDER BY "offset" LIMIT 1',
        'FROM {{eo}}.parked_message WHERE {_LANE} ORDER BY "offset" DESC LIMIT 1',
        "stateful",
        "failures",
    ),
    bug(
        "a lane not locked by who drains it",
        "it is opened under a message that an operator puts back: that one is overtaken",
        "db/parking.py",
        "AND NOT held AND due_at <= clock_timestamp() FOR UPDATE\n",
        "AND NOT held AND due_at <= clock_timestamp()\n",
        "failures",
    ),
    bug(
        "a dead letter's id not recorded",
        "its producer's duplicate is run, although the message was given up",
        "consume/failure.py",
        "        if ids and not self._stores.processed.claim(connection, self._stream.consumer_id, ids):\n",
        "        if ids and self._stream is None:\n",
        "stateful",
        "failures",
    ),
    bug(
        "a held key goes on",
        "what waits for a person's decision about a dead letter runs without it",
        "consume/failure.py",
        'parking.remove(connection, self._stream, parked, hold=self._policy.after_dead == "hold")',
        "parking.remove(connection, self._stream, parked)",
        "stateful",
        "failures",
    ),
    bug(
        "no breaker",
        "a bad deploy empties a topic into the dead letters",
        "consume/failure.py",
        "            raise self._tripped(dying[-1][0], refusal)\n",
        "            self._tripped(dying[-1][0], refusal)\n",
        "breaker",
    ),
    bug(
        "a breaker that a restart sets back",
        "a supervisor that starts again and again gets around it, and all of the topic dies",
        "consume/failure.py",
        "        letters.set_run(connection, consumer_id, run)\n",
        "        del run\n",
        "breaker",
    ),
)

CALLING = (
    bug(
        "a stored result not used",
        "a call that was made is made again",
        "db/external_calls.py",
        "        if row.done:\n            return Done(str(row.result))\n",
        "",
        "external",
        also=(
            (
                "eoframework/db/external_calls.py",
                "WHERE {_ONE} AND done_at IS NULL RETURNING fence, calls",
                "WHERE {_ONE} RETURNING fence, calls",
            ),
        ),
    ),
    bug(
        "a processed message called for",
        "a producer's duplicate is charged, though its handler never runs",
        "db/external_calls.py",
        "WHERE NOT {_PROCESSED} ON CONFLICT",
        "WHERE true ON CONFLICT",
        "external",
    ),
    bug(
        "an unresolved call made again",
        "a call of which nobody knows whether it happened is made a second time",
        "db/external_calls.py",
        "        if not (again or row.owner is None or (mine and unmade)):\n",
        "        if not (again or row.owner is None or row.owner):\n",
        "external",
    ),
    bug(
        "a call's lease not waited for",
        "two make the same call at once",
        "db/external_calls.py",
        "and not mine and row.seconds_left > 0:",
        "and not mine and row.seconds_left > 3600:",
        "external",
    ),
)
