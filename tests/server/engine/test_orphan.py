"""On real processes; that a real engine core ends so is seen in tests/replicas."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import pytest

PARENT = """
import multiprocessing, sys, time
from circuit_breakers.engine.orphan import end_with_parent

def child():
    end_with_parent()
    print(multiprocessing.current_process().pid, flush=True)
    time.sleep(600)

if __name__ == "__main__":
    end_with_parent()
    multiprocessing.get_context(sys.argv[1]).Process(target=child).start()
    time.sleep(600)
"""


@contextmanager
def parent_and_child(method: str, script: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    with subprocess.Popen(
        [sys.executable, script, method], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        try:
            yield parent, child
        finally:
            parent.kill()
            if psutil.pid_exists(child):
                psutil.Process(child).kill()


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_a_child_ends_when_its_parent_is_killed(
    method: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    script = tmp_path_factory.mktemp("orphan") / "parent.py"
    script.write_text(PARENT)
    with parent_and_child(method, str(script)) as (parent, pid):
        child = psutil.Process(pid)
        assert child.is_running()
        assert parent.poll() is None, "a process of its own does not end itself"
        parent.kill()
        parent.wait()
        _, alive = psutil.wait_procs([child], timeout=30)
        assert not alive
