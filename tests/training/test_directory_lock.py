from __future__ import annotations

import fcntl
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from circuit_breakers.errors import ConfigError
from circuit_breakers_training.directory_lock import locked

TAKEN = ConfigError("taken")


def test_one_holds_a_directory_at_a_time(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "work")
    for held in ("work", "link"):
        with (
            locked(tmp_path / held, TAKEN),
            pytest.raises(ConfigError, match="taken"),
            locked(tmp_path / "work", TAKEN),
        ):
            pytest.fail("both hold it")
    with locked(tmp_path / "work", TAKEN), locked(tmp_path / "another", TAKEN):
        pass


def test_nothing_is_left_of_a_lock_even_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyError), locked(tmp_path / "new" / "work", TAKEN):
        raise KeyError
    assert list(tmp_path.rglob("*")) == [tmp_path / "new"]


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    code = f"""
import os, signal
from pathlib import Path
from circuit_breakers.errors import ConfigError
from circuit_breakers_training.directory_lock import locked
with locked(Path({str(tmp_path / "work")!r}), ConfigError("taken")):
    os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", code], check=False)
    assert [path.name for path in tmp_path.iterdir()] == [".work.lock"]
    with locked(tmp_path / "work", TAKEN):
        pass


def test_a_lock_file_that_was_removed_meanwhile_locks_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = ExitStack()
    first.enter_context(locked(tmp_path / "work", TAKEN))
    flock = fcntl.flock

    def flock_once_the_first_is_done(*args: Any) -> None:
        first.close()
        flock(*args)

    # The second has opened the first one's file, and locks it when that is gone.
    monkeypatch.setattr(fcntl, "flock", flock_once_the_first_is_done)
    with (
        locked(tmp_path / "work", TAKEN),
        pytest.raises(ConfigError, match="taken"),
        locked(tmp_path / "work", TAKEN),
    ):
        pytest.fail("both hold it")
