"""How a command speaks: progress and errors on stderr, answers on stdout."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.console import Console

console = Console(stderr=True, highlight=False)

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


def say(message: str) -> None:
    """Progress. Rich's markup is understood; what is not ours is escaped by the caller."""
    console.print(f"[dim]kvcache[/dim] {message}", soft_wrap=True)  # a path in it can be copied


def print_json(answer: Any) -> None:
    """Print the answer as JSON, indented, on stdout."""
    print(json.dumps(answer, indent=2))
