"""Writes docs/reference/ (configuration, commands, HTTP, gRPC, wire formats) and the runbooks, from what defines them.

    make docs

`files()` says what belongs where; tests/unit/test_docs.py compares it with what is committed.
"""

from __future__ import annotations

import ast
import json
import re
import textwrap
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Final, Literal, Union, get_args, get_origin

import typer
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from typer.cli import get_docs_for_click

from serve_app import config, limits
from serve_app.cli import app
from serve_app.service import config as service_config
from serve_app.service import discovery
from serve_app.service.openapi import document

ROOT: Final = Path(__file__).parents[1]
FOLDER: Final = ROOT / "docs/reference"
RUNBOOKS: Final = ROOT / "docs/operations/runbooks.md"
_WRITTEN: Final = "Written by `make docs` from"

SECTIONS: Final[tuple[tuple[str, str, tuple[type[BaseModel], ...]], ...]] = (
    (
        "Ray Serve applications",
        "The `args` of an application in a Serve YAML, by its `import_path`.",
        (config.OpenAIArgs, config.LLMArgs, config.GraphArgs),
    ),
    (
        "Routing",
        "`RouterSettings` stand in `kvcache:`, in `routing:` or in `request_router_kwargs`.",
        (config.RouterSettings, config.CostSettings, config.LMCacheSettings),
    ),
    (
        "Score service",
        "The YAML of `kvcache serve-scores --config`. `redis_url` at the top counts for every model.",
        (
            service_config.ServiceConfig,
            config.DecisionSettings,
            service_config.TLSSettings,
            discovery.DiscoverySettings,
            discovery.KubernetesSettings,
        ),
    ),
    ("Shared by all", "Keys and limits.", (config.AuthSettings, limits.Limits)),
)
"""Title, introduction and models of docs/reference/config.md. A model in a field of these must be here as well."""

_STRUCTS: Final = (
    (
        "KV events",
        (
            "A batch is msgpack `[ts, [event, ...], data_parallel_rank]`. An event is a map with the tag "
            "`type`, or, from "
            "older engines, an array that begins with the tag. Unknown fields are ignored. An unknown event "
            "is skipped and "
            "counted; the rest of its batch is kept."
        ),
        "serve_app/events/wire.py",
        "tag",
    ),
    (
        "Records in Redis",
        "Each is a msgpack array, its fields in this order. New fields are added at the end, with a default.",
        "serve_app/index/keyspace.py",
        "array_like",
    ),
)
"""Title, introduction, module, and the keyword by which a struct there is one that is sent."""


def files() -> dict[Path, str]:
    """All that is written."""
    pages = {"config": config_page(), "cli": cli_page(), "http": http_page(), "grpc": grpc_page(), "wire": wire_page()}
    paths = {FOLDER / f"{name}.md": text for name, text in pages.items()} | {RUNBOOKS: runbooks_page()}
    return {path: text.rstrip() + "\n" for path, text in paths.items()}


def config_page() -> str:
    parts = [
        f"# Configuration\n\n{_WRITTEN} the pydantic models. An unknown name is an error, and the message names it.",
        *(
            part
            for title, intro, models in SECTIONS
            for part in (f"## {title}\n\n{intro}", *(_model(model) for model in models))
        ),
    ]
    return "\n\n".join(parts)


def _model(model: type[BaseModel]) -> str:
    said = textwrap.dedent(model.__doc__ or "").strip()
    rows = [
        f"| `{name}` | {_type(field)} | {_default(field)} | {_cell(field.description or '')} |"
        for name, field in model.model_fields.items()
    ]
    return "\n".join(
        (
            f"### {model.__name__}",
            "",
            said,
            "",
            "| setting | type | default | meaning |",
            "| --- | --- | --- | --- |",
            *rows,
        )
    )


def _type(field: FieldInfo) -> str:
    return _cell(f"`{_name(field.annotation)}`")


