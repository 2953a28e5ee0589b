"""Texts that a build has written so far, kept on disk until its dataset is there.

A build writes for the better part of an hour, and all of its files come at the end: without this, a
killed one starts again from nothing.
"""

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, astuple
from pathlib import Path
from typing import Any, Final

from circuit_breakers_training.data.generate import Generated, Generator, Request

__all__ = ["KeepingGenerator", "kept_texts"]

_BLOCK: Final = 1024
"""Requests that are written, and kept, together: a minute or two on two CPU cores."""


def kept_texts(out_dir: Path, inputs_digest: str) -> Path:
    """A directory beside `out_dir` for the texts of its build; the builder removes it in the end.

    Texts of other inputs, left by an earlier build, are removed at once.
    """
    out_dir = out_dir.resolve()
    prefix = f".{out_dir.name}.texts-"
    kept = out_dir.parent / f"{prefix}{inputs_digest[:16]}"
    for other in out_dir.parent.glob(f"{prefix}*"):
        if other != kept:
            shutil.rmtree(other, ignore_errors=True)
    kept.mkdir(parents=True, exist_ok=True)
    return kept


class KeepingGenerator:
    """A generator whose blocks of texts are read from `directory` where they are there already.

    Calls must come in the same order each time, as those of a build do: what a call asks for
    follows from the texts of the calls before it. A run that goes on samples anew from there, so
    its later texts are not those of a run that was never interrupted.
    """

    def __init__(self, generate: Generator, directory: Path, *, block: int = _BLOCK) -> None:
        """Keep texts in `directory`, `block` requests at a time."""
        self.tokenizer: Any = generate.tokenizer
        self._generate, self._directory, self._size = generate, directory, block
        self._num_blocks = 0

    def __call__(self, requests: Sequence[Request], title: str) -> list[Generated]:
        """Results in the order of `requests`, with a progress bar for each block to be written."""
        results: list[Generated] = []
        num_blocks = -(-len(requests) // self._size)
        for number in range(num_blocks):
            block = requests[number * self._size : (number + 1) * self._size]
            part = title if num_blocks == 1 else f"{title}, part {number + 1} of {num_blocks}"
            results += self._block(block, part)
        return results

    def close(self) -> None:
        """Frees the model."""
        self._generate.close()

    def _block(self, requests: Sequence[Request], title: str) -> list[Generated]:
        asked = json.dumps([asdict(request) for request in requests])
        digest = hashlib.sha256(asked.encode()).hexdigest()[:16]
        path = self._directory / f"{self._num_blocks:04d}-{digest}.json"
        self._num_blocks += 1
        if path.exists():
            rows = json.loads(path.read_text(encoding="utf-8"))
            return [Generated(text, finished, tuple(ids)) for text, finished, ids in rows]
        results = self._generate(requests, title)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps([astuple(r) for r in results]), encoding="utf-8")
        partial.replace(path)
        return results
