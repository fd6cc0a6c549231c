"""`kvcache up`, `down`, `status`: a gateway on this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from serve_app.commands.configs import find, load_config
from serve_app.commands.console import JsonOption, print_json, say
from serve_app.errors import ConfigError
from serve_app.extras import require_module

if TYPE_CHECKING:
    from serve_app.local_stack import Running

PortOption = Annotated[int | None, typer.Option(min=1, max=65535, help="HTTP port, instead of the config's.")]
DirectOption = Annotated[bool, typer.Option(help="Stream straight from the replicas, through HAProxy.")]


def up(
    name: Annotated[
        str, typer.Argument(metavar="CONFIG", help="A Serve YAML, by path; or a name of `kvcache config list`.")
    ] = "",
    config: Annotated[str, typer.Option("--config", "-c", help="The same.", hidden=True)] = "",
    port: PortOption = None,
    direct: DirectOption = True,
) -> None:
    """Start Ray Serve with a config in the background, and wait until it serves."""
    from serve_app import local_stack

    require_module("ray", "kvcache up", "serve")
    if name and config:
        raise ConfigError("the config is given twice: leave --config away")
    running = local_stack.current()
    if running is not None:
        say(f"already running: {running.url} ({running.config}, pid {running.pid}); `kvcache down` stops it")
        return
    chosen = name or config or "quickstart"
    settings = load_config(find(chosen), port)
    say(f"starting {chosen}")
    running = local_stack.start(settings, direct=direct, on_progress=say, name=chosen)
    apis = "  ".join(f"{running.url}{prefix}/v1" for prefix in running.openai)
    score = f"   score API: {running.url}{running.graph}/v1/score" if running.graph is not None else ""
    say(f"[green]serving[/green] {apis or running.url}{score}")
    say(f"log: {running.log}   stop: kvcache down")


def down() -> None:
    """Stop what `kvcache up` started."""
    from serve_app import local_stack

    running = local_stack.last()
    left = local_stack.orphans(running)
    if running is None and not left:
        say("nothing is running; `kvcache up` starts a gateway")
        return
    if running is not None:
        if running.process() is None:
            say(f"the server (pid {running.pid}) has ended by itself; its log: {running.log}")
        local_stack.stop(running, on_progress=say)
    local_stack.end(left, on_progress=say)
    say("stopped")


def status(as_json: JsonOption = False) -> None:
    """Show what is running and what the index knows of every replica. Exit status 1: nothing runs."""
    from serve_app import local_stack

    running = local_stack.last()
    if running is None or running.process() is None:
        if as_json:
            print_json({"running": False, "left": [orphan.pid for orphan in local_stack.orphans(None)]})
        _say_what_is_left(running)
        raise typer.Exit(1)
    known = local_stack.describe(running)
    if as_json:
        about = {"running": True, "url": running.url, "config": running.config, "pid": running.pid, "log": running.log}
        print_json({**about, "index": known})
        return
    say(f"{running.url} ({running.config}, pid {running.pid}), log {running.log}")
    if known is None:
        say("the index does not answer (yet)")
        return
    Console().print(_holders(known))
    _remarks(known)


def _say_what_is_left(running: Running | None) -> None:
    from serve_app import local_stack

    if running is not None:
        say(f"the server (pid {running.pid}) has ended by itself; its log: {running.log}")
    left = local_stack.orphans(None)
    if left:
        say(f"{len(left)} of its processes are left: `kvcache down` ends them")
    if running is None and not left:
        say("nothing is running; `kvcache up` starts it")


def _holders(known: dict[str, Any]) -> Table:
    table = Table("replica", "live", "trust", "blocks", "in flight", "KV events", "lost", "skipped")
    for pod in known["pods"]:
        skipped = ", ".join(f"{reason} {count}" for reason, count in (pod["events_skipped"] or {}).items())
        table.add_row(
            pod["pod"],
            "yes" if pod["live"] else "[red]no[/red]",
            pod["trust"] if pod["trust"] == "exact" else f"[red]{pod['trust']}[/red]",
            *(str(pod[name]) for name in ("blocks", "in_flight", "events_applied", "events_lost")),
            skipped or "0",
        )
    for shared in known["shared"]:
        table.add_row(
            shared["domain"],
            "yes" if shared["live"] else "[red]no[/red]",
            "",
            str(shared["blocks"]),
            "",
            str(shared["events_applied"]),
            str(shared["events_lost"]),
            ", ".join(f"{reason} {count}" for reason, count in (shared["events_skipped"] or {}).items()) or "0",
        )
    return table


def _remarks(known: dict[str, Any]) -> None:
    for pod in known["pods"]:
        if pod["cause"]:
            say(f"[red]{pod['pod']} is not exact[/red]: {pod['cause']}")
        for tier, why in pod["unindexed"].items():
            say(f"{pod['pod']}: tier {tier} is not in the index: {why}")
    for one in known["left_out"]:
        say(f"[red]left out[/red] of {one['sender']}: {one['reason']}, {one['count']} times (the log says more)")
