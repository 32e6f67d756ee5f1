"""Log lines on stderr: text on a terminal, one JSON object a line otherwise; secrets never."""

from __future__ import annotations

import json
import logging
import re
import sys
import threading
from collections.abc import Iterable
from datetime import UTC, datetime

from eoframework.settings import Settings

_HIDDEN = "***"
_IN_URL = re.compile(r"(://[^\s/?#@:]*:)[^\s/?#]*@")
_ASSIGNED = re.compile(
    r"(?i)((?:password|passphrase|secret|key\.pem|oauthbearer\.config)['\"]?\s*[=:]\s*)('[^']*'|\"[^\"]*\"|[^\s,;&]+)"
)
_LONG_ENOUGH = 6

_secrets: set[str] = set()

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}


def hide(secrets: Iterable[str]) -> None:
    """Never show these values again, in no log line and no error message."""
    _secrets.update(secret for secret in secrets if secret)


def redact(text: str) -> str:
    """The text without any known secret, without passwords in URLs and without values of password-like keys."""
    for secret in sorted(_secrets, key=len, reverse=True):
        if len(secret) >= _LONG_ENOUGH:
            text = text.replace(secret, _HIDDEN)
        else:
            # A short password is also a part of ordinary words.
            text = re.sub(rf"(?<!\w){re.escape(secret)}(?!\w)", _HIDDEN, text)
    text = _IN_URL.sub(rf"\1{_HIDDEN}@", text)
    return _ASSIGNED.sub(rf"\1{_HIDDEN}", text)


def configure(settings: Settings) -> None:
    """Send all log lines of the process to stderr, in the form that suits who reads them."""
    hide(settings.secrets())
    as_text = settings.log_format == "text" or (settings.log_format == "auto" and sys.stderr.isatty())
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Text() if as_text else _Json())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(settings.log_level.upper())
    # Their own lines tell nothing that ours do not, several times over.
    for noisy in ("alembic", "sqlalchemy"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


class _Text(logging.Formatter):
    """`14:03:07 WARNING relay shard 2: ...`; whoever a line names itself is named once."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(message)s", "%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        thread = "main" if record.thread == threading.main_thread().ident else str(record.threadName)
        # "transform shop.plan: shop.plan: ...", or the same with "transform" twice.
        message = record.message
        for said in (thread, thread.rpartition(" ")[2]):
            message = message.removeprefix(f"{said}: ")
        shown = logging.makeLogRecord(vars(record) | {"message": f"{thread}: {message}"})
        return super().formatMessage(shown)

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


class _Json(logging.Formatter):
    """One object a line: time, level, logger, worker, message, error, and whatever was given as `extra`."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "worker": record.threadName,
            "message": redact(record.getMessage()),
        }
        line |= {key: _shown(value) for key, value in vars(record).items() if key not in _STANDARD}
        if record.exc_info:
            line["error"] = redact(self.formatException(record.exc_info))
        return json.dumps(line, ensure_ascii=False)


def _shown(value: object) -> object:
    return value if isinstance(value, (bool, int, float, type(None))) else redact(str(value))
