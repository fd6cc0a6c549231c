"""The documents name all that there is to set, call and watch; what is generated is new; links lead somewhere."""

from __future__ import annotations

import importlib.util
import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer
import yaml
from pydantic import BaseModel

from serve_app import config, limits
from serve_app.cli import app
from serve_app.index.keyspace import Keyspace
from serve_app.metric_table import TABLE
from serve_app.service import config as service_config
from serve_app.service import discovery
from serve_app.types import DomainId, Epoch, ModelId, Tier

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *DOCS.rglob("*.md"),
        *(ROOT / ".github").rglob("*.md"),
        *(ROOT / "cluster").glob("*.md"),
        *(ROOT / "examples").rglob("*.md"),
    ]
)
_FENCE = re.compile(r"^ *```.*?^ *```", re.MULTILINE | re.DOTALL)
_TARGET = re.compile(r"\]\(([^()\s]+)\)|(?:src|srcset|href)=\"([^\"]+)\"")
_REASON = re.compile(r"PromptError\(\s*\"(\w+)\"")


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / f"scripts/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


REFERENCE = script("reference")
SITE = script("site_pages")


def test_generated_pages_are_up_to_date() -> None:
    written: dict[Path, str] = REFERENCE.files()
    assert [str(path) for path, text in written.items() if path.read_text() != text] == [], "run: make docs"
    assert set(REFERENCE.FOLDER.glob("*.md")) - set(written) == {
        REFERENCE.FOLDER / "redis.md",
        REFERENCE.FOLDER / "requests.md",
    }


