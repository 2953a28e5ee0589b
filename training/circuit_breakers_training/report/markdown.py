"""A report as Markdown, for terminals, diffs and code hosts: the short form."""

from __future__ import annotations

import re
from collections.abc import Sequence

from circuit_breakers_training.report.document import (
    Block,
    Cell,
    Document,
    Headline,
    Headlines,
    Items,
    Paragraph,
    Plot,
    Sample,
    Samples,
    Share,
    Table,
)

__all__ = ["to_markdown"]


def to_markdown(document: Document, *, pictures: bool = True) -> str:
    """The document without what only the page shows.

    Args:
        pictures: refer to plots/<name>.png beside the file.
    """
    parts = [f"# {document.kind} {_quote(document.name)}", *_blocks(document.summary, pictures)]
    for section in document.sections:
        if not section.page_only:
            parts += [f"## {section.title}", *_blocks(section.blocks, pictures)]
    return "\n\n".join(parts) + "\n"


def _blocks(blocks: Sequence[Block], pictures: bool) -> list[str]:
    return [text for block in blocks if (text := _block(block, pictures))]


def _block(block: Block, pictures: bool) -> str:
    match block:
        case Paragraph(text):
            return _plain(text)
        case Items(items):
            return "\n".join(f"- {_plain(item)}" for item in items)
        case Headlines():
            rows = [(item.label, _headline(item)) for item in block.items]
            return _table((block.caption, ""), rows)
        case Table():
            return "" if block.page_only else _marked_table(block)
        case Plot():
            shown = pictures and not block.page_only
            return f"![{_plain(block.title)}](plots/{block.name}.png)" if shown else ""
        case Samples(items):
            return "\n\n".join(map(_sample, items))


def _headline(item: Headline) -> str:
    return f"{item.value} ({item.detail})" if item.detail else item.value


def _marked_table(table: Table) -> str:
    rows = [[_cell(cell) for cell in row] for row in table.rows]
    if table.marked_row is not None:
        rows[table.marked_row][-1] = f"**{rows[table.marked_row][-1]}**"
    return _table(table.header, rows)


def _cell(cell: Cell) -> str:
    return _plain(cell.text if isinstance(cell, Share) else cell)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _sample(sample: Sample) -> str:
    lines = [f"**{_plain(sample.label)}**: {_quote(sample.prompt)}", ""]
    lines += [f"- base: {_quote(sample.before)}", f"- breaker: {_quote(sample.after)}"]
    return "\n".join(lines)


def _plain(text: str) -> str:
    """Text in which nothing breaks a table, starts a tag or is read as markup."""
    line = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\|*`\[\]])", r"\\\1", line)


def _quote(text: str) -> str:
    """One line of Markdown code that shows the text as it is."""
    line = " ".join(text.split()).replace("`", "'")
    return f"`{line}`" if line else "(empty)"
