"""Planted bugs of what knows where it is: a database restored or copied, a pooler between."""

from __future__ import annotations

from tests.campaign.mutant import bug

PLACES = (
    bug(
        "a copy of the database not recognised",
        "staging, restored from production's dump, sends production's messages and takes its partitions",
        "db/home.py",
        "    if home.moved:\n        raise",
        "    if home.moved and home.here is None:\n        raise",
        "restored",
    ),
    bug(
        "a declared copy keeps its outbox",
        "the two fence each other at Kafka, and stop for each other's checkpoints",
        "db/adopting.py",
        "UPDATE {eo}.outbox SET id = gen_random_uuid(), home",
        "UPDATE {eo}.outbox SET home",
        "restored",
    ),
    bug(
        "a declared copy keeps what waits",
        "messages that the original sends are sent by the copy too",
        "db/adopting.py",
        '"pending messages": "DELETE FROM {eo}.outbox_message",',
        '"pending messages": "DELETE FROM {eo}.outbox_message WHERE false",',
        "restored",
    ),
    bug(
        "an outbox adopted without a look into its topics",
        "a database set back sends again what it has forgotten to have sent",
        "outbox_adoption.py",
        '    gone = [row for row in sent if row.state != "dead"]\n',
        '    gone = [row for row in sent if row.state == "gone"]\n',
        "restored",
    ),
    bug(
        "an outbox adopted while a relay runs",
        "what that one sends meanwhile is sent again",
        "db/outbox_adoption.py",
        "        alive = [row for row in rows if row[5]]\n",
        "        alive = [row for row in rows if row[5] is None]\n",
        "restored",
    ),
    bug(
        "a database set back goes on",
        "shards that have nothing to send stop for it, the others send what was sent",
        "relay/recovery.py",
        "    if behind:\n",
        "    if behind and not lasts:\n",
        "fail closed, relay",
    ),
    bug(
        "a pooler taken for the server",
        "timeouts and prepared statements stay in a session that somebody else gets next",
        "db/links.py",
        "pooled=connection.info.backend_pid != ask(",
        "pooled=connection.info.backend_pid is ask(",
        "pooler",
    ),
    bug(
        "settings that a pooler drops not missed",
        "what the URL asks for, such as synchronous_commit, is not so, and nobody says it",
        "db/links.py",
        "        if found != ask(",
        "        if found is None and found != ask(",
        "pooler",
    ),
)
