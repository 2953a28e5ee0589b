"""Rows of a data file, whatever its type: JSON Lines, a JSON list, CSV or Parquet.

    path ─ suffix ─┬─ .jsonl, .json ─ one object a line, or one list of objects
                   ├─ .csv           ─ a header, then a row of as many cells
                   └─ .parquet       ─ with pyarrow

Text files may be compressed (.gz, .xz) and are UTF-8, with or without a byte order mark. Nothing is
skipped: what cannot be read raises DataError with file and line or row.
"""

import csv
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn

from circuit_breakers.errors import DataError

__all__ = ["SUFFIXES", "Record", "json_lines", "parse_json", "read_records", "shown"]

SUFFIXES: Final = (".jsonl", ".json", ".csv", ".parquet")
"""Types of files that read_records reads."""

_COMPRESSED: Final = (".gz", ".xz")
_BOM: Final = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Record:
    """One row of a file."""

    where: str
    """File and line, or file and row where the type has no lines."""
    fields: dict[str, Any]
    """Values by column; text in a CSV file."""


def read_records(path: Path) -> Iterator[Record]:
    """The rows of a file, in file order, read as they are asked for.

    Raises:
        DataError: the file is missing, empty, of an unknown type, or a row is broken.
    """
    kind = _kind(path)
    if kind == ".parquet":
        records = _parquet(path)
    elif kind == ".csv":
        records = _csv(path)
    elif kind == ".jsonl":
        records = json_lines(path)
    else:
        records = _json(path)
    empty = True
    for record in records:
        empty = False
        yield record
    if empty:
        raise DataError(f"{path}: got an empty file, expected at least one row; check the file")


def json_lines(path: Path) -> Iterator[Record]:
    """The objects of a JSON Lines file; blank lines are counted and left out.

    Raises:
        DataError: the file cannot be read, or a line is no JSON object.
    """
    with _reading(path), _open(path) as stream:
        yield from _objects_by_line(path, stream)


def parse_json(text: str, where: str) -> Any:
    """The value that `text` holds.

    Raises:
        DataError: it is not JSON, or too deep or too long for a parser.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as e:
        raise DataError(
            f"{where}: got invalid JSON ({e.msg} at column {e.colno}), expected one JSON object; "
            "write each conversation on one line, without a comma at its end"
        ) from None
    # Integers of more than 4,300 digits, and lists within lists.
    except (ValueError, RecursionError) as e:
        raise DataError(
            f"{where}: got JSON that cannot be parsed ({e}), expected texts and flags; correct it"
        ) from None


def shown(value: object, limit: int = 60) -> str:
    """A short form of `value` for a message, printable on any terminal."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    text = text if len(text) <= limit else text[: limit - 3] + "..."
    return text.encode("utf-8", "backslashreplace").decode()


def _kind(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    kind = suffixes[-1] if suffixes else ""
    if kind not in SUFFIXES:
        raise DataError(
            f"{path}: got the file type {kind or 'without a suffix'!r}, expected "
            f"{', '.join(SUFFIXES)}, the text ones also with {' or '.join(_COMPRESSED)}; "
            "convert or rename the file"
        )
    return kind


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as e:
        reason = getattr(e, "strerror", None) or e
        raise DataError(
            f"{path}: cannot be read ({reason}), expected a data file; check the path"
        ) from e


def _open(path: Path) -> Any:
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rb")
    if path.suffix.lower() == ".xz":
        return lzma.open(path, "rb")
    return path.open("rb")


def _objects_by_line(path: Path, lines: Iterator[bytes]) -> Iterator[Record]:
    for number, line in enumerate(lines, start=1):
        line = line.removeprefix(_BOM) if number == 1 else line
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as e:
            _raise_not_utf8(e, where)
        yield Record(where, _object(parse_json(text, where), where))


def _json(path: Path) -> Iterator[Record]:
    with _reading(path), _open(path) as stream:
        blob = stream.read().removeprefix(_BOM)
    if not blob.lstrip().startswith(b"["):
        yield from _objects_by_line(path, iter(blob.split(b"\n")))
        return
    rows = parse_json(_decode(blob, path), str(path))
    for number, row in enumerate(rows, start=1):
        where = f"{path}: row {number}"
        yield Record(where, _object(row, where))


def _csv(path: Path) -> Iterator[Record]:
    with _reading(path), _open(path) as stream:
        text = _decode(stream.read().removeprefix(_BOM), path)
    # Strict: a quote that is never closed would else swallow the rest of the file.
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] | None = None
    while True:
        where = f"{path}:{reader.line_num + 1}"
        try:
            cells = next(reader, None)
        except csv.Error as e:
            raise DataError(
                f"{where}: got broken CSV ({e}), expected quoted cells; double the quotes inside "
                "a cell and quote cells with commas or line ends"
            ) from None
        if cells is None:
            return
        if not cells:
            continue
        if header is None:
            header = _header(cells, where)
            continue
        if len(cells) != len(header):
            raise DataError(
                f"{where}: got {len(cells)} cells, expected {len(header)}, one a column of the "
                "header; quote cells with commas or line ends"
            )
        yield Record(where, dict(zip(header, cells, strict=True)))


def _header(cells: list[str], where: str) -> list[str]:
    names = [cell.strip() for cell in cells]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(
            f"{where}: got the column {shown(twice[0])} twice, expected different names; rename one"
        )
    return names


def _parquet(path: Path) -> Iterator[Record]:
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise DataError(
            f"{path}: got a Parquet file without pyarrow, expected it installed; "
            "pip install pyarrow, or convert the file to JSON Lines"
        ) from None
    try:
        with parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches():
                for fields in batch.to_pylist():
                    number += 1
                    yield Record(f"{path}: row {number}", fields)
    except (arrow.ArrowException, OSError, ValueError) as e:
        raise DataError(
            f"{path}: cannot be read as Parquet ({e}), expected a table; check the file"
        ) from e


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(
            f"{where}: got a JSON {type(value).__name__}, expected an object; wrap the row in {{}}"
        )
    return value


def _decode(blob: bytes, path: Path) -> str:
    try:
        return blob.decode("utf-8")
    except UnicodeDecodeError as e:
        line = blob.count(b"\n", 0, e.start) + 1
        _raise_not_utf8(e, f"{path}:{line}")


def _raise_not_utf8(error: UnicodeDecodeError, where: str) -> NoReturn:
    raise DataError(
        f"{where}: got byte 0x{error.object[error.start]:02x} at offset {error.start}, expected "
        "UTF-8; save the file as UTF-8"
    ) from None
