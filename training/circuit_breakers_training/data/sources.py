"""Rows of published data: where a source lies, what format it has, and what became of its rows."""

import hashlib
import heapq
import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from circuit_breakers.errors import DataError
from circuit_breakers_training.data.formats.format import Dropped, Format, require_columns
from circuit_breakers_training.data.formats.registry import detect_format, get_format
from circuit_breakers_training.data.hub_files import PREFIX, hub_files
from circuit_breakers_training.data.jsonl import Conversation
from circuit_breakers_training.data.plan import Planned
from circuit_breakers_training.data.records import Record, read_records, shown

__all__ = ["Located", "SourceRows", "SourceSpec", "locate", "read_evaluation_rows", "read_source"]

Use = Literal["training", "evaluation"]


@dataclass(frozen=True, kw_only=True)
class SourceSpec:
    """What the user asks for."""

    location: str
    """Path of a file, or hf:OWNER/NAME[@REVISION][:FILE]."""
    format: str | None = None
    """Key of FORMATS; told from the columns if none."""
    repeat: int = 1
    """Times that each row stands in the train split."""
    limit: int | None = None
    """Rows taken at most, drawn by the seed."""


@dataclass(frozen=True, kw_only=True)
class Located:
    """A source whose files are on this machine."""

    spec: SourceSpec
    paths: tuple[Path, ...]
    sha256: dict[str, str]
    """Of each file, by name."""
    revision: str | None
    """Commit, of a source on the hub."""

    def describe(self) -> dict[str, Any]:
        """What dataset.json says about the source; no path of this machine."""
        on_hub = self.spec.location.startswith(PREFIX)
        return {
            "from": self.spec.location if on_hub else Path(self.spec.location).name,
            "revision": self.revision,
            "files": self.sha256,
            "format": self.spec.format,
            "repeat": self.spec.repeat,
            "limit": self.spec.limit,
        }


@dataclass(frozen=True, kw_only=True)
class SourceRows:
    """What was read from a source."""

    format: str
    rows: list[Conversation | Planned]
    """In file order; Planned are prompts without an answer."""
    num_read: int
    dropped: Counter[str]
    """Rows left out, by reason."""


def locate(spec: SourceSpec) -> Located:
    """The files of a source, with their digests; downloads those that are on the hub.

    Raises:
        DataError: a setting is out of range, or nothing is there.
    """
    if spec.repeat < 1 or (spec.limit is not None and spec.limit < 1):
        raise DataError(
            f"{spec.location}: got repeat {spec.repeat} and limit {spec.limit}, expected at least "
            "1; correct them, or leave the limit out"
        )
    if spec.format is not None:
        get_format(spec.format)
    if spec.location.startswith(PREFIX):
        found = hub_files(spec.location)
        paths, revision = found.paths, found.revision
    else:
        path = Path(spec.location).expanduser()
        if not path.is_file():
            raise DataError(
                f"got the source {shown(spec.location)}, expected a file, or "
                "hf:OWNER/NAME[:FILE] for one on the hub; check the path"
            )
        paths, revision = (path,), None
    digests = {path.name: _file_digest(path) for path in paths}
    return Located(spec=spec, paths=paths, sha256=digests, revision=revision)


def read_source(located: Located, *, seed: int = 0) -> SourceRows:
    """The rows of a source, as training data.

    Raises:
        DataError: the format is for evaluation only or cannot be told, or a row is wrong.
    """
    return _read(located, seed, "training")


def read_evaluation_rows(located: Located) -> SourceRows:
    """The rows of a source, of an evaluation set too; none may be trained on.

    Raises:
        DataError: the format cannot be told, or a row is wrong.
    """
    return _read(located, 0, "evaluation")


def _read(located: Located, seed: int, use: Use) -> SourceRows:
    spec = located.spec
    records = itertools.chain.from_iterable(map(read_records, located.paths))
    first = next(records)
    wanted = get_format(spec.format) if spec.format is not None else detect_format(first)
    if wanted.evaluation_only and use == "training":
        raise DataError(
            f"{located.paths[0]}: got {wanted.name}, which is for evaluation only, expected "
            "training data: a breaker that was trained on a test set proves nothing there; leave "
            "it out, or pass it as prompts to exclude"
        )
    dropped: Counter[str] = Counter()
    num_read = 0

    def usable() -> Iterator[tuple[int, Conversation | Planned]]:
        nonlocal num_read
        for num_read, record in enumerate(itertools.chain([first], records), start=1):
            loaded = _load(wanted, record)
            if isinstance(loaded, Dropped):
                dropped[loaded.reason] += 1
            else:
                yield num_read, loaded

    if spec.limit is None:
        rows = [row for _, row in usable()]
    else:
        # A heap of as many rows as are wanted: a large set is never held as a whole.
        taken = heapq.nsmallest(spec.limit, usable(), key=lambda pair: _draw(seed, pair[0]))
        rows = [row for _, row in sorted(taken, key=lambda pair: pair[0])]
        over = num_read - dropped.total() - len(rows)
        dropped.update({"over the limit": over} if over else {})
    return SourceRows(format=wanted.name, rows=rows, num_read=num_read, dropped=dropped)


def _load(wanted: Format, record: Record) -> Conversation | Planned | Dropped:
    require_columns(record, wanted)
    return wanted.load(record)


def _file_digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as e:
        raise DataError(
            f"{path}: cannot be read ({e.strerror}), expected a data file; check its permissions"
        ) from e


def _draw(seed: int, number: int) -> bytes:
    return hashlib.sha256(f"{seed}\0limit\0{number}".encode()).digest()
