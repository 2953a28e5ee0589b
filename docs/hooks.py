"""What the site needs beyond its pages: the API reference, figures, and links that leave docs/.

The pages are written for whoever reads them in the repository; here they become a site that may
stand anywhere, where a link to a file of the repository would lead nowhere.
"""

from __future__ import annotations

import importlib.util
import logging
import re
from html import escape
from pathlib import Path
from typing import Any

__all__ = ["on_config", "on_page_content", "on_page_markdown"]

# mkdocs counts warnings of loggers below its own, and --strict fails on them.
logger = logging.getLogger("mkdocs.hooks.circuit_breakers")

DOCS = Path(__file__).resolve().parent
API_MARK = "<!-- The tables are made when the site is built. -->"

_OUTWARD_LINK = re.compile(r"\[([^]]+)\]\((\.\./[^)#\s]*)(#[^)\s]*)?\)")
_FIGURE = re.compile(r'<p><img alt="([^"]*)" src="figures/([\w-]+\.svg)" ?/?></p>')
_COMMENT = re.compile(r"^<!-- (?:test|not run)[:,].*-->\n", re.MULTILINE)


def on_config(config: Any) -> Any:
    """The pages are beside their configuration."""
    config.docs_dir = str(DOCS)
    return config


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The text of a page without marks for tests, and with what is generated."""
    if API_MARK in markdown:
        markdown = markdown.replace(API_MARK, _api_tables())
    markdown = _COMMENT.sub("", markdown)
    return _OUTWARD_LINK.sub(lambda link: _as_path(link, page.file.src_uri), markdown)


def on_page_content(html: str, **_: Any) -> str:
    """The HTML of a page with its figures inside, where they take the page's colours."""
    return _FIGURE.sub(_inlined, html)


def _as_path(link: re.Match[str], page: str) -> str:
    """The name of a file in the repository, in place of a link to it."""
    text, target, _ = link.groups()
    path = (DOCS / target).resolve()
    if not path.exists():
        logger.warning("page %s: links to %s, which is not in the repository", page, target)
    name = path.relative_to(DOCS.parent).as_posix()
    shown = text.strip("`")
    return f"`{name}`" if shown in (name, path.name) else f"{text} (`{name}`)"


def _inlined(image: re.Match[str]) -> str:
    alt, name = image.groups()
    svg = (DOCS / "figures" / name).read_text(encoding="utf-8")
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{escape(alt, quote=True)}" ', 1)
    return f'<figure class="drawn">{svg}</figure>'


def _api_tables() -> str:
    spec = importlib.util.spec_from_file_location("api_reference", DOCS / "api_reference.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tables: str = module.api_tables()
    return tables
