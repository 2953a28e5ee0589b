"""A figure as a PNG file, or as an SVG element that takes its colours from the page around it."""

from __future__ import annotations

import io
import re
from xml.etree import ElementTree

import matplotlib as mpl

from circuit_breakers_training.report.document import Plot
from circuit_breakers_training.report.plots import PRINTED, Palette

__all__ = ["inline_svg", "png_file"]

# Colours that stand for the page's own; matplotlib knows no variables.
_VARIABLES = {
    "#010101": "var(--ink)",
    "#020202": "var(--grid)",
    "#030303": "var(--series-1)",
    "#040404": "var(--series-2)",
}
_PAGE = Palette(ink="#010101", grid="#020202", series=("#030303", "#040404"))
_SETTINGS = {
    "text.parse_math": False,
    "font.size": 9,
    "svg.fonttype": "none",  # text stays text: small, sharp, searchable
    "svg.hashsalt": "circuit-breakers",  # equal figures give equal bytes
}


def png_file(plot: Plot) -> bytes:
    """The plot on a white ground."""
    buffer = io.BytesIO()
    with mpl.rc_context(_SETTINGS):
        plot.draw(PRINTED).savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def inline_svg(plot: Plot) -> str:
    """An <svg> element with a title and a description, without a reference to anything outside."""
    buffer = io.BytesIO()
    with mpl.rc_context(_SETTINGS):
        plot.draw(_PAGE).savefig(buffer, format="svg", transparent=True)
    root = ElementTree.fromstring(buffer.getvalue())  # noqa: S314 - our own drawing
    for parent in list(root.iter()):
        for child in list(parent):
            # Addresses that a page has no use for, and a style that would hold for all of it.
            if child.tag.endswith(("}metadata", "}style")):
                parent.remove(child)
    used = _references(root)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        attributes = {name.rpartition("}")[2]: value for name, value in element.attrib.items()}
        element.attrib.clear()
        for name, value in attributes.items():
            if name == "id" and value not in used:
                continue
            element.set(name, _on_page(name, value, plot.name))
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.set("role", "img")
    root.set("aria-labelledby", f"{plot.name}-title {plot.name}-desc")
    for index, (tag, text) in enumerate((("title", plot.title), ("desc", plot.caption))):
        child = ElementTree.Element(tag, {"id": f"{plot.name}-{tag}"})
        child.text = text
        root.insert(index, child)
    return ElementTree.tostring(root, encoding="unicode", short_empty_elements=True)


def _references(root: ElementTree.Element) -> set[str]:
    """Ids that other elements point at."""
    values = [value for element in root.iter() for value in element.attrib.values()]
    return {match for value in values for match in re.findall(r"#([A-Za-z][\w-]*)", value)}


def _on_page(name: str, value: str, prefix: str) -> str:
    """An attribute with ids that no other plot has, and with the page's colours and font."""
    if name == "id":
        return f"{prefix}-{value}"
    if name == "href":
        return value.replace("#", f"#{prefix}-", 1)
    value = value.replace("url(#", f"url(#{prefix}-")
    if name == "style":
        value = re.sub(r"font-family: [^;]*;? ?", "", value)
        for color, variable in _VARIABLES.items():
            value = value.replace(color, variable)
    return value
