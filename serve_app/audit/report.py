"""All requests of an audit as one result: shares, quantiles and groups, as JSON and as a table.

Errors are in blocks, signed: more than zero, too much was predicted (a request goes where its prefix is not); less than
zero, too little (a replica that has it is passed over).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from serve_app.audit.probe import Compared, Skipped

TOLERANCE_BLOCKS = 1
SHOWN_MISSES = 10
_GAPS_S = (0.005, 0.02, 0.1)  # edges of the groups by time since the answer before

Key = Callable[[Compared], str]


def _gap(compared: Compared) -> str:
    edge = next((edge for edge in _GAPS_S if compared.since_answer_s < edge), None)
    return f"{_GAPS_S[-1] * 1000:.0f} ms or more" if edge is None else f"under {edge * 1000:.0f} ms"


# By what the requests are told apart: name in the JSON -> words in the table, and the group of one request.
GROUPS: dict[str, tuple[str, Key]] = {
    "tiers": ("predicted from", lambda compared: compared.tiers),
    "replica": ("answered by", lambda compared: compared.replica),
    "since_last_answer": ("after the last answer", _gap),
    "kind": ("kind of request", lambda compared: compared.kind),
}


def is_miss(compared: Compared) -> bool:
    """Whether prediction and answer differ by more than TOLERANCE_BLOCKS blocks."""
    return abs(compared.error_blocks) > TOLERANCE_BLOCKS


def summarize(compared: Sequence[Compared]) -> dict[str, Any]:
    """Distribution of the error of some requests; there must be one."""
    errors = sorted(one.error_blocks for one in compared)
    count = len(compared)
    return {
        "requests": count,
        "exact": _share(sum(one.predicted_tokens == one.actual_tokens for one in compared), count),
        "within_one_block": _share(sum(not is_miss(one) for one in compared), count),
        "over_predicted": sum(error > 0 for error in errors),
        "under_predicted": sum(error < 0 for error in errors),
        "error_blocks": {f"p{percent}": _quantile(errors, percent) for percent in (0, 1, 5, 50, 95, 99, 100)},
    }


def result(compared: Sequence[Compared], skipped: Sequence[Skipped]) -> dict[str, Any]:
    """Everything, as it goes into audit.json; without `within_one_block`, nothing could be compared."""
    return {
        **(summarize(compared) if compared else {"requests": 0}),
        "skipped": dict(Counter(one.reason for one in skipped)),
        "traffic": _traffic(compared),
        "groups": {
            name: {group: summarize(members) for group, members in _grouped(compared, key).items()}
            for name, (_, key) in GROUPS.items()
        },
        "misses": [{"number": one.number, "reason": explain(one)} for one in compared if is_miss(one)],
        "compared": [asdict(one) for one in compared],
    }


def explain(miss: Compared) -> str:
    """What a miss looks like, in words."""
    if miss.scored_prompt_tokens != miss.prompt_tokens:
        return f"the prompt is {miss.scored_prompt_tokens} tokens here and {miss.prompt_tokens} at the engine"
    if miss.error_blocks > 0:
        return "the index believed in blocks that the engine did not have"
    return (
        f"the engine had blocks that the index did not know {miss.since_answer_s * 1000:.0f} ms after the last answer"
    )


def print_result(summary: dict[str, Any], console: Console) -> None:
    """Print the summary that `result` made."""
    if not summary["requests"]:
        console.print("[red]nothing could be compared[/red]")
    else:
        _print_distribution(summary, console)
    for reason, count in summary["skipped"].items():
        console.print(f"not compared: {count}, {reason}")
    traffic = summary["traffic"]
    console.print(
        f"{traffic['cached_tokens']} of {traffic['prompt_tokens']} prompt tokens were cached; "
        f"{traffic['evicted']} requests met evictions, {traffic['into_answers']} hit blocks of earlier answers"
    )
    by_number = {one["number"]: one for one in summary["compared"]}
    for miss in summary["misses"][:SHOWN_MISSES]:
        one = by_number[miss["number"]]
        console.print(
            f"miss: request {one['number']} ({one['kind']}) at {one['replica']}: predicted {one['predicted']}, "
            f"actual {one['actual_tokens']} of {one['prompt_tokens']}: {miss['reason']}"
        )


def _print_distribution(summary: dict[str, Any], console: Console) -> None:
    columns = ("n", "exact", "within 1", "over", "under", "p1", "p50", "p99", "worst")
    table = Table("error in blocks", *columns, box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    table.columns[0].no_wrap = True
    for column in table.columns[1:]:
        column.justify = "right"
    table.add_row("[bold]all requests[/bold]", *_cells(summary))
    for name, (words, _) in GROUPS.items():
        table.add_section()
        table.add_row(f"[dim]{words}[/dim]")
        for group in sorted(summary["groups"][name]):
            table.add_row(f"  {group}", *_cells(summary["groups"][name][group]))
    console.print(table)


def _cells(summary: dict[str, Any]) -> Iterable[str]:
    errors = summary["error_blocks"]
    yield str(summary["requests"])
    yield _percent(summary["exact"])
    yield _percent(summary["within_one_block"])
    yield str(summary["over_predicted"])
    yield str(summary["under_predicted"])
    for quantile in ("p1", "p50", "p99"):
        yield f"{errors[quantile]:+d}"
    yield f"{max(errors['p0'], errors['p100'], key=abs):+d}"


def _percent(share: float) -> str:
    return f"{share:.0%}" if share in {0, 1} else f"{share:.1%}"


def _traffic(compared: Sequence[Compared]) -> dict[str, int]:
    """Whether the audit had anything to find: hits, evictions, and hits in blocks that an answer filled."""
    return {
        "prompt_tokens": sum(one.prompt_tokens for one in compared),
        "cached_tokens": sum(one.actual_tokens for one in compared),
        "evicted": sum(_was_evicted(one) for one in compared),
        "into_answers": sum(0 < one.earlier_tokens < one.actual_tokens for one in compared),
    }


def _was_evicted(one: Compared) -> bool:
    """Less than the replica once had of this conversation (of its prompts that are no longer than this one)."""
    return 0 < one.earlier_tokens <= one.prompt_tokens and one.actual_tokens <= one.earlier_tokens - 2 * one.block_size


def _grouped(compared: Sequence[Compared], key: Key) -> dict[str, list[Compared]]:
    groups: dict[str, list[Compared]] = {}
    for one in compared:
        groups.setdefault(key(one), []).append(one)
    return groups


def _quantile(ordered: Sequence[int], percent: int) -> int:
    """Nearest rank."""
    return ordered[min(len(ordered) - 1, max(0, -(-len(ordered) * percent // 100) - 1))]


def _share(part: int, whole: int) -> float:
    return round(part / whole, 4)
