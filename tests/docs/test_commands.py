"""The commands of the documentation do what it shows, against the servers of all tests.

They answer with a breaker for words (tests/server/api/breaker_for_words.py), so that a page may
show that something passed or was stopped, and no score.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

from .blocks import PAGES, ROOT, blocks
from .parsers import PARSERS
from .session import problems, steps

RUN = [page for page in PAGES if any(block.kind == "run" for block in blocks(page))]
_KEYS = ("$KEY", "$ADMIN_KEY", '"KEY"')


def test_the_pages_with_commands_are_found() -> None:
    assert {"quickstart.md", "runbook.md", "policies.md", "README.md"} <= {p.name for p in RUN}


@pytest.mark.parametrize("page", RUN, ids=lambda page: page.name)
def test_a_page_does_what_it_says(
    page: Path, word_breaker: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if shutil.which("curl") is None:
        pytest.skip("needs curl, as readers do (Debian: apt-get install curl)")
    found = blocks(page)
    for block in found:
        if block.kind == "file":
            (tmp_path / block.argument).write_text(block.text, encoding="utf-8")
    has_keys = any(word in block.text for block in found for word in _KEYS)
    server = request.getfixturevalue("guarded" if has_keys else "server")
    url = str(server.url).removesuffix("/v1")
    names = {
        "SERVER": url.removeprefix("http://"),
        "MODEL": "smollm2-135m-instruct",
        "AUDIT_DB": str(server.audit_db),
        "SPOOL_DIR": f"{server.audit_db}.spool",
        "BREAKER_DIR": str(word_breaker),
    }
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([str(ROOT / "clients" / "python"), *sys.path]),
        "NO_COLOR": "1",
    }
    if has_keys:
        environment |= {"KEY": server.key, "ADMIN_KEY": server.admin_key}
        names |= {"KEY": server.key, "ADMIN_KEY": server.admin_key}
    assert problems(list(steps(found)), tmp_path, environment, url=url, names=names) == []
    for block in found:
        if (kind := block.options.get("as")) is not None:
            # With what the page's commands have put into it.
            text = (tmp_path / block.argument).read_text(encoding="utf-8")
            PARSERS[kind](text, tmp_path)
