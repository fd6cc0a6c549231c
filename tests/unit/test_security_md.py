"""SECURITY.md promises nothing, and says no cap, without a test."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("section", ["What is promised", "Memory caps"])
def test_every_promise_and_every_cap_names_a_test_that_exists(section: str) -> None:
    text = (ROOT / "SECURITY.md").read_text()
    rows = [line for line in text.split(f"## {section}")[1].split("## ")[0].splitlines() if line.startswith("| ")][2:]
    assert len(rows) >= 10
    for row in rows:
        named = re.search(r"`(tests/[\w/]+\.py)::(test_\w+)` \|$", row)
        assert named is not None, row
        tree = ast.parse((ROOT / named[1]).read_text())
        names = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
        assert named[2] in names, row
