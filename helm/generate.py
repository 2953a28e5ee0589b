"""Writes README.md from values.yaml, and `settings` in values.schema.json from those of serve.

python helm/generate.py            writes both
python helm/generate.py --check    exits 1 where one is not current
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from circuit_breakers.settings import ServeSettings

__all__ = ["CHART_SETS", "generated", "settings_schema", "value_rows"]

HERE = Path(__file__).parent
CHART_SETS = frozenset(
    {
        *("model", "revision", "breaker", "served_name", "loras", "host", "port"),
        *("policies", "pepper_file", "console"),
        *("audit_db", "audit_url", "audit_spool", "audit_key_file"),
    }
)
"""Settings that the chart gives from values of its own, as they go with volumes and Secrets, or not
at all: a console's key would be in the log of a pod, and good for that pod only."""
_KEY = re.compile(r"^( *)([\w-]+):(?: (.*))?$")
_VERSION = yaml.safe_load((HERE / "Chart.yaml").read_text(encoding="utf-8"))["appVersion"]
_IMAGE = "registry.example.com/circuit-breakers"
_INTRO = f"""\
# Helm chart

Written by `python helm/generate.py` from the comments in `values.yaml`; do not edit.

No registry has the image: build it, push it to one that your cluster pulls from, and name that.

```console
$ docker build -f docker/Dockerfile --target cpu -t {_IMAGE}:{_VERSION} .
$ docker push {_IMAGE}:{_VERSION}
$ helm install my-model helm/ --set image.repository={_IMAGE}
```

That is SmolLM2 on a CPU, one replica; `-f helm/ci/many-replicas-values.yaml` adds more.

What it does by itself: enforce mode; one replica; no Ingress; no root, a read-only root, no
capabilities, no token of the cluster; `circuit-breakers verify` before each start; only the
server's port open, and of the outside only DNS. Unknown values are refused (`values.schema.json`),
and so are those that do not go together, with the cure. Many replicas, upgrades, rollback and
sizing: [docs/replicas.md](../docs/replicas.md). Examples: [ci/](ci).

checkov 3.3.30 on the examples: 708 checks pass, 26 do not, by choice: CPU has no limit (throttling
would show in each token); images are pulled if they are not there, and by digest if you give one;
and two secrets come as variables, since that is how the server and the hub's client take them: the
audit URL, and the hub's token (to the download alone).

| value | default | what |
|---|---|---|
"""


class Row(NamedTuple):
    """One line of the table."""

    key: str
    default: str
    text: str


def value_rows(text: str) -> list[Row]:
    """Every value that has a comment above it, in the order of the file.

    Raises:
        ValueError: a value without a comment, or a parent of values with none below it.
    """
    values = yaml.safe_load(text)
    rows: list[Row] = []
    path: list[str] = []
    comment: list[str] = []
    leaf_indent: int | None = None
    for line in text.splitlines():
        if line.strip().startswith("#"):
            comment.append(line.strip(" #"))
            continue
        match = _KEY.match(line)
        if match is None or (leaf_indent is not None and len(match[1]) > leaf_indent):
            comment = []
            continue
        leaf_indent = None
        path = [*path[: len(match[1]) // 2], match[2]]
        value = _at(values, path)
        if comment:
            rows.append(Row(".".join(path), _shown(value), " ".join(comment)))
            leaf_indent = len(match[1])
            # Below `settings`, each default has its own line.
            if path == ["settings"]:
                leaf_indent = None
        elif not isinstance(value, dict):
            raise ValueError(f"values.yaml: got {'.'.join(path)} without a comment, expected one")
        comment = []
    return rows


def settings_schema() -> dict[str, Any]:
    """JSON schema of the values under `settings`: those of serve that the chart does not set."""
    properties = ServeSettings.model_json_schema()["properties"]
    return {
        "type": "object",
        "additionalProperties": False,
        "properties": {
            _camel(name): _plain(schema)
            for name, schema in properties.items()
            if name not in CHART_SETS
        },
    }


def generated() -> dict[Path, str]:
    """The content that each derived file should have."""
    rows = value_rows((HERE / "values.yaml").read_text(encoding="utf-8"))
    table = "".join(f"| `{row.key}` | {row.default} | {row.text} |\n" for row in rows)
    schema = json.loads((HERE / "values.schema.json").read_text(encoding="utf-8"))
    schema["properties"]["settings"] = settings_schema()
    return {
        HERE / "README.md": _INTRO + table,
        HERE / "values.schema.json": json.dumps(schema, indent=2) + "\n",
    }


def _at(values: Any, path: list[str]) -> Any:
    for key in path:
        values = values[key]
    return values


def _shown(value: Any) -> str:
    if value == "":
        return ""
    text = json.dumps(value) if isinstance(value, (dict, list)) else str(value)
    return f"`{text}`" if len(text) <= 40 else "see values.yaml"


def _camel(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join(part.capitalize() for part in rest)


def _plain(schema: dict[str, Any]) -> dict[str, Any]:
    # None is said by leaving a value out.
    for option in schema.get("anyOf", ()):
        if option.get("type") != "null":
            schema = option
    kept = ("type", "enum", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
    return {name: schema[name] for name in kept if name in schema}


def main(arguments: list[str]) -> int:
    stale = []
    for path, content in generated().items():
        if not path.exists() or path.read_text(encoding="utf-8") != content:
            stale.append(path.name)
            if "--check" not in arguments:
                path.write_text(content, encoding="utf-8")
    if stale and "--check" in arguments:
        sys.stderr.write(f"error: {', '.join(stale)} not current; run python helm/generate.py\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
