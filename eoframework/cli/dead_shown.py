"""Dead letters, lanes and trials as JSON documents and as text for people."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

from eoframework.dead import DeadGroup, DeadLetter, ParkedLane, ParkedMessage, Replayed, RowChange, TableChanges, Trial
from eoframework.legible import beginning, legible
from eoframework.message import Headers, OutboxMessage, Record

Document = dict[str, Any]

_CAP = 4_000


def letter_document(letter: DeadLetter) -> Document:
    """A letter as `ls` shows it."""
    return {
        "id": letter.id,
        "handler": letter.consumer,
        "topic": letter.record.topic,
        "partition": letter.record.partition,
        "offset": letter.record.offset,
        "key": legible(letter.record.key),
        "message_id": str(letter.message_id) if letter.has_id else None,
        "died_at": _iso(letter.died_at),
        "attempts": letter.attempts,
        "crashes": letter.crashes,
        "error_class": letter.error_class,
        "fingerprint": letter.fingerprint,
        "cause": letter.cause,
        "holds": letter.holds,
    }


def whole_letter_document(letter: DeadLetter) -> Document:
    """A letter as `show` shows it."""
    return letter_document(letter) | {
        "topic_id": str(letter.topic_id),
        "lane": str(letter.lane),
        "first_failed_at": _iso(letter.first_failed_at),
        "last_failed_at": _iso(letter.last_failed_at),
        "error": letter.error,
        "traceback": letter.traceback,
        "unreadable": letter.record.unreadable or None,
        "replayable_here": letter.has_position and not letter.processed_since,
        **_content(letter.record, letter.size),
    }


def letter_line(letter: DeadLetter) -> str:
    """A letter in one line."""
    key = "" if letter.record.key is None else f" key {_short(letter.record.key)}"
    held = " (its key is held)" if letter.holds else ""
    died = letter.died_at.isoformat(timespec="seconds")
    return f"{letter.id}  {died}  {letter.consumer} {letter.record}{key}{held}: {letter.cause} [{letter.fingerprint}]"


def letter_text(letter: DeadLetter) -> str:
    """Everything about a letter."""
    whole = whole_letter_document(letter)
    late = ("payload", "traceback")
    lines = [f"{name}: {_plain(value)}" for name, value in whole.items() if name not in late and value is not None]
    if letter.traceback:
        lines += ["", letter.traceback.rstrip()]
    lines += ["", f"payload ({letter.size} bytes):", whole["payload"] or "(none)"]
    if whole["payload_cut"]:
        lines.append(f"... cut; whole: eo dead show {letter.id} --payload")
    return "\n".join(lines)


def group_document(group: DeadGroup) -> Document:
    """What died of one thing."""
    return {
        "handler": group.consumer,
        "fingerprint": group.fingerprint,
        "error_class": group.error_class,
        "count": group.count,
        "first": _iso(group.first),
        "last": _iso(group.last),
        "first_id": group.first_id,
        "cause": group.cause,
    }


def group_line(group: DeadGroup) -> str:
    """What died of one thing, in one line."""
    first, last = (time.isoformat(timespec="seconds") for time in (group.first, group.last))
    return f"{group.fingerprint}  {group.count:>6}  {first} to {last}  {group.consumer}: {group.cause}"


def lane_document(lane: ParkedLane) -> Document:
    """A lane with its first message."""
    return {
        "handler": lane.consumer,
        "topic": lane.topic,
        "topic_id": str(lane.topic_id),
        "partition": lane.partition,
        "key": legible(lane.key),
        "lane": str(lane.lane),
        "state": lane.state,
        "held_by": lane.held_by,
        "due_at": _iso(lane.due_at),
        "since": _iso(lane.since),
        "messages": lane.messages,
        "offset": lane.offset,
        "attempts": lane.attempts,
        "crashes": lane.crashes,
        "error_class": lane.error_class,
        "fingerprint": lane.fingerprint,
    }


def lane_line(lane: ParkedLane) -> str:
    """A lane in one line."""
    key = "(no key)" if lane.key is None else f"key {_short(lane.key)}"
    due = f"until {lane.due_at.isoformat(timespec='seconds')}" if lane.state == "waiting" else ""
    due = f"for dead letter {lane.held_by}" if lane.state == "held" else due
    due = "(nobody stands for its topic)" if lane.state == "stranded" else due
    first = (
        f", first {lane.topic}[{lane.partition}]@{lane.offset} after {lane.attempts} attempts" if lane.messages else ""
    )
    error = f": {lane.error_class}" if lane.error_class else ""
    return f"{lane.state:7} {due}  {lane.consumer} {key}: {lane.messages} waiting{first}{error}"


def message_document(message: ParkedMessage) -> Document:
    """A message in its lane."""
    return {
        "offset": message.record.offset,
        "message_id": str(message.message_id) if message.message_id else None,
        "parked_at": _iso(message.parked_at),
        "attempts": message.attempts,
        "crashes": message.crashes,
        "last_failed_at": _iso(message.last_failed_at),
        "error_class": message.error_class,
        "error": message.error,
        **_content(message.record, message.size),
    }


def message_line(message: ParkedMessage) -> str:
    """A message in its lane, in one line."""
    failed = f" failed {message.attempts} times, last {message.error_class}" if message.attempts else " waits behind it"
    return f"  {message.record}{failed}: {beginning(message.record.value, 100)}"


def trial_document(letter: DeadLetter, trial: Trial) -> Document:
    """What a trial would have done."""
    error = trial.error
    return {
        "id": letter.id,
        "handler": letter.consumer,
        "succeeds": error is None,
        "error": None
        if error is None
        else {
            "class": error.error_class,
            "place": error.place,
            "fingerprint": error.fingerprint,
            "message": error.error,
            "traceback": error.traceback,
        },
        "tables": [_table_document(table) for table in trial.tables],
        "published": [_published_document(message) for message in trial.published],
    }


def trial_text(letter: DeadLetter, trial: Trial) -> str:
    """What a trial would have done, for people."""
    about = f"{letter.consumer} on {letter.record} (dead letter {letter.id})"
    if trial.error is not None:
        return f"{about} fails: {trial.error}: {trial.error.error}\n\n{trial.error.traceback or ''}".rstrip()
    lines = [f"{about} succeeds; it was rolled back. It would change:"]
    for table in trial.tables:
        lines += [f"  {table.table}: {_change_line(change)}" for change in table.changes]
        lines += [f"  {table.table}: ... and more"] * table.more
        lines += [f"  {table.table}: {table.note}"] * bool(table.note)
    lines += ["  nothing"] * (not trial.tables)
    lines.append("and publish:" if trial.published else "and publish nothing")
    lines += [f"  {m.topic} key {legible(m.key)}: {beginning(m.payload, _CAP)}" for m in trial.published]
    return "\n".join(lines)


def replayed_document(done: Replayed, *, dry_run: bool) -> Document:
    """What a replay did, or would."""
    refused = [{"id": refusal.letter.id, "why": str(refusal.why)} for refusal in done.refused]
    return {"dry_run": dry_run, "replayed": done.moved, "gone": done.gone, "refused": refused, "stopped": done.stopped}


def replayed_text(done: Replayed, *, dry_run: bool) -> str:
    """What a replay did, or would, for people."""
    verb = "would wait in their lanes again" if dry_run else "wait in their lanes again and run when their owner comes"
    lines = [f"{len(done.moved)} dead letters {verb}"]
    if done.gone:
        lines.append(f"{len(done.gone)} were replayed or discarded by somebody else meanwhile")
    if done.stopped:
        lines.append("stopped before the end; say it again for the rest")
    lines += [f"left as it is: {refusal.why}" for refusal in done.refused]
    return "\n".join(lines)


def _content(record: Record, size: int) -> Document:
    shown = beginning(record.value, _CAP)
    cut = record.value is not None and size > min(len(record.value), _CAP)
    return {"headers": _headers(record.headers), "payload": shown, "payload_bytes": size, "payload_cut": cut}


def _table_document(table: TableChanges) -> Document:
    changes = [{"kind": change.kind, "before": change.before, "after": change.after} for change in table.changes]
    return {"table": table.table, "changes": changes, "more": table.more, "note": table.note or None}


def _published_document(message: OutboxMessage) -> Document:
    return {
        "topic": message.topic,
        "key": legible(message.key),
        "id": str(message.id),
        "type": message.type,
        "headers": _headers(message.headers),
        "payload": beginning(message.payload, _CAP),
        "deliver_at": _iso(message.deliver_at),
    }


def _change_line(change: RowChange) -> str:
    if change.kind == "update" and change.before is not None and change.after is not None:
        before = change.before
        new = {name: value for name, value in change.after.items() if before.get(name) != value}
        old = {name: before.get(name) for name in new}
        same = {name: value for name, value in change.after.items() if name not in new}
        return f"update {_row(old)} -> {_row(new)} where {_row(same)}"
    return f"{change.kind} {_row(change.after if change.after is not None else change.before)}"


def _row(row: object) -> str:
    text = json.dumps(row, ensure_ascii=False)
    return text if len(text) <= _CAP else f"{text[:_CAP]} ... ({len(text)} characters)"


def _headers(headers: Headers) -> list[list[str | None]]:
    return [[name, legible(value)] for name, value in headers]


def _short(data: bytes) -> str:
    return f"{beginning(data, 80)}{'...' if len(data) > 80 else ''}"


def _plain(value: object) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else str(value)


def _iso(time: datetime | None) -> str | None:
    return time.isoformat() if time is not None else None
