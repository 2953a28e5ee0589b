import os
import signal
import subprocess
import sys
import time
from pathlib import Path

STARTER = """
import subprocess, sys
command = [sys.executable, "-m", "circuit_breakers_training.data.vllm_worker"]
worker = subprocess.Popen(command, stdin=int(sys.argv[1]), close_fds=False)
print(worker.pid, flush=True)
worker.wait()
"""


def test_a_worker_ends_with_its_parent() -> None:
    # The test holds the other end of the worker's input, so that it is never at its end.
    read_end, write_end = os.pipe()
    os.set_inheritable(read_end, True)
    with subprocess.Popen(
        [sys.executable, "-c", STARTER, str(read_end)],
        stdout=subprocess.PIPE,
        text=True,
        pass_fds=[read_end],
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        _wait_until_idle(pid)
        parent.send_signal(signal.SIGKILL)
    os.close(read_end)
    try:
        for _ in range(100):
            if not _runs(pid):
                return
            time.sleep(0.1)
        os.kill(pid, signal.SIGKILL)
        raise AssertionError("the worker outlived its parent")
    finally:
        os.close(write_end)


def _wait_until_idle(pid: int) -> None:
    """Until the worker has started and waits for its input."""
    same = 0
    last = ""
    while same < 10:
        used = " ".join(_stat(pid)[11:13])  # user and system time
        same = same + 1 if used == last else 0
        last = used
        time.sleep(0.1)


def _runs(pid: int) -> bool:
    try:
        return _stat(pid)[0] != "Z"
    except FileNotFoundError:
        return False


def _stat(pid: int) -> list[str]:
    """Fields of proc(5)'s stat from the state on."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
