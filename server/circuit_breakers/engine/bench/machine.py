"""What a benchmark ran on: hardware, versions, command."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import psutil
import torch

__all__ = ["Machine", "command_line", "describe_machine"]


@dataclass(frozen=True, kw_only=True)
class Machine:
    """One machine and its software."""

    cpu: str
    num_cores: int
    """That this process may use."""
    memory_bytes: int
    accelerator: str | None
    omp_num_threads: str | None
    """The variable OMP_NUM_THREADS of the process of the engines."""
    python: str
    torch: str
    vllm: str
    circuit_breakers: str


def describe_machine() -> Machine:
    """This machine; to be called before an engine binds this process to some of its cores."""
    import vllm

    return Machine(
        cpu=_cpu(),
        num_cores=len(os.sched_getaffinity(0)),
        memory_bytes=psutil.virtual_memory().total,
        accelerator=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        omp_num_threads=os.environ.get("OMP_NUM_THREADS"),
        python=platform.python_version(),
        torch=torch.__version__,
        vllm=vllm.__version__,
        circuit_breakers=version("circuit-breakers"),
    )


def command_line() -> str:
    """The command that runs, as it could be typed."""
    name = Path(sys.argv[0]).name
    return shlex.join([name if name != "cli.py" else "circuit-breakers", *sys.argv[1:]])


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
