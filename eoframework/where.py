"""Where in the user's code something was declared, so that an error can point there."""

from __future__ import annotations

import sys
from types import FrameType


def declaring_frame() -> FrameType:
    """The nearest caller outside this package; its locals are needed to resolve annotations of local classes."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and _is_ours(frame):
        last, frame = frame, frame.f_back
    return frame if frame is not None else last


def location(frame: FrameType) -> str:
    """`file:line` of a frame, in the form that editors and terminals make clickable."""
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


def _is_ours(frame: FrameType) -> bool:
    name = str(frame.f_globals.get("__name__", ""))
    return name == "eoframework" or name.startswith("eoframework.")
