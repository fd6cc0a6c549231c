"""The pods, as they are published, and what they make prompts with; vLLM servers, as they tell of themselves."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator

from serve_app.doctor.facts import Facts, Finding, Level
from serve_app.doctor.findings import lora_behind_lmcache, unaligned_chunks
from serve_app.events.discovery import EngineFacts
from serve_app.index.inspection import DomainFacts, RedisFacts


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
                    yield unaligned_chunks(f"chunk size {there.chunk_size} of {store}", one.record.block_size)
            if one.record.adapters:
                yield lora_behind_lmcache(one.pod)


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
                'start it with --kv-events-config \'{"enable_kv_cache_events": true, "publisher": "zmq", ...}\'',
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
