"""Facts -> findings. Each check is a plain function; its name is what users see."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Final

from serve_app.doctor.facts import Facts, Finding, Level
from serve_app.events.discovery import EngineFacts
from serve_app.index.inspection import DomainFacts, RedisFacts
from serve_app.serve_config import engines, graphs

PYTHONS: Final = ((3, 11), (3, 12))
OPEN_FILES: Final = 65_536  # HAProxy, Ray and the engines hold one for each connection
CLOCK_S: Final = 1.0
DIRECT: Final = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING": "1",
    "RAY_SERVE_INGRESS_REQUEST_ROUTER_FORWARD_BODY": "1",
}
HAPROXY_PATH: Final = "RAY_SERVE_HAPROXY_BINARY_PATH"

Check = Callable[[Facts], Iterator[Finding]]
_ENV = "set -a; . <(kvcache config show direct.env); set +a, before Ray starts"


def versions(facts: Facts) -> Iterator[Finding]:
    python = facts.host.python
    if python not in PYTHONS:
        saw = f"Python {python[0]}.{python[1]}"
        yield Finding("versions", Level.ERROR, saw, "it was tested on 3.11 and 3.12 only", "use Python 3.11 or 3.12")
    for package in facts.host.packages:
        if package.installed and not package.fits:
            yield Finding(
                "versions",
                Level.ERROR,
                f"{package.name} {package.installed}, wanted {package.wanted}",
                "its interfaces are not stable: routers or events may be misread",
                f'pip install "{package.name}{package.wanted}"',
            )


def ports(facts: Facts) -> Iterator[Finding]:
    for port in facts.ports:
        if port.owner and not port.ours:
            yield Finding(
                "ports",
                Level.ERROR,
                f"{port.where}: port {port.number} on {port.host} is taken by {port.owner}",
                "what is to listen there cannot start",
                f"stop {port.owner}, or choose another port (`kvcache up --port`)",
            )


def open_files(facts: Facts) -> Iterator[Finding]:
    if 0 < facts.host.open_files < OPEN_FILES:
        yield Finding(
            "open files",
            Level.WARNING,
            f"at most {facts.host.open_files} open files",
            "under load connections are refused",
            f"ulimit -n {OPEN_FILES}, before Ray starts (limits.conf, or LimitNOFILE of systemd)",
        )


def direct_streaming(facts: Facts) -> Iterator[Finding]:
    environment = facts.host.environment
    there = {name for name, value in DIRECT.items() if environment.get(name) == value}
    if there and (missing := sorted(DIRECT.keys() - there)):
        yield Finding(
            "direct streaming",
            Level.ERROR,
            f"{', '.join(sorted(there))} set, {', '.join(missing)} not",
            "half of it does not route by prompt: the body does not reach the router",
            _ENV,
        )
    elif there and HAPROXY_PATH not in environment:
        yield Finding(
            "direct streaming",
            Level.WARNING,
            f"{HAPROXY_PATH} is not set",
            "Ray's own HAProxy answers 503 when a router does not answer",
            _ENV,
        )


def haproxy(facts: Facts) -> Iterator[Finding]:
    if facts.host.direct and facts.host.haproxy_error:
        yield Finding(
            "haproxy",
            Level.ERROR,
            facts.host.haproxy_error,
            "direct streaming has no proxy to run",
            'pip install "kvcache-manager[serve]"',
        )


def orphans(facts: Facts) -> Iterator[Finding]:
    if gone := facts.host.orphans:
        shown = ", ".join(f"{one.pid} ({one.command})" for one in gone[:5])
        yield Finding(
            "orphans",
            Level.WARNING,
            f"{len(gone)} processes of a `kvcache up` that has ended: {shown}",
            "they hold memory, ports and GPUs",
            "kvcache down",
        )


def serve_config(facts: Facts) -> Iterator[Finding]:
    if facts.config is None:
        return
    served = list(engines(facts.config))
    for graph in graphs(facts.config):
        same = [one for one in served if one.model == graph.model]
        if served and not same:
            yield Finding(
                "config",
                Level.ERROR,
                f"the graph follows model {graph.model!r}, the engines serve {', '.join(one.model for one in served)}",
                "its index stays empty",
                "give build_kvcache the engines' model_id as `model`",
            )
        for one in same:
            if one.redis_url != graph.redis_url:
                yield Finding(
                    "config",
                    Level.ERROR,
                    f"model {one.model!r} publishes to another redis_url than the graph reads",
                    "the graph's index stays empty",
                    "give both the same redis_url",
                )
    for one in served:
        yield from _engine_settings(one.model, one.engine_kwargs, one.chunk_size)


def _engine_settings(model: str, kwargs: dict[str, object], chunk_size: int) -> Iterator[Finding]:
    if kwargs.get("enable_prefix_caching") is False:
        yield Finding(
            "config",
            Level.ERROR,
            f"model {model!r} has enable_prefix_caching: false",
            "nothing is ever taken from a cache",
            "delete that line",
        )
    block_size = kwargs.get("block_size")
    if isinstance(block_size, int) and block_size > 0 and chunk_size % block_size:
        yield _chunk(f"lmcache.chunk_size {chunk_size} of model {model!r}", block_size)
    if chunk_size and kwargs.get("enable_lora"):
        yield _lora_behind_lmcache(f"model {model!r}")


def redis(facts: Facts) -> Iterator[Finding]:
    known = facts.redis
    if known is None:
        yield Finding("redis", Level.UNKNOWN, "no Redis was named", do="kvcache doctor --redis URL, or give a config")
        return
    if known.error:
        yield Finding(
            "redis",
            Level.ERROR,
            f"{known.url} does not answer: {known.error}",
            "nothing can be published, and routers see no cache",
            "start it, or correct the URL, its user and its password",
        )
        return
    if known.read_only:
        yield Finding(
            "redis rights",
            Level.ERROR,
            f"{known.url} is a replica, which nobody can write to",
            "nothing can be published",
            "name the primary, or the Sentinels (redis+sentinel://)",
        )
    if known.refused:
        yield Finding(
            "redis rights",
            Level.ERROR,
            f"this user may not send {', '.join(known.refused)}",
            "publishers and routers cannot work with these rights",
            "give it what cluster/redis/users.acl lists for kvcache-writer",
        )
    for wrong in known.wrong_types:
        yield Finding(
            "redis keys", Level.ERROR, wrong, "that model has no index", "delete that key; it is written again"
        )


def redis_memory(facts: Facts) -> Iterator[Finding]:
    known = facts.redis
    if known is None or known.error:
        return
    if not known.info:
        yield Finding("redis memory", Level.UNKNOWN, "this user may not send INFO", do="ask as an administrator")
        return
    policy, most = str(known.info.get("maxmemory_policy", "noeviction")), int(known.info.get("maxmemory", 0))
    if policy != "noeviction":
        yield Finding(
            "redis memory",
            Level.ERROR,
            f"maxmemory-policy {policy}",
            "Redis may drop a part of the index, which then is published again and again",
            "CONFIG SET maxmemory-policy noeviction, and in its configuration file",
        )
    if evicted := int(known.info.get("evicted_keys", 0)):
        yield Finding(
            "redis memory", Level.WARNING, f"{evicted} keys were evicted", "it was too small", "raise maxmemory"
        )
    if most and int(known.info.get("used_memory", 0)) > 0.9 * most:
        yield Finding(
            "redis memory",
            Level.WARNING,
            f"{known.info['used_memory'] / 2**20:.0f} of {most / 2**20:.0f} MiB are used",
            "when it is full, nothing more is published",
            "raise maxmemory: some 100 bytes for each block and replica",
        )


def redis_persistence(facts: Facts) -> Iterator[Finding]:
    known = facts.redis
    if known is None or known.error or not known.info:
        return
    if known.info.get("rdb_last_bgsave_status", "ok") != "ok":
        yield Finding(
            "redis persistence",
            Level.ERROR,
            "its last save to disk failed",
            "Redis refuses writes then",
            "make room on its disk, or turn saving off: CONFIG SET save ''",
        )
    elif known.saves or int(known.info.get("aof_enabled", 0)):
        how = f"save {known.saves!r}" if known.saves else "an append-only file"
        yield Finding(
            "redis persistence",
            Level.WARNING,
            f"it writes to disk ({how})",
            "the index is a cache: that costs time, and an old snapshot is published anew anyway",
            "CONFIG SET save '' and appendonly no, if nothing else is stored there",
        )


def clock(facts: Facts) -> Iterator[Finding]:
    ahead_s = facts.redis.ahead_s if facts.redis is not None else None
    if ahead_s is not None and abs(ahead_s) > CLOCK_S:
        yield Finding(
            "clock",
            Level.WARNING,
            f"Redis' clock is {abs(ahead_s):.1f} s {'ahead of' if ahead_s > 0 else 'behind'} this machine's",
            "routing does not compare clocks; times in receipts and logs do not fit together",
            "run NTP (chrony, systemd-timesyncd) on both",
        )


def pods(facts: Facts) -> Iterator[Finding]:
    """Whether each pod is there and its events arrive."""
    known = facts.redis
    if known is None or known.error:
        return
    if known.models is None:
        yield Finding("pods", Level.UNKNOWN, "this user may not look for models (SCAN)", do="kvcache doctor --model M")
        return
    if not known.domains:
        yield Finding(
            "pods",
            Level.WARNING,
            f"nobody publishes to {known.url}",
            "routers know of no cache: requests go to the least-loaded replica",
            "kvcache up, or kvcache publish --server http://ENGINE:8000 --redis URL",
        )
    for one in known.domains:
        yield from _pod(one)


def _pod(one: DomainFacts) -> Iterator[Finding]:
    name = f"{one.pod} of {one.model}"
    if one.record is None:
        yield Finding(
            "pods", Level.ERROR, f"the record of {name} cannot be read", "it is left out", "upgrade both sides"
        )
        return
    beat = one.heartbeat
    if beat is None:
        yield Finding(
            "pods",
            Level.ERROR,
            f"{name} has no lease",
            "its publisher has ended: its blocks count no more",
            "look into the publisher's log; a pod that is gone for good is dropped after a minute",
        )
        return
    if one.beats is False:
        yield Finding("pods", Level.ERROR, f"{name} sends no heartbeat", "it is about to be dropped", "see its log")
    if not beat.events_applied:
        yield Finding(
            "events",
            Level.WARNING,
            f"no KV event of {name} has arrived",
            "if it has served requests, its events are off or go elsewhere, and nothing is known of its cache",
            "send it a request; then see --kv-events-config of vLLM, and --engine of kvcache publish",
        )
    if beat.events_lost:
        yield Finding(
            "events",
            Level.WARNING,
            f"{beat.events_lost} batches of {name} were lost",
            "it counts as degraded until what is in doubt is confirmed",
            "give vLLM a replay_endpoint in --kv-events-config",
        )
    if beat.events_skipped:
        reasons = ", ".join(f"{reason} {count}" for reason, count in beat.events_skipped.items())
        yield Finding(
            "events",
            Level.WARNING,
            f"events of {name} were skipped: {reasons}",
            "what they tell of is not in the index",
            "the publisher's log says of each reason once what it needs",
        )
    if one.record.doubt or one.record.degraded:
        saw = f"{name} is degraded: {one.record.doubt or 'events were lost'}"
        yield Finding("pods", Level.WARNING, saw, "its matches count less", "see its publisher's log")


def layout(facts: Facts) -> Iterator[Finding]:
    """Block size and KV cache groups: one for each model."""
    for model, found in _of_model(facts.redis).items():
        sizes, groups = defaultdict(list), defaultdict(list)
        for one in found:
            if one.record is not None and one.record.pod is not None:
                sizes[one.record.block_size].append(one.pod)
                groups[one.record.groups].append(one.pod)
        if len(sizes) > 1:
            yield Finding(
                "block size",
                Level.ERROR,
                f"{model}: " + "; ".join(f"{size} on {', '.join(names)}" for size, names in sorted(sizes.items())),
                "keys of one block size say nothing of another: only a part of the pods is scored",
                "start all engines of a model with the same --block-size",
            )
        if len(groups) > 1:
            saw = "; ".join(f"{len(kinds)} on {', '.join(names)}" for kinds, names in groups.items())
            yield Finding(
                "groups",
                Level.ERROR,
                f"{model}: KV cache groups differ: {saw}",
                "the engines are of different builds or flags, and hit differently",
                "start all engines of a model with the same flags; or give --groups to kvcache publish",
            )


def lmcache(facts: Facts) -> Iterator[Finding]:
    for found in _of_model(facts.redis).values():
        stores = {one.domain: one.record for one in found if one.record is not None and one.record.pod is None}
        for one in found:
            if one.record is None or one.record.pod is None or not one.record.attached:
                continue
            for store in one.record.attached:
                if (there := stores.get(store)) is None:
                    yield Finding(
                        "lmcache",
                        Level.WARNING,
                        f"{one.pod} uses {store}, which nobody publishes",
                        "what LMCache holds is not counted",
                        f"kvcache publish-lmcache --server {store.removeprefix('node:')}",
                    )
                elif there.chunk_size % one.record.block_size:
                    yield _chunk(f"chunk size {there.chunk_size} of {store}", one.record.block_size)
            if one.record.adapters:
                yield _lora_behind_lmcache(one.pod)


def adapters(facts: Facts) -> Iterator[Finding]:
    for model, found in _of_model(facts.redis).items():
        of_pod = {one.pod: set(one.record.adapters) for one in found if one.record is not None and one.record.pod}
        every = set().union(*of_pod.values()) if of_pod else set()
        for pod, names in of_pod.items():
            if missing := sorted(every - names):
                yield Finding(
                    "adapters",
                    Level.WARNING,
                    f"{pod} of {model} has no {', '.join(missing[:5])}",
                    "requests for them go to the other pods only",
                    "load the same adapters everywhere, if that is not meant",
                )


def prompts(facts: Facts) -> Iterator[Finding]:
    for one in facts.prompts:
        of = f"{', '.join(one.pods)} of {one.model}"
        if one.error:
            yield Finding(
                "tokenizer",
                Level.ERROR,
                f"{one.tokenizer!r} of {of} cannot be loaded here: {one.error}",
                "prompts of this model are not scored",
                "make the files, or the Hugging Face hub, reachable from the routers' machines",
            )
        elif one.differing:
            yield Finding(
                "tokenizer",
                Level.ERROR,
                f"{of}: {', '.join(one.differing)} differ from {one.tokenizer!r} here",
                "block keys would be wrong, so nothing is scored (reason unknown_prompt)",
                "give the routers the engine's files and revision; see --tokenizer and --chat-template",
            )
        elif not one.said:
            yield Finding(
                "tokenizer",
                Level.UNKNOWN,
                f"{of} do not say what they make prompts with",
                "it cannot be proven that the router's prompts are the engine's",
                "kvcache publish --server URL asks the engine",
            )
    for model, said in _identities(facts.redis).items():
        if len(said) > 1:
            yield Finding(
                "tokenizer",
                Level.ERROR,
                f"{model}: pods make prompts in {len(said)} ways: {'; '.join(', '.join(names) for names in said)}",
                "those that differ from most are degraded, and not scored",
                "start all engines with the same model revision, tokenizer and template",
            )


def vllm(facts: Facts) -> Iterator[Finding]:
    """What an engine says itself, beside what is published of it."""
    for url, told, error in facts.engines:
        if told is None:
            means = "nothing can be said of this engine"
            yield Finding(
                "vllm", Level.ERROR, f"{url}: {error}", means, "start it, or correct the URL (and VLLM_API_KEY)"
            )
            continue
        cache, settings = told.cache, told.settings
        if cache is not None and not cache.prefix_caching:
            yield Finding(
                "vllm",
                Level.ERROR,
                f"{url} has prefix caching turned off",
                "nothing is ever taken from its cache",
                "start it without --no-enable-prefix-caching",
            )
        if settings.events is False:
            yield Finding(
                "vllm",
                Level.ERROR,
                f"{url} publishes no KV events",
                "nobody can know what it holds",
                '--kv-events-config \'{"enable_kv_cache_events": true, "publisher": "zmq", ...}\' (README.md)',
            )
        if settings.events and not settings.replay_endpoint:
            yield Finding(
                "vllm",
                Level.WARNING,
                f"{url} has no replay_endpoint",
                "events that are lost on the way cannot be had again",
                "name one in --kv-events-config",
            )
        yield from _published_otherwise(url, told, facts.redis)


def _published_otherwise(url: str, told: EngineFacts, redis: RedisFacts | None) -> Iterator[Finding]:
    known = {one.record.block_size for one in _of_model(redis).get(told.models.names[0], []) if one.record is not None}
    size = told.cache.block_size if told.cache is not None else 0
    if size and known and size not in known:
        yield Finding(
            "vllm",
            Level.ERROR,
            f"{url} has blocks of {size} tokens, its model is published with {', '.join(map(str, sorted(known)))}",
            "its blocks never match",
            "start kvcache publish without --block-size: it asks the engine",
        )


CHECKS: Final[tuple[Check, ...]] = (
    versions,
    ports,
    open_files,
    direct_streaming,
    haproxy,
    orphans,
    serve_config,
    redis,
    redis_memory,
    redis_persistence,
    clock,
    pods,
    layout,
    lmcache,
    adapters,
    prompts,
    vllm,
)


def examine(facts: Facts) -> list[Finding]:
    """All findings; a check that finds nothing is one that is ok."""
    found = []
    for check in CHECKS:
        of_check = list(check(facts))
        found.extend(of_check or [Finding(check.__name__.replace("_", " "), Level.OK, "nothing wrong")])
    return found


def _chunk(what: str, block_size: int) -> Finding:
    return Finding(
        "lmcache",
        Level.ERROR,
        f"{what} is no multiple of the block size {block_size}",
        "LMCache's chunks are not whole blocks",
        "use a chunk size that is a multiple of the engines' block size",
    )


def _lora_behind_lmcache(what: str) -> Finding:
    return Finding(
        "lmcache",
        Level.ERROR,
        f"{what} has LoRA adapters behind LMCache",
        "LMCache does not tell adapters apart: an adapter's blocks are taken for the base model's",
        "serve adapters without LMCache",
    )


def _of_model(redis: RedisFacts | None) -> dict[str, list[DomainFacts]]:
    """Those that are alive."""
    found: dict[str, list[DomainFacts]] = defaultdict(list)
    for one in redis.domains if redis is not None else ():
        if one.heartbeat is not None:
            found[one.model].append(one)
    return found


def _identities(redis: RedisFacts | None) -> dict[str, list[list[str]]]:
    """Model -> pods, by what they make prompts with."""
    return {model: _alike(found) for model, found in _of_model(redis).items()}


def _alike(found: Iterable[DomainFacts]) -> list[list[str]]:
    said: dict[tuple[tuple[str, str], ...], list[str]] = defaultdict(list)
    for one in found:
        if one.record is not None and one.record.pod is not None and one.record.identity:
            said[one.record.identity].append(one.pod)
    return list(said.values())
