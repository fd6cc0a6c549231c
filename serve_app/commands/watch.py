"""`kvcache score`, `explain`, `receipts`, `top`: what the routers see, and what they have decided."""

from __future__ import annotations

import json
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from serve_app.commands.asking import UrlOption, ask, endpoint, get
from serve_app.commands.console import JsonOption, console, print_json
from serve_app.errors import ConfigError

_COLUMNS = ("request", "replica", "outcome", "prompt", "predicted", "cached", "queued", "prefill")
_ALL = 1000  # receipts that there are at most
_PERIOD_S = 1.0


def score(url: UrlOption = "") -> None:
    """Read an OpenAI request from stdin, and print the score of every replica, as JSON."""
    status, answer = ask("PUT", endpoint(url, "score"), content=sys.stdin.buffer.read())
    print(json.dumps(answer, indent=2))
    if status >= 400:
        raise typer.Exit(1)


def receipts(
    count: Annotated[int, typer.Option(min=1, max=_ALL, help="How many, newest first.")] = 20,
    follow: Annotated[bool, typer.Option("--follow", help="Go on with new ones as they come, until Ctrl-C.")] = False,
    url: UrlOption = "",
    as_json: JsonOption = False,
) -> None:
    """Show the routers' last decisions: who got the request and why, and what the engine took from its cache."""
    where = endpoint(url, "receipts")
    if follow:
        try:
            for one in new_receipts(where, count):
                print(json.dumps(one) if as_json else _line(one), flush=True)
        except KeyboardInterrupt:
            return
    answer = get(where, limit=count)
    if as_json:
        print_json(answer)
    else:
        Console().print(_table(answer))


def new_receipts(where: str, count: int, period_s: float = _PERIOD_S) -> Iterator[dict[str, Any]]:
    """The last `count`, oldest first, and for ever those that come. What does not answer is asked again.

    Raises:
        ConfigError: it did not answer at the beginning.
    """
    last = get(where, limit=_ALL)
    seen = deque((_name(one) for one in reversed(last)), maxlen=2 * _ALL)
    yield from reversed(last[:count])
    while True:
        time.sleep(period_s)
        try:
            answer = get(where, limit=_ALL)
        except ConfigError as error:
            console.print(f"{error}", style="red", markup=False)
            continue
        for one in reversed(answer):
            if _name(one) not in seen:
                seen.append(_name(one))
                yield one


def _name(one: dict[str, Any]) -> tuple[str, float]:
    """A client may give several requests the same id."""
    return one["request_id"], one["at_s"]


def explain(
    request_id: Annotated[str, typer.Argument(help="`x-request-id` of a request, or the `id` of its answer.")] = "",
    file: Annotated[Path | None, typer.Option("--file", "-f", help="A request that was not sent; - is stdin.")] = None,
    url: UrlOption = "",
    as_json: JsonOption = False,
) -> None:
    """Say why a request went where it went; with -f, where it would go now."""
    if bool(request_id) == (file is not None):
        raise ConfigError("give the id of a request, or -f FILE with a body: `kvcache receipts` lists the last ids")
    answer = _would(file, url) if file is not None else _was(request_id, url)
    if as_json:
        print_json(answer)
        return
    out = Console(highlight=False)
    for line in answer["says"]:
        out.print(line, markup=False)
    out.print(_replicas(answer["replicas"]))


def _was(request_id: str, url: str) -> dict[str, Any]:
    """Raises:
    ConfigError: there is no receipt of it.
    """
    for one in get(endpoint(url, "receipts"), limit=_ALL):
        if _is_of(one["request_id"], request_id):
            says = [f"{one['chosen']} got it: {one['outcome']}, {one['reason']}"]
            if refused := one.get("refused_by"):
                says.append(f"{refused} was the first choice, and did not take it")
            says.append(
                f"{one.get('predicted_cached_tokens', 0)} of {one.get('prompt_tokens', '?')} prompt tokens predicted "
                "from the cache"
            )
            if incomplete := one.get("incomplete"):
                says.append(f"the prompt was known in part only ({incomplete})")
            if actual := one.get("actual"):
                says.append(
                    f"the engine took {actual['cached_tokens']}, queued it {actual['queued_s']:.3f} s and computed the "
                    f"rest in {actual['prefill_s']:.3f} s"
                )
            return {"says": says, "replicas": one.get("replicas", {}), "receipt": one}
    raise ConfigError(
        f"there is no receipt of {request_id!r} among the last {_ALL}: it is written when the engine has told of the "
        "request; `kvcache receipts` lists those that there are"
    )


