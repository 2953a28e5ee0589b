"""Fuzzes one target with atheris, coverage-guided, until it breaks or the time is over.

    pip install -r requirements/fuzz.txt
    python -m tests.fuzz.run policies --seconds 300 --corpus fuzz-corpus

What breaks it is written to the corpus folder as crash-... or timeout-...; `--replay FILE` runs
that one input again. Make the smallest such input a test of the parser, then mend it.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from pathlib import Path

_INSTRUMENTED = ["circuit_breakers", "circuit_breakers_training", "tomllib", "json"]
_SLOWEST_INPUT_S = 20
_MAX_LENGTH = 1 << 16


def main() -> None:
    parser = argparse.ArgumentParser(description="Fuzz one parser.")
    parser.add_argument("target")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--corpus", type=Path, help="Folder of inputs; kept between runs.")
    parser.add_argument("--replay", type=Path, help="Run this one input, and nothing else.")
    options = parser.parse_args()
    try:
        import atheris
    except ModuleNotFoundError:
        parser.error("atheris is not installed; pip install -r requirements/fuzz.txt")
    with atheris.instrument_imports(include=_INSTRUMENTED):
        from .targets import TARGETS, mutated
    if options.target not in TARGETS:
        parser.error(f"got {options.target!r}, expected one of {', '.join(TARGETS)}")
    target = TARGETS[options.target]
    if options.replay is not None:
        print("accepted" if target.check(options.replay.read_bytes()) else "refused")
        return
    corpus = options.corpus or Path(tempfile.mkdtemp(prefix="fuzz-"))
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(target.seeds):
        (corpus / f"seed-{number}").write_bytes(seed)
    arguments = {
        "max_total_time": options.seconds,
        "max_len": _MAX_LENGTH,
        "timeout": _SLOWEST_INPUT_S,
        "artifact_prefix": f"{corpus}/",
        "print_final_stats": 1,
    }

    def run(data: bytes) -> None:
        target.check(data)

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        chance = random.Random(seed)
        if chance.random() < 0.3:
            return bytes(atheris.Mutate(data, max_size))
        return mutated(data, target.words, chance)[:max_size]

    flags = [f"-{name}={value}" for name, value in arguments.items()]
    atheris.Setup([sys.argv[0], *flags, str(corpus)], run, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
