"""A built dataset: four JSONL files and dataset.json with their digests."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from circuit_breakers.errors import DataError
from circuit_breakers_training.data.jsonl import Conversation, read_conversations
from circuit_breakers_training.data.split import SPLITS

__all__ = ["SCHEMA_VERSION", "Dataset", "load_dataset", "read_summary"]

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
