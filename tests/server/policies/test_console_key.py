"""The key of the console: an admin's, told once, of which only the hash stays."""

from __future__ import annotations

import pytest

from circuit_breakers.policies.console_key import ConsoleKey


def test_it_finds_itself_and_no_other() -> None:
    one, other = ConsoleKey(), ConsoleKey()
    key = one.tell()
    found = one.find(key)
    assert found is not None
    assert (found.id, found.scope) == ("console", {"inference", "admin"})
    assert other.find(key) is None
    # cb- and 32 bytes in base64: 43 characters.
    assert len(key) == 46


def test_it_is_told_once() -> None:
    one = ConsoleKey()
    key = one.tell()
    with pytest.raises(AssertionError):
        one.tell()
    assert key not in repr(vars(one))
