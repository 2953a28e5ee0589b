"""Every block of the documentation is run, parsed, or says why it is not."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import pytest

from .blocks import PAGES, ROOT, Block, blocks, commands, fits
from .parsers import PARSERS

_FOLDERS = ("clients", "docker", "docs", "helm", "requirements", "server", "tests", "training")

ALL = [block for page in PAGES for block in blocks(page)]


def of_kind(kind: str) -> list[Block]:
    return [block for block in ALL if block.kind == kind]


def test_every_block_is_marked() -> None:
    assert len(ALL) > 60
    unmarked = [block.place for block in ALL if block.kind is None]
    assert unmarked == [], "put a comment before them, see tests/docs/blocks.py"


def test_every_block_has_a_language() -> None:
    assert [block.place for block in ALL if not block.language] == []


def test_what_is_not_run_says_why() -> None:
    reasons = [block.argument for block in of_kind("not run")]
    assert all(len(reason.split()) > 2 for reason in reasons), reasons


def test_only_consoles_and_python_are_run() -> None:
    assert {block.language for block in of_kind("run")} == {"console", "python"}


def test_every_output_follows_its_python() -> None:
    for before, block in pairwise(ALL):
        if block.kind == "output":
            assert (before.kind, before.language) == ("run", "python"), block.place


@pytest.mark.parametrize("block", of_kind("parse"), ids=lambda block: block.place)
def test_the_real_parser_takes_it(block: Block, tmp_path: Path) -> None:
    PARSERS[block.argument](block.text, tmp_path)


def test_every_file_that_a_page_names_is_there() -> None:
    """Evidence in the threat model, above all."""
    named = set()
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        # Those of blocks that are not run, too.
        named |= set(re.findall(rf"(?<![\w/.-])(?:{'|'.join(_FOLDERS)})/[\w./-]*\w", text))
        tests = {file.name for file in (ROOT / "tests").rglob("test_*.py")}
        assert set(re.findall(r"(?<![\w/])test_\w+\.py", text)) <= tests, page.name
    assert len(named) > 40
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []


def test_a_console_is_split_where_a_shell_would() -> None:
    console = "$ f() { echo \\\n    one; }\n$ f 'a\nb'\none\n...\n$ true\n"
    found = [(command.text, command.shown) for command in commands(console)]
    assert found == [("f() { echo \\\n    one; }", ""), ("f 'a\nb'", "one\n..."), ("true", "")]


def test_shown_output_fits_what_it_leaves_out_and_nothing_else() -> None:
    assert fits('{..."tripped":true...}', '{"a": 1, "tripped":true}\n')
    assert fits("a.b", "a.b")
    assert not fits("a.b", "axb")
    assert not fits("ok", "ok, but")