def _is_of(known: str, given: str) -> bool:
    """Whether an id that a client sees is this request's: `chatcmpl-ID`, `cmpl-ID-0`, and the ID itself."""
    return given == known or given.partition("-")[2] in {known, f"{known}-0"}


def _would(file: Path, url: str) -> dict[str, Any]:
    try:
        body = sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()
        asked = {**json.loads(body), "strategy": "expected_ttft"}
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{file} is not an OpenAI request as JSON ({error})") from error
    status, answer = ask("POST", endpoint(url, "explain"), json=asked)
    if status == 404:  # the graph chooses nothing, and so explains no choice; it scores
        status, answer = ask("PUT", endpoint(url, "score"), json=asked)
    if status >= 400:
        raise ConfigError(f"{answer['error']['message']}" if "error" in answer else json.dumps(answer))
    score = answer.get("score", answer)
    says = [f"{score['prompt_tokens']} prompt tokens, blocks of {score['block_size']}"]
    best = max(score["scores"], key=score["scores"].__getitem__, default="")
    if "outcome" in answer:
        says.append(f"{answer['ranked'][0]} would get it: {answer['outcome']}, {answer['reason']}")
    elif best:
        says.append(f"{best} would cost least")
    return {"says": says, "replicas": score["pods"], "answer": answer}


def _replicas(replicas: dict[str, dict[str, Any]]) -> Table:
    """Matches and cost of each, cheapest first; seconds."""
    terms = list(dict.fromkeys(name for one in replicas.values() for name in one.get("cost_s") or ()))
    table = Table("replica", "trust", "matched", *terms, "sum")
    for name, one in sorted(replicas.items(), key=lambda item: sum((item[1].get("cost_s") or {}).values())):
        matched = ", ".join(f"{tier} {tokens}" for tier, tokens in one["matched_tokens"].items()) or "0"
        costs = one.get("cost_s") or {}
        shown = (f"{costs.get(term, 0):.3f}" for term in terms)
        table.add_row(name, one.get("trust", "exact"), matched, *shown, f"{sum(costs.values()):.3f}")
    return table


def top(
    url: UrlOption = "",
    every: Annotated[float, typer.Option(min=0.2, help="Seconds between two looks.")] = 1.0,
    as_json: JsonOption = False,
) -> None:
    """Show the replicas live: blocks, load, trust, requests and cached share. Ctrl-C ends it; --json looks once."""
    if as_json:
        print_json(look(url))
        return
    out = Console()
    if not out.is_terminal:
        out.print(_top(look(url)))
        return
    from rich.live import Live

    try:
        with Live(_top(look(url)), console=out, screen=True, auto_refresh=False) as live:
            while True:
                time.sleep(every)
                try:
                    live.update(_top(look(url)), refresh=True)
                except ConfigError as error:
                    live.update(str(error), refresh=True)
    except KeyboardInterrupt:
        return


def look(url: str) -> dict[str, Any]:
    """Each pod, and of its last requests how many there were and what share of their prompts was cached."""
    pods, last = get(endpoint(url, "pods")), get(endpoint(url, "receipts"), limit=_ALL)
    for pod in pods["pods"]:
        told = [one["actual"] for one in last if one["chosen"] == pod["pod"] and one.get("actual")]
        prompt = sum(one["prompt_tokens"] for one in told)
        pod["recent_requests"] = sum(1 for one in last if one["chosen"] == pod["pod"])
        pod["recent_cached_share"] = sum(one["cached_tokens"] for one in told) / prompt if prompt else None
    return {**pods, "recent_requests": len(last)}


def _top(seen: dict[str, Any]) -> Table:
    title = f"{seen['model']}: index {seen['stale_for_s']:.1f} s old, {seen['recent_requests']} requests looked at"
    table = Table("replica", "live", "trust", "blocks", "of", "in flight", "requests", "cached", title=title)
    for pod in seen["pods"]:
        share = pod["recent_cached_share"]
        table.add_row(
            pod["pod"],
            "yes" if pod["live"] else "[red]no[/red]",
            pod["trust"] if pod["trust"] == "exact" else f"[red]{pod['trust']}[/red]",
            *("?" if pod[name] is None else str(pod[name]) for name in ("blocks", "capacity", "in_flight")),
            str(pod["recent_requests"]),
            "?" if share is None else f"{share:.0%}",
        )
    return table


def _line(one: dict[str, Any]) -> str:
    told = " ".join(f"{name}={value}" for name, value in zip(_COLUMNS[3:], _row(one)[3:], strict=True))
    at = time.strftime("%H:%M:%S", time.localtime(one["at_s"]))
    return f"{at} {one['request_id']} -> {one['chosen']}  {_row(one)[2]}  {told}"


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
