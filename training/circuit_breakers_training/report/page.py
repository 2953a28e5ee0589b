"""A report as one HTML file that needs nothing else: no script, no font, no picture, no address.

Jinja escapes every text. Only two parts are taken as they are, both made by this package: the style
sheet, and the drawings, whose texts are escaped as they are written. Should an escape ever fail,
the page's own policy forbids scripts, requests and forms.
"""

from __future__ import annotations

from importlib import resources
from typing import Any, get_args

from jinja2 import Environment, StrictUndefined

from circuit_breakers_training.report.document import Block, Document
from circuit_breakers_training.report.pictures import inline_svg

__all__ = ["to_html"]


def to_html(document: Document) -> str:
    """The whole document as a page."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    for kind in get_args(Block):
        environment.tests[kind.__name__.lower()] = _is_a(kind)
    folder = resources.files(__package__)
    template = environment.from_string((folder / "page.html.jinja").read_text("utf-8"))
    return template.render(
        document=document,
        style=(folder / "page.css").read_text("utf-8"),
        drawings={plot.name: inline_svg(plot) for plot in document.plots},
    )


def _is_a(kind: type) -> Any:
    return lambda block: isinstance(block, kind)
