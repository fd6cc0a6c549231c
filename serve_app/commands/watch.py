"""`kvcache score`, `receipts`: what the routers see, and what they have decided."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from serve_app.commands.asking import UrlOption, ask, endpoint, get
from serve_app.commands.console import JsonOption, print_json

_COLUMNS = ("request", "replica", "outcome", "prompt", "predicted", "cached", "queued", "prefill")


def score(url: UrlOption = "") -> None:
    """Read an OpenAI request from stdin, and print the score of every replica, as JSON."""
    status, answer = ask("PUT", endpoint(url, "score"), content=sys.stdin.buffer.read())
    print(json.dumps(answer, indent=2))
    if status >= 400:
        raise typer.Exit(1)


def receipts(
    count: Annotated[int, typer.Option(min=1, max=1000, help="How many, newest first.")] = 20,
    url: UrlOption = "",
    as_json: JsonOption = False,
) -> None:
    """Show the routers' last decisions: who got the request and why, and what the engine took from its cache."""
    answer = get(endpoint(url, "receipts"), limit=count)
    if as_json:
        print_json(answer)
    else:
        Console().print(_table(answer))


def _table(receipts: Sequence[dict[str, Any]]) -> Table:
    table = Table(*_COLUMNS)
    for one in receipts:
        table.add_row(*_row(one))
    return table


def _row(one: dict[str, Any]) -> tuple[str, ...]:
    actual = one.get("actual")
    told = (
        (str(actual["cached_tokens"]), f"{actual['queued_s']:.3f} s", f"{actual['prefill_s']:.3f} s")
        if actual
        else ("?", "?", "?")
    )
    return (
        one["request_id"],
        one["chosen"],
        f"{one['outcome']}: {one['reason']}",
        str(one.get("prompt_tokens", "?")),
        str(one.get("predicted_cached_tokens", 0)),
        *told,
    )
