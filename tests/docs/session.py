"""Runs a page as its reader would: one shell from its first command to its last."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from .blocks import Block, commands, fits

__all__ = ["Step", "problems", "steps"]

_EXAMPLE_URL = "http://127.0.0.1:8000"


@dataclass(frozen=True, kw_only=True)
class Step:
    """One command, or one block of Python."""

    place: str
    text: str
    is_python: bool
    shown: str = ""
    """Output that has to come; empty for any."""


def steps(found: list[Block]) -> Iterator[Step]:
    """What of a page is run, in order."""
    for number, block in enumerate(found):
        if block.kind != "run":
            continue
        compared = "shown" not in block.options
        if block.language == "python":
            after = found[number + 1] if number + 1 < len(found) else block
            shown = after.text if compared and after.kind == "output" else ""
            yield Step(place=block.place, text=block.text, is_python=True, shown=shown)
            continue
        words = [word for word in block.options.get("without", "").split(", ") if word]
        for command in commands(block.text):
            if not any(word in command.text for word in words):
                shown = command.shown if compared else ""
                yield Step(place=block.place, text=command.text, is_python=False, shown=shown)


def problems(
    wanted: list[Step],
    directory: Path,
    environment: Mapping[str, str],
    *,
    url: str,
    names: Mapping[str, str],
) -> list[str]:
    """What did not go as the page says; runs it in `directory`.

    Args:
        url: of the server that stands for the one on port 8000.
        names: what stands for the placeholders in capitals.
    """
    results = directory / ".results"
    results.mkdir()
    lines = ["set -o pipefail"]
    seen = ""
    for number, step in enumerate(wanted):
        text = _filled(step.text, url, names)
        if step.is_python:
            (results / f"{number}.py").write_text(_after(seen, text), encoding="utf-8")
            seen += text
            text = f"python {results / f'{number}.py'}"
        out = results / str(number)
        lines += ["{", text, f"}} > {out} 2>&1 < /dev/null", f"echo $? > {out}.code"]
    script = results / "script"
    script.write_text("\n".join(lines) + "\n", encoding="utf-8")
    subprocess.run(["bash", script], cwd=directory, env=dict(environment), timeout=1800)
    found = (_problem(step, results / str(number)) for number, step in enumerate(wanted))
    return [problem for problem in found if problem is not None]


_ERROR = re.compile(r'^error: |^(data: )?\{("type": ?"error", ?)?"(error|detail)"', re.MULTILINE)
"""The command's own, OpenAI's whole and in a stream, Anthropic's, FastAPI's."""


def _problem(step: Step, out: Path) -> str | None:
    printed = out.read_text(encoding="utf-8") if out.exists() else "(never run)"
    code = out.with_name(f"{out.name}.code")
    status = code.read_text().strip() if code.exists() else "none"
    told = f"{step.place}: {step.text}\nprinted: {printed[-1500:]}"
    if status != "0":
        return f"exit code {status}, expected 0: {told}"
    if step.shown and not fits(step.shown, printed):
        return f"expected: {step.shown}\n{told}"
    # curl says 0 whatever the server says.
    if "error" not in step.shown and _ERROR.search(printed):
        return f"an error, where the page shows none: {told}"
    return None


def _filled(text: str, url: str, names: Mapping[str, str]) -> str:
    text = text.replace(_EXAMPLE_URL, url)
    # Not in the name of a variable, and not a variable.
    pattern = rf"(?<![\w$])(?:{'|'.join(names)})(?!\w)"
    return re.sub(pattern, lambda name: names[name[0]], text)


def _after(seen: str, text: str) -> str:
    """A program that is `text` after `seen`, and prints what `text` does."""
    return (
        "import contextlib, io\n"
        "names = {'__name__': '__main__'}\n"
        "with contextlib.redirect_stdout(io.StringIO()):\n"
        f"    exec({seen!r}, names)\n"
        f"exec({text!r}, names)\n"
    )
