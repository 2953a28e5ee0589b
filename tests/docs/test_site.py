"""The site is built whole, with what is generated, and asks nobody else for anything."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from ..fetched_packages import fetched_packages
from .blocks import PAGES, ROOT

DOCS = ROOT / "docs"
_LOADING = {("script", "src"), ("link", "href"), ("img", "src"), ("iframe", "src")}


def module(path: Path) -> ModuleType:
    """A file of docs/, which is no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def build(config: Path, out: Path) -> subprocess.CompletedProcess[str]:
    """Runs mkdocs as `make docs` does."""
    path = os.pathsep.join([*sys.path, str(fetched_packages("docs"))])
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", config, "-d", out],
        env=os.environ | {"PYTHONPATH": path, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; links within it, their anchors and the navigation are checked by mkdocs."""
    out = tmp_path_factory.mktemp("site") / "built"
    done = build(DOCS / "mkdocs.yml", out)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


class Loaded(HTMLParser):
    """What a browser fetches for a page by itself."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.urls: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, Any]]) -> None:
        self.urls += [value for name, value in attrs if (tag, name) in _LOADING]


def test_every_page_is_there(site: Path) -> None:
    expected = {f"{page.stem}.html" for page in PAGES if page.parent == DOCS}
    assert expected <= {file.name for file in site.glob("*.html")}


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    for page in site.glob("*.html"):
        urls = Loaded(page.read_text(encoding="utf-8")).urls
        assert len(urls) > 3
        assert [url for url in urls if re.match(r"(\w+:)?//", url)] == [], page.name
    for style in site.rglob("*.css"):
        assert not re.search(r"url\([\"']?(\w+:)?//", style.read_text(encoding="utf-8")), style


def test_the_api_page_has_every_operation_and_every_field(site: Path) -> None:
    html = (site / "api.html").read_text(encoding="utf-8")
    document = module(DOCS / "api_reference.py").openapi_document()
    operations = [(m, p, o) for p, methods in document["paths"].items() for m, o in methods.items()]
    assert len(operations) > 12
    sections = dict(re.findall(r"<h3 id=[^>]*>(.*?)<a.*?</h3>(.*?)(?=<h[23])", html, re.DOTALL))
    for method, path, operation in operations:
        section = sections[f"{method.upper()} {path}"]
        body = operation.get("requestBody", {"content": {}})["content"].get("application/json")
        for name in body["schema"]["properties"] if body else ():
            assert f"<code>{name}</code>" in section, (path, name)


def test_the_api_page_says_what_a_report_has(site: Path) -> None:
    html = (site / "api.html").read_text(encoding="utf-8")
    error = module(DOCS / "api_reference.py").openapi_document()["components"]["schemas"]["Error"]
    guard = error["properties"]["error"]["properties"]["guard"]["anyOf"][0]["properties"]
    table = html[: html.index("</table>")]
    assert set(guard) <= set(re.findall(r"<code>(\w+)</code>", table))


def test_no_mark_of_a_test_is_left_and_no_link_leads_out_of_the_site(site: Path) -> None:
    for page in site.glob("*.html"):
        html = page.read_text(encoding="utf-8")
        assert not re.search(r"<!-- (test|not run):", html), page.name
        assert 'href="../' not in html, page.name


def test_the_drawn_figures_are_those_that_are_committed(site: Path) -> None:
    drawn = module(DOCS / "figures" / "draw.py").figures()
    committed = {file.name: file.read_text(encoding="utf-8") for file in DOCS.rglob("*.svg")}
    assert committed == drawn, "run `python docs/figures/draw.py`"
    html = (site / "how-it-works.html").read_text(encoding="utf-8")
    for name, svg in drawn.items():
        assert svg.splitlines()[-2] in html, f"{name} is not in the page"
    assert html.count('<svg role="img" aria-label="') == len(drawn)


def test_a_link_that_leads_nowhere_ends_the_build(tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    (docs / "figures").mkdir(parents=True)
    (docs / "hooks.py").write_bytes((DOCS / "hooks.py").read_bytes())
    (docs / "mkdocs.yml").write_text(
        "site_name: x\ndocs_dir: figures\nhooks: [hooks.py]\nplugins: []\nexclude_docs: '*.py'\n"
        "validation: {links: {anchors: warn}}\n"
    )
    for link in ("gone.md", "#gone", "../gone.md"):
        (docs / "index.md").write_text(f"# A\n\n[b]({link})\n")
        done = build(docs / "mkdocs.yml", tmp_path / "out")
        assert done.returncode == 1, link
        assert "gone" in done.stderr
    (docs / "index.md").write_text("# A\n\n[b](#a) and [c](../docs/mkdocs.yml)\n")
    assert build(docs / "mkdocs.yml", tmp_path / "out").returncode == 0
