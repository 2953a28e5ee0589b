"""Texts that a build or an import has written so far, kept on disk until its dataset is there.

A build writes for the better part of an hour, and all of its files come at the end: without this, a
killed one starts again from nothing.
"""

import glob
import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, astuple
from pathlib import Path
from typing import Any, Final

from circuit_breakers.artifact.files import write_atomically
from circuit_breakers.errors import DataError
from circuit_breakers_training.data.generate import (
    Backend,
    Generated,
    Generator,
    Request,
    open_generator,
)
from circuit_breakers_training.directory_lock import beside, locked
from circuit_breakers_training.render import TemplateSource

__all__ = ["KeepingGenerator", "discard_texts", "kept_texts", "open_keeping_generator"]

_DIGITS: Final = 16

_SEEDS_APART: Final = 1000
"""More than a generator has processes, each of which has a seed of its own."""

_BLOCK: Final = 1024
"""Requests that are written, and kept, together: a minute or two on two CPU cores."""


@contextmanager
def kept_texts(out_dir: Path, inputs_digest: str) -> Iterator[Path]:
    """A directory beside `out_dir` for the texts of its build, which is locked meanwhile.

    Texts of other inputs, left by an earlier build, are removed; `discard_texts` removes these.

    Raises:
        DataError: another process builds `out_dir`.
    """
    kept = beside(out_dir, f".texts-{inputs_digest[:_DIGITS]}")
    taken = DataError(
        f"got {str(out_dir)!r}, which another process is building, expected one build of it at a "
        "time; wait for the other one, or choose another directory"
    )
    with locked(out_dir, taken):
        for other in _all_kept(out_dir):
            if other != kept:
                shutil.rmtree(other, ignore_errors=True)
        kept.mkdir(parents=True, exist_ok=True)
        try:
            yield kept
        finally:
            # Not with texts in it.
            with suppress(OSError):
                kept.rmdir()


def discard_texts(out_dir: Path) -> None:
    """Remove all texts that builds of `out_dir` have kept."""
    for kept in _all_kept(out_dir):
        shutil.rmtree(kept, ignore_errors=True)


def _all_kept(out_dir: Path) -> list[Path]:
    start = beside(out_dir, ".texts-")
    return list(start.parent.glob(glob.escape(start.name) + "[0-9a-f]" * _DIGITS))


class KeepingGenerator:
    """A generator whose blocks of texts are read from `directory` where they are there already.

    Calls must come in the same order each time, as those of a build do: what a call asks for
    follows from the texts of the calls before it. A run that goes on must have another seed than
    the one it goes on from, or it draws again what is kept.
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
            # A file that is damaged all the same costs its own texts, not the build.
            with suppress(ValueError):
                rows = json.loads(path.read_text(encoding="utf-8"))
                return [Generated(text, finished, tuple(ids)) for text, finished, ids in rows]
        results = self._generate(requests, title)
        write_atomically(path, json.dumps([astuple(r) for r in results]).encode())
        return results


@contextmanager
def open_keeping_generator(
    kept: Path,
    model_dir: Path,
    backend: Backend,
    *,
    seed: int,
    max_model_len: int,
    chat_template: TemplateSource,
) -> Iterator[KeepingGenerator]:
    """A generator that keeps its texts in `kept` and goes on with those that are there.

    Raises:
        ModelError: vLLM cannot load the model, or stops later.
    """
    # A run that goes on must not draw again what it has.
    seed += _SEEDS_APART * len(list(kept.glob("*.json")))
    with open_generator(
        model_dir, backend, seed=seed, max_model_len=max_model_len, chat_template=chat_template
    ) as generate:
        yield KeepingGenerator(generate, kept)
