"""The fenced blocks of the documentation, and what the mark before each says of it.

    <!-- test: run -->               commands or Python, run in order for each page
    <!-- test: run; without: a, b -->  commands in which such a word occurs are left out
    <!-- test: run; shown: WHY -->   run, but what is shown is not compared, for that reason
    <!-- test: output -->            what the block of Python before it prints
    <!-- test: file NAME; as: KIND -->  lies there under that name when the commands run
    <!-- test: parse KIND -->        accepted by the real parser of that kind
    <!-- not run: WHY -->

Shown output matches as it is; `...` in it stands for any text.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["PAGES", "ROOT", "Block", "Command", "blocks", "commands", "fits"]

ROOT = Path(__file__).parents[2]
PAGES = (*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md")

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_MARK = re.compile(r"<!-- (?:test: (run|output|file|parse)|(not run): )([^;>]*)(.*?)-->\n\Z")
_OPTIONS = ("without", "shown", "as")


@dataclass(frozen=True, kw_only=True)
class Block:
    page: Path
    line: int
    language: str
    text: str
    kind: str | None
    """run, output, file, parse or not run; None for a block without a mark."""
    argument: str = ""
    """Name of the file, kind of the text, or the reason."""
    options: dict[str, str] = field(default_factory=dict)

    @property
    def place(self) -> str:
        return f"{self.page.name}:{self.line}"


@dataclass(frozen=True, kw_only=True)
class Command:
    text: str
    shown: str
    """What the page shows of its output; empty for nothing."""


def blocks(page: Path) -> list[Block]:
    """Every fenced block of a page, in order."""
    text = page.read_text(encoding="utf-8")
    found = []
    for fence in _FENCE.finditer(text):
        before = text[: fence.start()]
        line = before.count("\n") + 1
        kind, argument, options = _mark(before[before.rfind("\n", 0, -1) + 1 :])
        found.append(
            Block(
                page=page,
                line=line,
                language=fence[1],
                text=fence[2],
                kind=kind,
                argument=argument,
                options=options,
            )
        )
    return found


def _mark(line: str) -> tuple[str | None, str, dict[str, str]]:
    mark = _MARK.fullmatch(line)
    if mark is None:
        return None, "", {}
    kind, not_run, argument, rest = mark.groups()
    if not_run:
        return not_run, (argument + rest).strip(), {}
    options = dict(part.strip().split(": ", 1) for part in rest.split(";") if part.strip())
    assert set(options) <= set(_OPTIONS), line
    return kind, argument.strip(), options


def commands(console: str) -> Iterator[Command]:
    """The commands of a console, each with what is shown of its output."""
    lines = console.splitlines()
    assert lines[0].startswith("$ "), console
    while lines:
        text = lines.pop(0).removeprefix("$ ")
        while lines and not _is_whole(text):
            text += "\n" + lines.pop(0)
        shown = []
        while lines and not lines[0].startswith("$ "):
            shown.append(lines.pop(0))
        yield Command(text=text, shown="\n".join(shown))


def _is_whole(text: str) -> bool:
    """Whether a shell would run a command without waiting for its next line."""
    done = subprocess.run(["bash", "-n"], input=text + "\n", text=True, capture_output=True)
    return done.returncode == 0 and not text.endswith("\\")


def fits(shown: str, printed: str) -> bool:
    """Whether what is shown is what was printed."""
    pattern = ".*".join(re.escape(part) for part in shown.strip().split("..."))
    return re.fullmatch(pattern, printed.strip(), re.DOTALL) is not None
