"""`kvcache bench`: load at one OpenAI API, or the same at two."""

from __future__ import annotations

import random
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from serve_app.commands.console import JsonOption, print_json, say
from serve_app.errors import ConfigError


def bench(
    url: Annotated[str, typer.Argument(help="An OpenAI API, e.g. http://127.0.0.1:8000.")],
    url_b: Annotated[str, typer.Argument(help="Another one, for the same requests after that.")] = "",
    model: Annotated[str, typer.Option(help="Default: the first that the API lists.")] = "",
    key: Annotated[str, typer.Option(help="API key.", envvar="OPENAI_API_KEY", show_default=False)] = "",
    conversations: Annotated[int, typer.Option(min=1, help="So many at once.")] = 8,
    turns: Annotated[int, typer.Option(min=1, help="Questions in each.")] = 4,
    tokens: Annotated[int, typer.Option(min=16, help="About this many at a conversation's beginning.")] = 1500,
    answer_tokens: Annotated[int, typer.Option(min=1, help="At most so many in an answer.")] = 32,
    seed: Annotated[int | None, typer.Option(help="Of the texts; default: new ones, which no cache has.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Send growing conversations, and print time to first token and the share of prompts that came from a cache."""
    from serve_app.bench import Load, compare

    load = Load(conversations, turns, tokens, answer_tokens, random.getrandbits(32) if seed is None else seed)
    urls = [each for each in (url, url_b) if each]
    say(f"{load.requests} requests to {' and then to '.join(urls)}")
    results = compare(urls, model, key, load)
    summaries = [result.summary() for result in results]
    if as_json:
        print_json({"seed": load.seed, "results": summaries})
    else:
        _print(summaries)
    for result in results:
        if result.failed:
            raise ConfigError(
                f"{len(result.failed)} requests to {result.url} failed, the first one: {result.failed[0]}"
            )


def _print(summaries: list[dict[str, Any]]) -> None:
    table = Table("URL", "mean TTFT", "p50", "p90", "cached tokens", "requests", "failed")
    for one in summaries:
        times = (_seconds(one[name]) for name in ("mean_ttft_s", "p50_ttft_s", "p90_ttft_s"))
        share = "not told" if one["cached_share"] is None else f"{one['cached_share']:.0%}"
        table.add_row(one["url"], *times, share, str(one["requests"]), str(one["failed"]))
    out = Console(highlight=False)
    out.print(table)
    if any(one["cached_share"] is None for one in summaries):
        out.print("vLLM tells of cached tokens with --enable-prompt-tokens-details")
    if len(summaries) == 2 and all(one["mean_ttft_s"] for one in summaries):
        first, second = (one["mean_ttft_s"] for one in summaries)
        out.print(f"mean time to first token: the second's is [bold]{second / first:.2f}x[/bold] the first's")


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f} s"
