"""The console in a real Chromium, driven by Playwright (console.test.mjs), on the real server.

CONSOLE_SCREENSHOTS=DIR keeps pictures of what the tests saw.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn

from ..node import installed, require_node
from ..server.api.conftest import MODEL, Server
from ..server.api.governed_app import attach, governed_app, policy_file

HERE = Path(__file__).parent


@pytest.fixture
def keyed_origin(tmp_path: Path) -> Iterator[str]:
    """A server that wants keys, without an engine: the login does not need one."""
    app = governed_app(policy_file(tmp_path))
    attach(app)
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


def write_fonts(directory: Path) -> Path:
    """A configuration with the fonts that matplotlib has, the same on each machine."""
    import matplotlib

    fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    (directory / "fonts.conf").write_text(
        f"<fontconfig><dir>{fonts}</dir><cachedir>{directory}/cache</cachedir></fontconfig>"
    )
    return directory


def test_the_console_in_a_browser(server: Server, keyed_origin: str, tmp_path: Path) -> None:
    require_node(20, 19)
    packages = installed(HERE)
    copy = tmp_path / "browser"
    copy.mkdir()
    for script in HERE.glob("*.mjs"):
        shutil.copy(script, copy)
    (copy / "node_modules").symlink_to(packages / "node_modules")
    environment = os.environ | {
        "CONSOLE_ORIGIN": server.url,
        "CONSOLE_KEY": server.admin["Authorization"].removeprefix("Bearer "),
        "CONSOLE_MODEL": MODEL,
        "CONSOLE_KEYED_ORIGIN": keyed_origin,
        "FONTCONFIG_PATH": str(write_fonts(copy)),
        "TMPDIR": str(packages / "unpacked"),
        "NO_PROXY": "*",
    }
    done = subprocess.run(
        ["node", "--test", "--test-reporter=tap", "console.test.mjs"],
        cwd=copy,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-8000:]
    # Each `test(` of the file has run, with the four of the loop.
    num_tests = len(re.findall(r"^ *test\(", (copy / "console.test.mjs").read_text(), re.MULTILINE))
    assert f"# tests {num_tests + 3}\n" in said, said[-3000:]
