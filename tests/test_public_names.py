"""What each module defines in public and what its __all__ says are the same thing."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = (
    ROOT / "server" / "circuit_breakers",
    ROOT / "training" / "circuit_breakers_training",
    ROOT / "clients" / "python" / "circuit_breakers_client",
)
MODULES = sorted(path for package in PACKAGES for path in package.rglob("*.py"))


def names_bound(node: ast.stmt) -> set[str]:
    """Names that a top-level definition or assignment binds; imports count only in __init__."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return {node.name}
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return {node.target.id}
    if isinstance(node, ast.Assign):
        return {target.id for target in node.targets if isinstance(target, ast.Name)}
    return set()


def names_imported(tree: ast.Module) -> set[str]:
    imports = (node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom)))
    return {alias.asname or alias.name for node in imports for alias in node.names}


def is_cli_command(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> bool:
    """Decorated with @app.command or @app.callback: called by name of the command only."""
    decorators = (d.func if isinstance(d, ast.Call) else d for d in node.decorator_list)
    return any(
        isinstance(d, ast.Attribute) and d.attr in ("command", "callback") for d in decorators
    )


def declared(tree: ast.Module) -> list[str]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and names_bound(node) == {"__all__"}:
            return list(ast.literal_eval(node.value))
    return []


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_all_lists_names_that_exist_once_and_are_public(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = declared(tree)
    bound = {name for node in tree.body for name in names_bound(node)} | names_imported(tree)
    assert len(names) == len(set(names))
    assert set(names) <= bound
    assert [n for n in names if n.startswith("_") and n != "__version__"] == []


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_public_functions_and_classes_are_in_all(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    public = {
        node.name
        for node in tree.body
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
        and not node.name.startswith("_")
        and not is_cli_command(node)
    }
    assert public - set(declared(tree)) == set()


@pytest.mark.parametrize("package", ["artifact"])
def test_package_exports_what_its_all_says(package: str) -> None:
    tree = ast.parse((PACKAGES[0] / package / "__init__.py").read_text(encoding="utf-8"))
    assert set(declared(tree)) == names_imported(tree)