def _name(annotation: Any) -> str:
    """A type as a reader of YAML would call it."""
    if isinstance(annotation, type) and not get_args(annotation):
        return "null" if annotation is type(None) else annotation.__name__
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " | ".join(json.dumps(value) for value in arguments)
    if origin is Annotated:
        return _name(arguments[0])
    if origin in (Union, UnionType):
        return " | ".join(_name(one) for one in arguments)
    if origin is not None:
        return f"{origin.__name__}[{', '.join('...' if one is Ellipsis else _name(one) for one in arguments)}]"
    return str(annotation).rpartition(".")[2]


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.default if field.default is not PydanticUndefined else field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        changed = {name: getattr(value, name) for name in sorted(value.model_fields_set)}
        link = f"[{type(value).__name__}](#{type(value).__name__.lower()})"
        return f"{link} with `{json.dumps(changed)}`" if changed else link
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    plain = str(value) if isinstance(value, Path) else value
    return f"`{json.dumps(plain)}`"


def cli_page() -> str:
    command = typer.main.get_command(app)
    text = get_docs_for_click(
        obj=command, ctx=typer.Context(command, info_name="kvcache"), name="kvcache", title="Command line"
    )
    text = re.sub(r"^Example: (kvcache .+)$", r"**Example**: `\1`", text, flags=re.MULTILINE)
    head, _, rest = text.partition("\n\n")
    return f"{head}\n\n{_WRITTEN} the command itself; `kvcache COMMAND --help` says the same.\n\n{rest}"


def http_page() -> str:
    """Of the score service; Ray's graph has the same below `/kvcache`."""
    described = json.loads(document(choices=True))
    parts = [
        (
            f"# HTTP\n\n{_WRITTEN} the service's OpenAPI document, which it serves at `/openapi.json`. The "
            f"score service "
            "listens on `127.0.0.1:8100`. Ray's graph has the same paths below `/kvcache`, without the choices. "
            "A question is the body of an OpenAI request with the fields below beside it."
        ),
        "## Endpoints\n",
    ]
    rows = ["| | | what |", "| --- | --- | --- |"]
    for path, methods in described["paths"].items():
        for method, operation in methods.items():
            rows.append(f"| {method.upper()} | `{path}` | {_cell(operation['summary'])}. {_links(operation)} |")
    rows.append("| GET | `/metrics` | [Metrics](../metrics.md) in Prometheus' text format. |")
    rows.append("| GET | `/kvcache/` | The [live page](../architecture.md#the-live-page). |")
    parts[-1] += "\n" + "\n".join(rows)
    parts.append("## Errors\n\n" + _errors(described))
    parts.append("## Types")
    parts += [_schema(name, schema) for name, schema in sorted(described["components"]["schemas"].items())]
    return "\n\n".join(parts)


def _links(operation: dict[str, Any]) -> str:
    asked = _refs(operation.get("requestBody", {}))
    answered = _refs(operation["responses"].get("200", {}))
    arguments = ", ".join(f"`{one['name']}`" for one in operation.get("parameters", ()))
    said = [f"{word} {_linked(refs)}" for word, refs in (("Asked", asked), ("Answers", answered)) if refs]
    return ". ".join([*said, *([f"Query: {arguments}"] if arguments else [])]) + ("." if said or arguments else "")


def _linked(names: Iterable[str]) -> str:
    return ", ".join(f"[{name}](#{name.lower()})" for name in names)


def _refs(part: Any) -> list[str]:
    return list(dict.fromkeys(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(part))))


def _errors(described: dict[str, Any]) -> str:
    responses = described["paths"]["/v1/score"]["post"]["responses"]
    rows = [f"| {status} | {_cell(one['description'])} |" for status, one in responses.items() if status != "200"]
    return "\n".join(("Their shape is OpenAI's.", "", "| status | meaning |", "| --- | --- |", *rows))


def _schema(name: str, schema: dict[str, Any]) -> str:
    said = [f"### {name}", "", *([schema["description"], ""] if schema.get("description") else [])]
    if "enum" in schema:
        return "\n".join((*said, ", ".join(f"`{value}`" for value in schema["enum"])))
    rows = [
        f"| `{field}` | {_shape(one)} | {'yes' if field in schema.get('required', ()) else ''} "
        f"| {_cell(one.get('description', ''))} |"
        for field, one in schema.get("properties", {}).items()
    ]
    return "\n".join((*said, "| field | type | always | meaning |", "| --- | --- | --- | --- |", *rows))


