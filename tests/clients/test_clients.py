"""Other people's clients on a real server, unmodified: what each shows of an answer and of a trip.

openai-node is fetched with npm, where there is one. The Python clients pin other versions of what
we install, and weigh 600 MB: `make clients-check` gives them an environment of their own.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from ..node import npm, require_node
from ..server.api.capitals import BEFORE_PARIS, FRANCE, ITALY, ROME, ZEBRA
from ..server.api.conftest import MODEL, Server

HERE = Path(__file__).parent
PYTHON = HERE.parents[1] / ".venv-clients" / "bin" / "python"
OPENAI_NODE = "openai@6.49.0"
WHOLE = {"text": ROME, "finish_reason": "stop"}
PROMPT_TRIPPED = (
    "The prompt was stopped by the circuit breaker; nothing was generated. "
    "Change the prompt and send it again."
)
TRIPPED = {"text": BEFORE_PARIS, "finish_reason": "content_filter"}


def shown_by(command: list[str], server: Server, directory: Path) -> list[dict[str, Any]]:
    """What a client shows of ITALY, FRANCE and ZEBRA, each whole and as a stream."""
    done = subprocess.run(
        [*command, f"{server.url}/v1", MODEL, ITALY, FRANCE, ZEBRA],
        cwd=directory,
        # Nothing of ours is on its path, and no client looks anything up.
        env={
            "PATH": os.environ["PATH"],
            "HOME": str(directory),
            "NO_PROXY": "*",
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    shown: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return shown


def test_openai_node(server: Server, tmp_path: Path) -> None:
    require_node()
    fetched = npm(tmp_path, "install", "--no-audit", "--no-fund", "--ignore-scripts", OPENAI_NODE)
    if fetched.returncode:
        pytest.skip(f"npm cannot fetch {OPENAI_NODE}: {fetched.stderr.strip()[-200:]}")
    shutil.copy(HERE / "ask_node.mjs", tmp_path)
    refused = {"error": "BadRequestError", "status": 400, "code": "content_filter"}
    shown = shown_by(["node", "ask_node.mjs"], server, tmp_path)
    assert shown == [WHOLE] * 2 + [TRIPPED] * 2 + [refused] * 2


@pytest.mark.parametrize(
    ("client", "refused"),
    [
        (
            "langchain",
            {"error": "OpenAIInvalidRequestError", "status": 400, "code": "content_filter"},
        ),
        ("litellm", {"error": "BadRequestError", "status": 400}),
        # It makes an answer of the 400, as it does of OpenAI's.
        ("inspect", {"text": PROMPT_TRIPPED, "finish_reason": "content_filter"}),
    ],
)
def test_python_client(
    server: Server, tmp_path: Path, client: str, refused: dict[str, Any]
) -> None:
    if not PYTHON.is_file():
        pytest.skip("needs .venv-clients, which `make clients-check` makes (600 MB)")
    shown = shown_by([str(PYTHON), str(HERE / f"ask_{client}.py")], server, tmp_path)
    assert shown == [WHOLE] * 2 + [TRIPPED] * 2 + [refused] * 2
