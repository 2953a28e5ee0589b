"""What a report is made of, before it is Markdown or a page: sections of a few kinds of blocks.

    Document ─ Section ─ Headlines | Paragraph | Items | Table | Plot | Samples

Both forms are written from the same blocks, so that they cannot differ in a number. All text is
plain: neither form reads markup in it, since names and samples come from data and from models.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from circuit_breakers_training.report.plots import Palette

__all__ = [
    "Block",
    "Cell",
    "Document",
    "Headline",
    "Headlines",
    "Items",
    "Paragraph",
    "Plot",
    "Sample",
    "Samples",
    "Section",
    "Share",
    "Table",
]


class Share(NamedTuple):
    """A share and its interval as a table cell; the page draws it, too."""

    text: str
    share: float
    low: float
    high: float


Cell = str | Share


class Headline(NamedTuple):
    """One figure that sums up a breaker."""

    label: str
    value: str
    detail: str = ""
    """Counts and interval."""


@dataclass(frozen=True, kw_only=True)
class Headlines:
    caption: str
    items: tuple[Headline, ...]


@dataclass(frozen=True)
class Paragraph:
    text: str


@dataclass(frozen=True)
class Items:
    items: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of cells; the first cell of a row names it."""

    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    marked_row: int | None = None
    """Index of the row that stands out; its last cell says why."""
    folded: bool = False
    """Shown on demand where the form allows it."""
    page_only: bool = False
    """Detail that the short form leaves out."""


@dataclass(frozen=True, kw_only=True)
class Plot:
    name: str
    """Of its file, and unique in the document."""
    title: str
    caption: str
    """What is to be seen, for those who do not see it as well."""
    draw: Callable[[Palette], Any]
    """A matplotlib figure in these colours."""
    page_only: bool = False
    """Without a picture file for the short form."""


class Sample(NamedTuple):
    """One prompt and its continuations. Untrusted text, of any content."""

    label: str
    prompt: str
    before: str
    after: str


@dataclass(frozen=True)
class Samples:
    items: tuple[Sample, ...]


Block = Headlines | Paragraph | Items | Table | Plot | Samples


@dataclass(frozen=True, kw_only=True)
class Section:
    name: str
    """Anchor on the page; unique in the document."""
    title: str
    blocks: tuple[Block, ...]
    page_only: bool = False
    """Detail that the short form leaves out."""


@dataclass(frozen=True, kw_only=True)
class Document:
    kind: str = "Breaker"
    """What it is about, before the name."""
    name: str
    """Of the breaker."""
    summary: tuple[Block, ...]
    """Comes before the first section."""
    sections: tuple[Section, ...]

    @property
    def plots(self) -> tuple[Plot, ...]:
        """All plots, in order."""
        blocks = [*self.summary, *(b for s in self.sections for b in s.blocks)]
        return tuple(block for block in blocks if isinstance(block, Plot))
