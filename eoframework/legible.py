"""Bytes as people can read them: text where they are printable UTF-8, base64 where they are not."""

from __future__ import annotations

import base64
import binascii

from eoframework.errors import NotFound

_MARK = "base64:"


def legible(data: bytes | None) -> str | None:
    """The text of the bytes, or `base64:...`; `parse_bytes` reads either back."""
    if data is None:
        return None
    try:
        text = data.decode()
    except UnicodeDecodeError:
        text = ""
    printable = all(character.isprintable() or character in "\n\t\r" for character in text)
    if (text or not data) and printable and not text.startswith(_MARK):
        return text
    return _MARK + base64.b64encode(data).decode()


def beginning(data: bytes | None, limit: int) -> str | None:
    """`legible` of at most `limit` bytes; a character that the limit cuts is left out."""
    if data is None or len(data) <= limit:
        return legible(data)
    cut = data[:limit]
    try:
        cut.decode()
    except UnicodeDecodeError as error:
        if error.reason == "unexpected end of data":
            cut = cut[: error.start]
    return legible(cut)


def parse_bytes(text: str) -> bytes:
    """The bytes that `legible` shows so. Raises NotFound for base64 that is none."""
    if not text.startswith(_MARK):
        return text.encode()
    try:
        return base64.b64decode(text.removeprefix(_MARK), validate=True)
    except binascii.Error as error:
        raise NotFound(f"{text!r} is no base64: {error}.", remedy="Copy it as it was shown.") from error