def section(page: str, heading: str) -> str:
    """Of a page of docs/reference: from a heading to the next."""
    text = (REFERENCE.FOLDER / f"{page}.md").read_text()
    found = re.search(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#|\Z)", text, re.MULTILINE | re.DOTALL)
    assert found is not None, f"{page}.md has no {heading!r}; run: make docs"
    return found[1]


def settings() -> Iterator[type[BaseModel]]:
    for module in (config, limits, service_config, discovery):
        for name, value in vars(module).items():
            is_here = inspect.isclass(value) and issubclass(value, BaseModel) and value.__module__ == module.__name__
            if is_here and not name.startswith("_") and value is not config.IndexSettings:  # a base of others
                yield value


@pytest.mark.parametrize("model", [*settings()], ids=lambda model: model.__name__)
def test_every_setting_is_in_the_reference(model: type[BaseModel]) -> None:
    documented = section("config", model.__name__)
    assert [name for name in model.model_fields if f"| `{name}` |" not in documented] == []


def commands(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Of click, which typer has in itself."""
    yield name, command
    for sub_name, sub in getattr(command, "commands", {}).items():
        yield from commands(sub, f"{name} {sub_name}")


COMMANDS = dict(commands(typer.main.get_command(app), "kvcache"))


def test_there_are_commands() -> None:
    assert {"kvcache up", "kvcache publish", "kvcache serve-scores", "kvcache config copy"} <= COMMANDS.keys()


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_and_option_is_in_the_reference(name: str) -> None:
    documented = section("cli", "Command line" if name == "kvcache" else f"`{name}`")
    shown = [each for each in COMMANDS[name].params if not getattr(each, "hidden", False)]
    options = [option for each in shown for option in each.opts if option.startswith("--")]
    assert [option for option in options if not re.search(rf"{option}\b", documented)] == []


def test_every_metric_is_in_the_reference() -> None:
    documented = (DOCS / "metrics.md").read_text()
    assert [metric.name for metric in TABLE if f"| `{metric.name}` |" not in documented] == []


def test_every_path_of_the_service_is_in_the_reference() -> None:
    paths = set(re.findall(r'Route\("(/[^"]+)"', (ROOT / "serve_app/service/http.py").read_text()))
    assert "/v1/score" in paths
    documented = (REFERENCE.FOLDER / "http.md").read_text()
    assert {path for path in paths if f"`{path}`" not in documented} == {"/health"}  # another name of /healthz


def test_every_key_in_redis_is_in_the_reference() -> None:
    keys = Keyspace(ModelId("m"))
    names = [*vars(keys).values(), keys.lease(DomainId("<domain>"))]
    names.append(keys.blocks(DomainId("<domain>"), Epoch(7), Tier("<tier>")).replace(":7:", ":<epoch>:"))
    documented = (REFERENCE.FOLDER / "redis.md").read_text()
    assert [name for name in names if name != "kv:{m}" and f"`{name}`" not in documented] == []


def test_every_reason_of_a_fallback_is_explained() -> None:
    sources = [path.read_text() for path in (ROOT / "serve_app").rglob("*.py")]
    reasons = {reason for text in sources for reason in _REASON.findall(text)} | {"deadline", "no_index"}
    documented = (DOCS / "operations/failures.md").read_text()
    assert {reason for reason in reasons if f"`{reason}`" not in documented and not reason.startswith("bad_")} == set()


def anchors(page: Path) -> set[str]:
    """As code hosts and the site make them of headings."""
    found: list[str] = []
    for heading in re.findall(r"^#{1,6} (.+)$", _FENCE.sub("", page.read_text()), re.MULTILINE):
        text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
        found.append(re.sub(r"[^\w\- ]", "", text).strip().replace(" ", "-"))
    return set(found)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    dead = []
    for found in _TARGET.finditer(_FENCE.sub("", page.read_text())):
        target = found[1] or found[2]
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors(file)):
            dead.append(target)
    assert dead == []


FILES = [
    str(path.relative_to(ROOT))
    for folder in ("serve_app", "tests", "benchmarks", "scripts", "configs", "cluster", "examples", ".ci", "docs")
    for path in (ROOT / folder).rglob("*.*")
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_are_named_exist(page: Path) -> None:
    """Whole paths, or their ends: `routing/costs.py`."""
    named = set(re.findall(r"`([\w./-]+\.(?:py|proto|sh|acl|conf))(?:::\w+)?`", page.read_text()))
    assert [name for name in sorted(named) if not any(f"/{file}".endswith(f"/{name}") for file in FILES)] == []


def test_make_targets_that_are_named_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    here = [page for page in PAGES if not page.is_relative_to(ROOT / "examples")]  # one has a Makefile of its own
    named = {target for page in here for target in re.findall(r"`make ([a-z-]+)", page.read_text())}
    assert named - targets == {"run"}  # of examples/envoy-gateway


def test_the_site_has_every_page_once() -> None:
    listed = re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted([*(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")), *SITE.ELSEWHERE])


@pytest.mark.parametrize(
    ("page", "link", "in_the_site"),
    [
        ("how-to/tune.md", "[a](../metrics.md#x)", "[a](../metrics.md#x)"),
        ("how-to/tune.md", "[a](../../SECURITY.md)", "[a](../security.md)"),
        ("how-to/tune.md", "[a](../../README.md)", "[a](../index.md)"),
        ("security.md", "[a](docs/metrics.md)", "[a](metrics.md)"),
        (
            "cluster.md",
            "[a](#kubernetes) [b](https://example.com/x.md)",
            "[a](#kubernetes) [b](https://example.com/x.md)",
        ),
        ("how-to/tune.md", "[`gpu.yaml`](../../configs/gpu.yaml)", "`gpu.yaml` (`configs/gpu.yaml`)"),
        (
            "index.md",
            "```\n[a](../SECURITY.md)\n```\n[b](../SECURITY.md)",
            "```\n[a](../SECURITY.md)\n```\n[b](security.md)",
        ),
    ],
)
def test_a_link_is_right_in_the_site_too(page: str, link: str, in_the_site: str) -> None:
    assert SITE.within_the_site(link, page) == in_the_site


def test_what_is_no_page_is_in_the_repository() -> None:
    linked = SITE.within_the_site("[a](../configs/gpu.yaml)", "index.md", "https://example.com/kvcache/")
    assert linked == "[a](https://example.com/kvcache/blob/main/configs/gpu.yaml)"


README = (ROOT / "README.md").read_text()


def test_the_readme_is_short_and_names_the_two_commands() -> None:
    assert len(README.splitlines()) <= 120
    (block,) = (block for block in _FENCE.findall(README) if "make demo" in block)
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert re.findall(r"^make (\S+)", block, re.MULTILINE) == ["demo", "test"]
    assert {"demo", "test", "check", "site", "docs"} <= targets


def test_the_readmes_demo_is_the_committed_run() -> None:
    result = json.loads((ROOT / "benchmarks/results/demo.json").read_text())
    for routing in ("round_robin", "kv_aware"):
        run = result[routing]
        times = " | ".join(f"{run[f'{what}_ttft_s']:.2f} s" for what in ("mean", "p50", "p90"))
        spread = " / ".join(map(str, run["requests_per_replica"].values()))
        row = f"| {routing} | {times} | {run['cached_token_share']:.0%} | {spread} |"
        assert row in README
        assert row in (DOCS / "benchmarks.md").read_text()


def result(name: str) -> Any:
    return json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())


def test_the_readmes_figures_are_those_of_the_committed_runs() -> None:
    last = {policy: run["stages"][-1] for policy, run in result("fleet")["workloads"]["llmd-73"]["mean"].items()}
    sessions = {
        size: {
            name: run["overall"]
            for name, run in result(f"fleet_agents_{size}")["workloads"]["agents-claude-code"]["mean"].items()
        }
        for size in ("307k", "461k")
    }
    bypass = {row["system"]: row["cached_share"] for row in result("real")["rows"] if row["scenario"] == "bypass"}
    audit, faults, soak = result("audit"), result("chaos")["faults"], result("soak")
    rows = [
        (
            f"TTFT p90 | **{last['ours']['ttft_p90_s']:.2f} s** | round robin "
            f"{last['round_robin']['ttft_p90_s']:.0f} s, "
            f"consistent hash {last['consistent_hash']['ttft_p90_s']:.0f} s, "
            f"Ray's prefix router {last['prefix_cache_affinity']['ttft_p90_s']:.2f} s |"
        ),
        (
            f"output tokens/s | **{last['ours']['output_tokens_per_s']:,.0f}** | "
            f"round robin {last['round_robin']['output_tokens_per_s']:,.0f}, "
            f"Ray's prefix router {last['prefix_cache_affinity']['output_tokens_per_s']:,.0f} |"
        ),
        *(
            f"| **{runs['ours']['ttft_mean_s']:.2f} s** | llm-d's scorers {runs['llmd']['ttft_mean_s']:.2f} s, "
            f"Dynamo's formula {runs['dynamo']['ttft_mean_s']:.2f} s |"
            for runs in sessions.values()
        ),
        (
            f"| **{bypass['kv_aware']:.2f}** | Ray's prefix router {bypass['ray_prefix']:.2f}, vllm-router "
            f"{bypass['vllm_router_cache_aware']:.2f} and {bypass['vllm_router_kv_aware']:.2f} |"
        ),
        f"| **{audit['exact'] * audit['requests']:.0f} of {audit['requests']} exact** |",
        f"| {len(faults)} faults under load, {sum(each['requests'] for each in faults):,} requests | **none failed** |",
        (
            f"| {soak['duration_s'] / 60:.0f} minutes at {soak['load']['events_per_s_after_warm_up']:,.0f} events/s, "
            f"{soak['truth']['compared'] / 1e6:.1f} million answers | **none wrong** |"
        ),
    ]
    assert last["ours"]["rate_per_s"] == 60
    assert sum(each["failed"] for each in faults) == soak["truth"]["wrong"] == 0
    assert [row for row in rows if row not in README] == []


@pytest.mark.parametrize("page", [ROOT / "README.md", DOCS / "how-to/ray-serve.md"], ids=lambda page: page.name)
def test_the_three_lines_are_those_of_the_config(page: Path) -> None:
    """That config is built in tests/integration/test_config_files.py."""
    (shown,) = (block for block in _FENCE.findall(page.read_text()) if "request_router_class" in block)
    documented = yaml.safe_load(re.sub(r"```\w*", "", shown))
    (tried,) = yaml.safe_load((ROOT / "configs/serve-llm-drop-in.yaml").read_text())["applications"]
    assert documented["import_path"] == tried["import_path"]
    (ours,), (theirs,) = documented["args"]["llm_configs"], tried["args"]["llm_configs"]
    assert ours == {key: theirs[key] for key in ours}
