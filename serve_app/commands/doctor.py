"""`kvcache doctor`: what is misconfigured, and what to do about it."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from serve_app.commands.configs import find, load_config
from serve_app.commands.console import JsonOption, print_json

if TYPE_CHECKING:
    from serve_app.doctor.facts import Finding

_COLOURS = {"ok": "green", "unknown": "dim", "warning": "yellow", "error": "red"}


def doctor(
    config: Annotated[
        str, typer.Argument(help="A Serve YAML or a name of `kvcache config list`; default: what `kvcache up` runs.")
    ] = "",
    redis: Annotated[
        str, typer.Option(help="Redis to look at; default: the config's.", envvar="KVCACHE_REDIS_URL")
    ] = "",
    model: Annotated[str, typer.Option(help="Look at this model only.")] = "",
    engine: Annotated[list[str] | None, typer.Option(help="URL of a vLLM server to ask. Repeatable.")] = None,
    api_key: Annotated[str, typer.Option(help="vLLM's --api-key.", envvar="VLLM_API_KEY", show_default=False)] = "",
    as_json: JsonOption = False,
) -> None:
    """Say what is misconfigured: what was seen, what it means, what to do. Exit status 1: something is an error."""
    from serve_app.doctor.checks import examine
    from serve_app.doctor.facts import Level
    from serve_app.doctor.gather import gather, redis_of

    loaded = _config(config)
    findings = examine(gather(loaded, redis or redis_of(loaded), model, engine or (), api_key))
    if as_json:
        print_json([finding._asdict() for finding in findings])
    else:
        _print(findings)
    if any(finding.level is Level.ERROR for finding in findings):
        raise typer.Exit(1)


def _config(name: str) -> dict[str, Any] | None:
    from serve_app import local_stack

    if name:
        return load_config(find(name))
    return load_config(local_stack.config_file()) if local_stack.current() is not None else None


def _print(findings: list[Finding]) -> None:
    out = Console(highlight=False, soft_wrap=True)
    for _, alike in groupby(findings, key=lambda finding: finding[1:]):
        finding, *others = alike
        colour, names = _COLOURS[finding.level], ", ".join(one.check for one in (finding, *others))
        out.print(f"[{colour}]{finding.level:<8}[/{colour}] [bold]{names}[/bold]: {escape(finding.saw)}")
        if finding.means:
            out.print(f"         {escape(finding.means)}")
        if finding.do:
            out.print(f"         [cyan]do:[/cyan] {escape(finding.do)}")
