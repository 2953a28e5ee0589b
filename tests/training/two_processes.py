"""Starts commands in two CPU processes, as a user does with accelerate's launcher."""

from __future__ import annotations

import os
import subprocess
import sys


def launch(*command: str) -> str:
    """Standard output of both processes."""
    launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    # --multi_gpu is accelerate's name for its own launcher; without a GPU it starts CPU processes.
    launcher += ["--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    launcher += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    # The code under test, wherever this Python has its packages from.
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [*launcher, *command], env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-8000:]
    return done.stdout
