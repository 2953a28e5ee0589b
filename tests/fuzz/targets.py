"""All fuzz targets, and the inputs that each starts from: real files, which it accepts.

A target takes bytes and says whether they were accepted. It lets through any error that the parser
does not document, and its own assertions: what is accepted can be written back the same, and used.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import NamedTuple

from . import artifact_targets, text_targets
from .artifact_targets import FILES, GOLDEN

__all__ = ["TARGETS", "Target", "mutated"]

_SEEDS = Path(__file__).parent / "seeds"
_WORD = re.compile(rb"[A-Za-z_][A-Za-z0-9_.-]{2,40}")
_TOKEN = re.compile(rb'"[^"\n]*"|[\w.+-]+')
"""A string, a number or a name, in JSON and in TOML."""
_AWKWARD = (
    *(b"1e999", b"-1e999", b"-0.0", b"NaN", b"nan", b"inf", b"null", b"true", b"\\ud800", b"\x00"),
    *(b"[" * 2000, b'{"a":' * 2000, b"[[" * 600, b"9" * 5000, b"1" + b"0" * 400, b"1e39", b"\xff"),
    *(b"0001-01-01T00:00:00", b"9999-12-31T23:59:59-14:00", b"__proto__", b"\xef\xbb\xbf"),
)
"""What parsers stumble over."""


class Target(NamedTuple):
    """One parser."""

    check: Callable[[bytes], bool]
    """Whether an input is accepted."""
    seeds: tuple[bytes, ...]
    """Inputs that are."""

    @property
    def words(self) -> tuple[bytes, ...]:
        """Pieces that inputs are made of: the words of the seeds, and what is awkward."""
        found = {word for seed in self.seeds for word in _WORD.findall(seed)}
        return (*sorted(found), *_AWKWARD)


def mutated(data: bytes, words: Sequence[bytes], chance: random.Random) -> bytes:
    """An input with one to three pieces taken out, doubled, or others put in their place."""
    for _ in range(chance.randint(1, 3)):
        spans = [found.span() for found in _TOKEN.finditer(data)]
        if spans and chance.random() < 0.8:
            start, end = chance.choice(spans)
        else:
            start = chance.randint(0, len(data))
            end = min(len(data), start + chance.randint(0, 40))
        piece = chance.choice(words)
        new = chance.choice(
            (piece, b'"' + piece + b'"', data[start:end] * 2, b"", chance.randbytes(2))
        )
        data = data[:start] + new + data[end:]
    return data


def _texts(name: str) -> Iterator[bytes]:
    """Those of a target that has no file of its own in this repository."""
    for file in sorted((_SEEDS / name).iterdir()):
        yield file.read_bytes()


def _training(folder: str) -> Iterator[bytes]:
    for file in resources.files("circuit_breakers_training").joinpath(folder).iterdir():
        if file.name.endswith(".toml"):
            yield file.read_bytes()


def _builtin_manifest() -> bytes:
    breakers = resources.files("circuit_breakers").joinpath("breakers")
    return breakers.joinpath("smollm2-135m-instruct", "manifest.json").read_bytes()


_GOLDEN = {name: (GOLDEN / name).read_bytes() for name in FILES}

TARGETS = {
    "manifest": Target(artifact_targets.manifest, (_GOLDEN["manifest.json"], _builtin_manifest())),
    "histogram": Target(artifact_targets.histogram, tuple(_texts("histogram"))),
    "tensors": Target(
        artifact_targets.tensors,
        (
            b"\0" + _GOLDEN["probes.safetensors"],
            b"\1" + _GOLDEN["adapter/adapter_model.safetensors"],
        ),
    ),
    "breaker": Target(
        artifact_targets.breaker,
        tuple(bytes([number]) + _GOLDEN[name] for number, name in enumerate(FILES)),
    ),
    "policies": Target(text_targets.policies, tuple(_texts("policies"))),
    "key": Target(text_targets.key, tuple(_texts("key"))),
    "body": Target(text_targets.body, tuple(_texts("body"))),
    "audit": Target(text_targets.audit, tuple(_texts("audit"))),
    "recipe": Target(
        text_targets.recipe,
        tuple(text for text in _training("recipes") if b'"auto"' not in text),
    ),
    "bars": Target(text_targets.bars, tuple(_training("gate"))),
}
"""By name."""
