"""A function or class that other modules import says what it is."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]

OF_THE_API = {
    # The OpenAPI document shows their fields, each with a description; a docstring would be one more.
    "serve_app.service.answers",
    "serve_app.service.questions",
    "serve_app.service.views",
    "serve_app.scoring.Strategy",
}


class Definition(NamedTuple):
    name: str  # with its module
    says: str  # its docstring


def modules(root: Path) -> dict[str, ast.Module]:
    paths = (path for path in sorted((root / "serve_app").rglob("*.py")) if "protos" not in path.parts)
    return {
        ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): ast.parse(path.read_text())
        for path in paths
    }


def defined(name: str, module: ast.Module) -> Iterator[Definition]:
    for node in module.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield Definition(f"{name}.{node.name}", ast.get_docstring(node) or "")


def imported(module: ast.Module) -> Iterator[str]:
    for node in ast.walk(module):
        if isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{each.name}" for each in node.names)


def silent(root: Path) -> list[str]:
    """Those that others import, and that do not say what they are."""
    parsed = modules(root)
    used = {name for module in parsed.values() for name in imported(module)}
    return [
        each.name
        for name, module in parsed.items()
        for each in defined(name, module)
        if each.name in used and not each.says and not {name, each.name} & OF_THE_API
    ]


def test_what_others_import_says_what_it_is() -> None:
    assert silent(ROOT) == []


@pytest.mark.parametrize(("docstring", "expected"), [("", ["serve_app.one.asked"]), ('"""A number."""', [])])
def test_what_does_not_is_named(tmp_path: Path, docstring: str, expected: list[str]) -> None:
    (tmp_path / "serve_app").mkdir()
    (tmp_path / "serve_app/one.py").write_text(f"def asked() -> int:\n    {docstring}\n    return 1\n")
    (tmp_path / "serve_app/two.py").write_text("from serve_app.one import asked\n")
    assert silent(tmp_path) == expected
