"""Where an error came from, as its fingerprint has it: by the file names in its traceback."""

from __future__ import annotations

import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import eoframework
from eoframework.failures import Cause, cause_of

SITE = sysconfig.get_path("purelib")
STDLIB = sysconfig.get_path("stdlib")
OURS = str(Path(eoframework.__file__).parent)


def frame(file: str, name: str, inner: Callable[[], object] | None = None) -> Callable[[], Any]:
    """A function of that file that calls the inner one, or fails."""
    names: dict[str, Any] = {"inner": inner}
    body = "inner()" if inner is not None else "raise ValueError('x')"
    exec(compile(f"def {name}():\n    {body}", file, "exec"), names)
    made: Callable[[], Any] = names[name]
    return made


def cause(outermost: Callable[[], Any]) -> Cause:
    with pytest.raises(ValueError, match="x") as raised:
        outermost()
    error = raised.value
    # Without this test's own frame, which is of no library.
    return cause_of(error.with_traceback(error.__traceback__ and error.__traceback__.tb_next), text=False)


def test_of_an_installed_application_each_place_is_its_own() -> None:
    """An app that is installed with pip lives in site-packages. Seen to fail with only frames outside of it looked
    for: all errors of one class had one fingerprint.
    """
    places = [frame(f"{SITE}/shop/orders.py", "book"), frame(f"{SITE}/shop/orders.py", "cancel")]
    book, cancel = (cause(frame(f"{OURS}/consume/calls.py", "run", place)) for place in places)
    assert (book.place, cancel.place) == ("orders.py:book", "orders.py:cancel")
    assert book.fingerprint != cancel.fingerprint


@pytest.mark.parametrize("file", [f"{SITE}/lib/x.py", "/usr/lib/python3/dist-packages/lib/x.py", f"{STDLIB}/json/x.py"])
def test_what_stands_in_a_project_is_preferred_to_libraries(file: str) -> None:
    """Seen to fail with the innermost frame of any library taken at once."""
    found = cause(frame("/srv/shop/orders.py", "book", frame(file, "loads")))
    assert found.place == "orders.py:book"


def test_the_standard_library_is_no_place() -> None:
    """Also where site-packages lies inside of it. Seen to fail with stdlib left out of the second choice."""
    found = cause(frame(f"{SITE}/shop/orders.py", "book", frame(f"{STDLIB}/json/decoder.py", "decode")))
    assert found.place == "orders.py:book"
    inside = cause(frame(f"{STDLIB}/site-packages/shop/orders.py", "book"))
    assert inside.place == "orders.py:book"


def test_a_neighbour_whose_name_begins_like_ours_is_not_ours() -> None:
    """Seen to fail without the separator behind `_OURS`."""
    assert cause(frame(f"{OURS}_shop/orders.py", "book")).place == "orders.py:book"
    assert cause(frame(f"{OURS}/topic.py", "decode")).place == ""
