"""A built dataset: four JSONL files and dataset.json with their digests."""

import hashlib
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from circuit_breakers.artifact.files import publish
from circuit_breakers.errors import DataError
from circuit_breakers_training.data.jsonl import (
    Conversation,
    read_conversations,
    write_conversations,
)
from circuit_breakers_training.data.overlap import prompt_digests
from circuit_breakers_training.data.split import SPLITS

__all__ = [
    "SCHEMA_VERSION",
    "BuiltDataset",
    "Dataset",
    "count_rows",
    "find_dataset",
    "load_dataset",
    "read_summary",
    "require_every_split",
    "write_dataset",
]

SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Conversations by split."""

    train: tuple[Conversation, ...]
    selection: tuple[Conversation, ...]
    calibration: tuple[Conversation, ...]
    test: tuple[Conversation, ...]
    digests: dict[str, str]
    """sha256 of each file, by file name."""

    @cached_property
    def prompt_digests(self) -> dict[str, tuple[str, ...]]:
        """Digests of the prompts of each split, for overlap.overlapping."""
        return {name: prompt_digests(getattr(self, name)) for name in SPLITS}


@dataclass(frozen=True, kw_only=True)
class BuiltDataset:
    """Outcome of a build or an import."""

    path: Path
    summary: dict[str, Any]
    """Content of dataset.json."""
    seconds: float
    cached: bool
    """The directory held a dataset of the same inputs already."""


def read_summary(directory: Path) -> dict[str, Any]:
    """Parsed dataset.json of a built dataset.

    Raises:
        DataError: it is missing, broken or of another schema version.
    """
    path = directory / "dataset.json"
    cure = "build it with: circuit-breakers data build --out DIR"
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise DataError(
            f"{path}: cannot be read ({e.strerror}), expected a built dataset; {cure}"
        ) from e
    except ValueError as e:
        raise DataError(f"{path}: got invalid JSON ({e}), expected an object; {cure}") from e
    version = summary.get("schema_version") if isinstance(summary, dict) else None
    if version != SCHEMA_VERSION:
        raise DataError(
            f"{path}: got schema_version {version!r}, expected {SCHEMA_VERSION}; {cure}"
        )
    assert isinstance(summary, dict)
    return summary


def load_dataset(directory: Path) -> Dataset:
    """The dataset in `directory`, after its digests and the separation of its splits were checked.

    Raises:
        DataError: a file is missing, altered or wrong, or a group sits in two splits.
    """
    summary = read_summary(directory)
    expected = summary.get("sha256")
    if not isinstance(expected, dict):
        raise DataError(
            f"{directory / 'dataset.json'}: got no sha256 table, expected one digest a file; "
            "build the dataset again"
        )
    splits: dict[str, tuple[Conversation, ...]] = {}
    digests: dict[str, str] = {}
    home: dict[str, str] = {}
    for name in SPLITS:
        path = directory / f"{name}.jsonl"
        rows = read_conversations(path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if digest != expected.get(path.name):
            raise DataError(
                f"{path}: got sha256 {digest[:12]}, expected "
                f"{str(expected.get(path.name))[:12]}; the file was changed after the build: "
                "build the dataset again, or pass your own JSONL as user data"
            )
        for row in rows:
            if home.setdefault(row.group, name) != name:
                raise DataError(
                    f"{path}: got group {row.group!r} which is in {home[row.group]} too, expected "
                    "each group in one split; build the dataset again"
                )
        splits[name] = tuple(rows)
        digests[path.name] = digest
    return Dataset(**splits, digests=digests)


def find_dataset(out_dir: Path, inputs: str, *, overwrite: bool) -> dict[str, Any] | None:
    """Summary of the dataset in `out_dir` that was made from the same inputs; None for none.

    Args:
        inputs: digest of everything that the dataset depends on.
        overwrite: another dataset may be replaced.
    Raises:
        DataError: `out_dir` holds something that must not be replaced.
    """
    if not out_dir.exists():
        return None
    if not out_dir.is_dir():
        raise DataError(f"{out_dir}: got a file, expected a directory; pick another path")
    if not any(out_dir.iterdir()):
        return None
    if (out_dir / "dataset.json").exists():
        summary = read_summary(out_dir)
        if summary.get("inputs_sha256") == inputs:
            load_dataset(out_dir)
            return summary
        if overwrite:
            return None
        raise DataError(
            f"{out_dir}: got a dataset of other inputs (seed, model, settings or prompts), "
            "expected an empty directory or the same inputs; pick another directory, or overwrite"
        )
    raise DataError(
        f"{out_dir}: got a directory with other files, expected an empty one or a dataset; "
        "pick another directory"
    )


def require_every_split(rows: Mapping[str, Sequence[Conversation]], given: str) -> None:
    """Checks that no split came out empty.

    Args:
        given: what the rows were made from, for the message.
    Raises:
        DataError: one did.
    """
    empty = [name for name in SPLITS if not rows[name]]
    if empty:
        raise DataError(
            f"got no conversation for {', '.join(empty)} ({given}), "
            "expected some in each split; take more prompts"
        )


def count_rows(rows: Sequence[Conversation]) -> dict[str, int]:
    """Number of rows by label and by source, as dataset.json has them."""
    counts = Counter(row.label for row in rows) + Counter(f"source {row.source}" for row in rows)
    return dict(sorted(counts.items()))


def write_dataset(
    out_dir: Path, rows: Mapping[str, Sequence[Conversation]], summary: Mapping[str, Any]
) -> None:
    """Writes the four files and `summary` with their digests; all of it appears at once.

    A dataset that was there is moved away first and removed last.
    """
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}.", dir=out_dir.parent))
    try:
        digests = {
            f"{name}.jsonl": write_conversations(temporary / f"{name}.jsonl", rows[name])
            for name in SPLITS
        }
        table = json.dumps(digests, sort_keys=True).encode()
        content = {**summary, "sha256": digests, "digest": hashlib.sha256(table).hexdigest()}
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (temporary / "dataset.json").write_text(text, encoding="utf-8")
        for path in temporary.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        temporary.chmod(0o755)
        publish(temporary, out_dir)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
