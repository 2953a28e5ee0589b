import gzip
import json
import lzma
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from circuit_breakers.errors import DataError
from circuit_breakers_training.data.records import SUFFIXES, parse_json, read_records, shown

ROWS = [{"prompt": "one", "n": 1}, {"prompt": "zwei\nü", "n": None}]
JSONL = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def _gzip(content: bytes) -> bytes:
    """The same bytes in every process: the names of the tests are made of them."""
    return gzip.compress(content, mtime=0)


def _rows(path: Path) -> list[dict[str, Any]]:
    return [record.fields for record in read_records(path)]


def _write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", JSONL),
        ("a.JSONL", JSONL),
        ("a.jsonl", b"\xef\xbb\xbf" + JSONL),
        ("a.json", JSONL),
        ("a.json", json.dumps(ROWS).encode()),
        ("a.json", b"\xef\xbb\xbf\n " + json.dumps(ROWS, indent=2).encode()),
        ("a.jsonl.gz", _gzip(JSONL)),
        ("a.jsonl.xz", lzma.compress(JSONL)),
        ("a.json.gz", _gzip(json.dumps(ROWS).encode())),
    ],
)
def test_json_of_every_shape_gives_the_same_rows(tmp_path: Path, name: str, content: bytes) -> None:
    assert _rows(_write(tmp_path / name, content)) == ROWS


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", b'id,text\n1,"a, b"\n\n2,"c\nd ""e"""\n'),
        ("a.csv", b'\xef\xbb\xbfid,text\r\n1,"a, b"\r\n2,"c\nd ""e"""'),
        ("a.csv.gz", _gzip(b'id, text\n1,"a, b"\n2,"c\nd ""e"""\n')),
    ],
)
def test_csv_cells_are_texts_by_column(tmp_path: Path, name: str, content: bytes) -> None:
    assert _rows(_write(tmp_path / name, content)) == [
        {"id": "1", "text": "a, b"},
        {"id": "2", "text": 'c\nd "e"'},
    ]


def test_rows_say_where_they_stand(tmp_path: Path) -> None:
    csv = _write(tmp_path / "a.csv", b'id,text\n1,"a\nb"\n2,c\n')
    assert [record.where for record in read_records(csv)] == [f"{csv}:2", f"{csv}:4"]
    lines = _write(tmp_path / "a.jsonl", b"{}\n\n{}")
    assert [record.where for record in read_records(lines)] == [f"{lines}:1", f"{lines}:3"]
    rows = _write(tmp_path / "a.json", b"[{}, {}]")
    assert [record.where for record in read_records(rows)] == [f"{rows}: row 1", f"{rows}: row 2"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b'id,text\n1,"a\n2,b\n', r"a\.csv:2: got broken CSV"),
        ("a.csv", b"id,text\n1,a\n2\n", r"a\.csv:3: got 1 cells, expected 2"),
        ("a.csv", b"id,text\n1,a,b\n", r"a\.csv:2: got 3 cells, expected 2"),
        ("a.csv", b"id,id\n1,a\n", r'a\.csv:1: got the column "id" twice'),
        ("a.csv", b"id\nok\n\xff\n", r"a\.csv:3: got byte 0xff at offset 6, expected UTF-8"),
        ("a.csv", b"id,text\n", "got an empty file"),
        ("a.csv", b"", "got an empty file"),
        ("a.json", b"[]", "got an empty file"),
        ("a.json", b"[1]", r"a\.json: row 1: got a JSON int, expected an object"),
        ("a.json", b'[{"a": 1},', r"a\.json: got invalid JSON"),
        ("a.json", b"", "got an empty file"),
        ("a.jsonl", b"{}\n[1]\n", r"a\.jsonl:2: got a JSON list, expected an object"),
        ("a.jsonl", b"{}\n{\n", r"a\.jsonl:2: got invalid JSON"),
        ("a.jsonl", b'{}\n{"a": "\xff"}\n', r"a\.jsonl:2: got byte 0xff at offset 7"),
        ("a.jsonl.gz", b"{}\n", r"a\.jsonl\.gz: cannot be read"),
        ("a.jsonl.gz", _gzip(JSONL)[:-12], r"a\.jsonl\.gz: cannot be read"),
        ("a.jsonl.xz", b"{}\n", r"a\.jsonl\.xz: cannot be read"),
        ("a.txt", b"{}\n", r"got the file type '\.txt', expected \.jsonl, \.json, \.csv"),
        ("a", b"{}\n", "without a suffix"),
    ],
)
def test_what_cannot_be_read_is_named(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    path = _write(tmp_path / name, content)
    with pytest.raises(DataError, match=message) as caught:
        _rows(path)
    assert "expected" in str(caught.value)
    assert ";" in str(caught.value)  # the cure follows


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="check the path"):
        _rows(tmp_path / "none.jsonl")


@pytest.mark.parametrize("text", ["[" * 100_000, "1" * 5_000])
def test_json_that_breaks_a_parser_is_refused(text: str) -> None:
    # Python's own limits: about 1,000 nested lists, and 4,300 digits.
    with pytest.raises(DataError, match=r"file:1: got"):
        parse_json(text, "file:1")


def test_parquet_without_pyarrow_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match="pip install pyarrow, or convert the file"):
        _rows(_write(tmp_path / "a.parquet", b"PAR1"))


def test_parquet_gives_the_same_rows(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow", reason="Parquet needs pyarrow, an optional extra")
    import pyarrow.parquet as parquet

    parquet.write_table(arrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    assert _rows(tmp_path / "a.parquet") == ROWS
    with pytest.raises(DataError, match=r"b\.parquet: cannot be read as Parquet"):
        _rows(_write(tmp_path / "b.parquet", b"PAR1"))


def test_shown_is_short_and_printable() -> None:
    assert shown("\ud800") == '"\\ud800"'
    assert len(shown("x" * 1_000)) == 60
    assert shown(b"x") == "\"b'x'\""


@pytest.mark.parametrize("suffix", [s for s in SUFFIXES if s != ".parquet"])
@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(content=st.one_of(st.binary(max_size=200), st.text('"\n\r,{}[]:\\a1\x00', max_size=60)))
def test_any_bytes_are_rows_or_a_data_error(
    tmp_path: Path, suffix: str, content: bytes | str
) -> None:
    blob = content.encode() if isinstance(content, str) else content
    path = _write(tmp_path / f"fuzz{suffix}", blob)
    try:
        rows = _rows(path)
    except DataError as error:
        assert str(path) in str(error)
    else:
        assert rows