def _shape(schema: dict[str, Any]) -> str:
    """A JSON schema in a few words, with links to the types that have a name."""
    if "$ref" in schema:
        return _linked([schema["$ref"].rpartition("/")[2]])
    if "anyOf" in schema:
        return " or ".join(_shape(one) for one in schema["anyOf"])
    match schema.get("type"):
        case "array":
            return f"list of {_shape(schema.get('items') or {})}"
        case "object" if isinstance(schema.get("additionalProperties"), dict):
            return f"map to {_shape(schema['additionalProperties'])}"
        case None:
            return "anything"
        case kind:
            return str(kind)


def grpc_page() -> str:
    parts = [
        (
            f"# gRPC\n\n{_WRITTEN} the `.proto` files. The score service listens on `127.0.0.1:8101`. It has "
            f"health checks "
            "and reflection too. `indexer.v1` is llm-d's wire, so llm-d's clients can ask this service."
        ),
    ]
    for name in ("kvcache", "indexer", "ext_proc"):
        text = (ROOT / f"serve_app/protos/{name}.proto").read_text().rstrip()
        parts.append(f"## {name}.proto\n\n```protobuf\n{text}\n```")
    return "\n\n".join(parts)


def wire_page() -> str:
    parts = [f"# Wire formats\n\n{_WRITTEN} the structs that decode them."]
    for title, intro, source, keyword in _STRUCTS:
        comments = _comments(source)
        parts.append(f"## {title}\n\n{intro} Source: `{source}`.")
        parts += [_struct(node, comments) for node in _structs(source, keyword)]
    return "\n\n".join(parts)


def _structs(source: str, keyword: str) -> Iterator[ast.ClassDef]:
    for node in ast.parse((ROOT / source).read_text()).body:
        if isinstance(node, ast.ClassDef) and {keyword} <= {each.arg for each in node.keywords} and node.name[0] != "_":
            yield node


def _comments(source: str) -> dict[int, str]:
    """Line -> the comment at its end."""
    with tokenize.open(ROOT / source) as file:
        found = [one for one in tokenize.generate_tokens(file.readline) if one.type == tokenize.COMMENT]
    return {one.start[0]: one.string.lstrip("# ") for one in found if one.line[: one.start[1]].strip()}


def _struct(node: ast.ClassDef, comments: dict[int, str]) -> str:
    rows = [
        f"| `{ast.unparse(field.target)}` | {_cell(f'`{ast.unparse(field.annotation)}`')} "
        f"| {f'`{ast.unparse(field.value)}`' if field.value else ''} | {_cell(comments.get(field.lineno, ''))} |"
        for field in node.body
        if isinstance(field, ast.AnnAssign)
    ]
    table = ["| field | type | default | meaning |", "| --- | --- | --- | --- |", *rows] if rows else []
    return "\n".join((f"### {node.name}", "", ast.get_docstring(node) or "", "", *table)).rstrip()


def runbooks_page() -> str:
    groups = yaml.safe_load((ROOT / "serve_app/dashboards/rules.yaml").read_text())["groups"]
    parts = [
        (
            f"# Runbooks\n\n{_WRITTEN} serve_app/dashboards/rules.yaml. Each alert's `description` is its "
            f"runbook. How to "
            "load the alerts: [Prometheus and Grafana](../../cluster/README.md#prometheus-and-grafana)."
        ),
    ]
    for rule in (rule for group in groups for rule in group["rules"]):
        severity, runbook = rule["labels"]["severity"].capitalize(), rule["annotations"]["description"].strip()
        when = f"after {rule['for']}" if "for" in rule else "at once"
        query = f"```promql\n{rule['expr'].strip()}\n```"
        parts.append(f"## {rule['alert']}\n\n**{severity}**, {when}. {runbook}\n\n{query}")
    return "\n\n".join(parts)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    for path, text in files().items():
        path.write_text(text)
