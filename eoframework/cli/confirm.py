"""Asking before a change that a person must want."""

from __future__ import annotations

import sys

import typer

from eoframework.errors import EoError


class Unconfirmed(EoError):
    """Nobody said yes; nothing was changed."""

    exit_code = 2


def confirm(question: str, *, yes: bool) -> None:
    """Return when the answer is yes, or was given with --yes. Raises Unconfirmed, also when nobody is there to ask."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise Unconfirmed(f"{question} Nobody is here to answer; nothing was changed.", remedy="Say --yes.")
    if not typer.confirm(question, err=True):
        raise Unconfirmed("not confirmed; nothing was changed.")
