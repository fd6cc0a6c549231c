"""What the read path costs: request body -> scored replicas, stage by stage, and the index match against Dynamo's.

In: nothing but the package; `ai-dynamo-runtime` if it can be imported (pip install --no-deps ai-dynamo-runtime).
Out: benchmarks/results/read_path.json, and a summary on the terminal.

Everything that is compared runs in one process, in turns and in random order, so that whatever else the machine does
hits all of it alike; the numbers are medians, and p10 beside them where a busy machine matters most. Each result is
checked before it is timed. "first" means that other work has been through the processor's caches since this data was
last used, "again" is the same call right after. Memory is measured in a fresh process each (this file, with --memory),
as growth of RSS.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import gc
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # before tokenizers is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DYN_LOG", "error")

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the script runs from anywhere

from serve_app.blocks import KEY_BYTES, block_keys, namespace_key, pack_tokens  # noqa: E402
from serve_app.index.memory import MemoryIndex  # noqa: E402
from serve_app.indexer import Indexer, Scored  # noqa: E402
from serve_app.model import resolve_model  # noqa: E402
from serve_app.prompts.encoder import PromptEncoder  # noqa: E402
from serve_app.prompts.prefix_store import PrefixStore  # noqa: E402
from serve_app.prompts.request import ChatPrompt, parse_request  # noqa: E402
from serve_app.prompts.service import PromptService  # noqa: E402
from serve_app.prompts.tokenizer import Segment  # noqa: E402
from serve_app.routing.chooser import SETTLE_S, Chooser  # noqa: E402
from serve_app.scoring import score  # noqa: E402
from serve_app.types import (  # noqa: E402
    GPU,
    BlockKeys,
    Domain,
    DomainId,
    EncodedKeys,
    EngineSpec,
    Epoch,
    Found,
    ModelId,
    PodId,
    PodMatch,
)

MODEL = ModelId("bench")
BLOCK_SIZE = 16
PROMPT_SIZES = {"1k": 1_000, "9k": 9_000, "60k": 60_000}
WARMTHS = ("cold", "90% warm", "warm")
STAGES = ("json", "render", "split", "lookup", "tokenize", "complete", "match", "score")
PROMPT_BLOCKS = 562  # of a prompt of 9,000 tokens
SHARED_BLOCKS = 96  # of them, system prompt and documents that 16 prompts have in common
PROMPTS_PER_GROUP = 16
OPEN_REQUESTS = 64  # routed, and not yet seen stored
STORE_BYTES = 512 << 20
TURNS = 400  # messages of a long conversation
TURN_CHARS = {"30k": 300, "60k": 600}  # about how many tokens it has -> characters in each message
NS_PER_US = 1_000


def say(text: str) -> None:
    print(text, flush=True)


# -- a fleet's index --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fleet:
    """Prompts and who holds them. Prompts share prefixes in groups; a replica holds a prompt whole, or its start."""

    prompts: list[bytes]  # packed token ids, PROMPT_BLOCKS blocks each
    keys: list[bytes]  # packed block keys of each
    holders: dict[int, list[list[tuple[int, int]]]]  # number of replicas -> per prompt: (replica, blocks held)
    blocks: int  # distinct


def make_fleet(distinct_blocks: int, replica_counts: Sequence[int], seed: int = 1) -> Fleet:
    rng = random.Random(seed)
    root = namespace_key(MODEL, BLOCK_SIZE)
    prompts: list[bytes] = []
    blocks = 0

    def ids(count: int) -> bytes:
        return pack_tokens(array("H", rng.randbytes(2 * BLOCK_SIZE * count)))

    while blocks < distinct_blocks:
        shared = ids(SHARED_BLOCKS)
        prompts += [shared + ids(PROMPT_BLOCKS - SHARED_BLOCKS) for _ in range(PROMPTS_PER_GROUP)]
        blocks += SHARED_BLOCKS + PROMPTS_PER_GROUP * (PROMPT_BLOCKS - SHARED_BLOCKS)
    keys = [block_keys(prompt, BLOCK_SIZE, root) for prompt in prompts]
    holders = {count: [_holders(rng, count) for _ in prompts] for count in replica_counts}
    return Fleet(prompts, keys, holders, blocks)


def _holders(rng: random.Random, replicas: int) -> list[tuple[int, int]]:
    """One replica has the whole prompt, up to `replicas` / 16 + 2 more have some of it."""
    chosen = rng.sample(range(replicas), rng.randint(1, 3 + replicas // 16))
    return [(r, rng.randint(SHARED_BLOCKS // 2, PROMPT_BLOCKS) if i else PROMPT_BLOCKS) for i, r in enumerate(chosen)]


def fill_index(index: MemoryIndex, fleet: Fleet, replicas: int, spec: EngineSpec) -> None:
    for r in range(replicas):
        index.join(Domain(DomainId(f"d{r}"), Epoch(1), spec, PodId(f"p{r}")))
    for keys, holders in zip(fleet.keys, fleet.holders[replicas], strict=True):
        for r, count in holders:
            index.add(DomainId(f"d{r}"), Epoch(1), GPU, keys[: count * KEY_BYTES])


def expected_match(fleet: Fleet, replicas: int, at: int) -> dict[int, int]:
    """Replica -> matched blocks of prompt `at`, worked out from who was given what."""
    group = at - at % PROMPTS_PER_GROUP
    found: dict[int, int] = {}
    for i in range(group, group + PROMPTS_PER_GROUP):
        for r, count in fleet.holders[replicas][i]:
            found[r] = max(found.get(r, 0), count if i == at else min(count, SHARED_BLOCKS))
    return found


# -- NVIDIA Dynamo ----------------------------------------------------------------------------------------------------


def import_dynamo() -> tuple[Any, str]:
    """Dynamo's native module and its version, or None and why not."""
    try:
        from importlib.metadata import version

        from dynamo import _core
    except ImportError as error:
        return None, f"not measured: {error}; pip install --no-deps ai-dynamo-runtime"
    return _core, version("ai-dynamo-runtime")


class DynamoTree:
    """Dynamo's RadixTree with the same fleet in it, by way of its own KV events."""

    def __init__(self, core: Any, fleet: Fleet, hashes: Sequence[Sequence[int]], replicas: int) -> None:
        self.tree = core.RadixTree()
        event_id = 0
        for local, keys, holders in zip(hashes, fleet.keys, fleet.holders[replicas], strict=True):
            names = array("Q", keys)
            for r, count in holders:
                stored = [{"block_hash": names[i], "tokens_hash": local[i]} for i in range(count)]
                data = {"stored": {"parent_hash": None, "blocks": stored}}
                self.tree.apply_event(r, json.dumps({"event_id": event_id, "data": data, "dp_rank": 0}).encode())
                event_id += 1

    def scores(self, hashes: Sequence[int]) -> dict[int, int]:
        return {worker: count for (worker, _rank), count in self.tree.find_matches(hashes).scores.items()}


# -- timing -----------------------------------------------------------------------------------------------------------


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Microseconds, and the result."""
    start = time.perf_counter_ns()
    result = call()
    return (time.perf_counter_ns() - start) / NS_PER_US, result


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def p10(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 10]


def rounded(value: float) -> float:
    """Three significant digits or so."""
    return round(value, 4 if abs(value) < 1 else 3 if abs(value) < 10 else 1)


# -- index match ------------------------------------------------------------------------------------------------------


def bench_match(fleet: Fleet, indexes: Mapping[int, MemoryIndex], repeats: int) -> dict[str, Any]:
    """Match of whole prompts, each chosen at random of the fleet: "first" has cold caches, "again" is the same call
    right after. Dynamo does the same, in turns with ours.
    """
    core, version = import_dynamo()
    trees: dict[int, DynamoTree] = {}
    hashes: list[list[int]] = []
    if core is not None:
        hashes = [core.compute_block_hash_for_seq(array("I", p).tolist(), BLOCK_SIZE) for p in fleet.prompts]
        for replicas in indexes:
            say(f"  filling Dynamo's RadixTree, {replicas} replicas")
            trees[replicas] = DynamoTree(core, fleet, hashes, replicas)
    _check_match(fleet, indexes, trees, hashes)
    root = namespace_key(MODEL, BLOCK_SIZE)
    rng = random.Random(2)
    times: dict[str, list[float]] = {}

    def run(name: str, make: Callable[[], Callable[[], Any]]) -> None:
        for which in ("first", "again"):
            call = make()
            times.setdefault(f"{name} {which}", []).append(timed(call)[0])

    gc.collect()
    gc.freeze()
    for turn in range(repeats):
        at = rng.randrange(len(fleet.prompts))
        packed, keys = fleet.prompts[at], fleet.keys[at]
        runs: list[tuple[str, Callable[[], Callable[[], Any]]]] = []

        def theirs(tree: DynamoTree, at: int = at) -> Callable[[], Any]:
            made = list(hashes[at])
            return lambda: tree.tree.find_matches(made)

        runs.append(("keys ours", partial(partial, block_keys, packed, BLOCK_SIZE, root)))
        for replicas, index in indexes.items():
            runs.append((f"match ours {replicas}", partial(partial, index.match, keys)))
        if core is not None:
            ids = array("I", packed).tolist()
            runs.append(("keys dynamo", partial(partial, core.compute_block_hash_for_seq, ids, BLOCK_SIZE)))
            for replicas, tree in trees.items():
                runs.append((f"match dynamo {replicas}", partial(theirs, tree)))
        rng.shuffle(runs)
        for name, make in runs:
            run(name, make)
        if turn % max(repeats // 4, 1) == 0:
            say(f"  match {turn}/{repeats}")
    gc.unfreeze()
    return _match_report(times, list(indexes), fleet.blocks, version, core is not None)


def _check_match(
    fleet: Fleet,
    indexes: Mapping[int, MemoryIndex],
    trees: Mapping[int, DynamoTree],
    hashes: Sequence[Sequence[int]],
) -> None:
    for replicas, index in indexes.items():
        for at in range(0, len(fleet.prompts), max(len(fleet.prompts) // 50, 1)):
            expected = expected_match(fleet, replicas, at)
            match = index.match(fleet.keys[at])
            found = {int(pod[1:]): m.tokens[GPU] // BLOCK_SIZE for pod, m in match.items() if m.tokens}
            assert len(match) == replicas, f"{len(match)} pods answered for, not {replicas}"
            assert found == expected, f"match of prompt {at} is {found}, not {expected}"
            if replicas in trees:
                theirs = trees[replicas].scores(hashes[at])
                assert theirs == expected, f"Dynamo's match of prompt {at} is {theirs}, not {expected}"


def _match_report(
    times: Mapping[str, Sequence[float]], counts: Sequence[int], blocks: int, dynamo: str, with_dynamo: bool
) -> dict[str, Any]:
    report: dict[str, Any] = {
        "indexed_blocks": blocks,
        "prompt_blocks": PROMPT_BLOCKS,
        "dynamo": dynamo,
        "us_per_prompt": {n: {"median": rounded(median(t)), "p10": rounded(p10(t))} for n, t in times.items()},
        "ns_per_block": {n: rounded(median(t) * 1000 / PROMPT_BLOCKS) for n, t in times.items()},
    }
    if with_dynamo:
        report["ratio_to_dynamo"] = {
            f"{part} {which}": {
                stat.__name__: rounded(
                    stat(times[f"{part.replace('match', 'match ours')} {which}"])
                    / stat(times[f"{part.replace('match', 'match dynamo')} {which}"])
                )
                for stat in (median, p10)
            }
            for part in (f"match {count}" for count in counts)
            for which in ("first", "again")
        }
        report["ratio_to_dynamo_keys_and_match"] = {
            f"{count} {which}": rounded(
                (median(times[f"keys ours {which}"]) + median(times[f"match ours {count} {which}"]))
                / (median(times[f"keys dynamo {which}"]) + median(times[f"match dynamo {count} {which}"]))
            )
            for count in counts
            for which in ("first", "again")
        }
    return report


# -- choice -----------------------------------------------------------------------------------------------------------


def bench_choice(fleet: Fleet, indexes: Mapping[int, MemoryIndex], repeats: int) -> dict[str, Any]:
    """The Chooser's time for matched prompts of the fleet, with requests under way that no event has told of.

    "settled": the ledger was compared with the index less than SETTLE_S before; "settling" does that too.
    """
    times: dict[str, list[float]] = {}
    choosers: dict[int, Chooser] = {}
    rng = random.Random(5)
    now_s = 0.0
    for replicas, index in indexes.items():
        chooser = choosers[replicas] = Chooser(index.held)
        for _ in range(OPEN_REQUESTS):
            found = _found(index, rng.randbytes(PROMPT_BLOCKS * KEY_BYTES), replicas)
            choice = chooser.choose(list(found.matches[0]), found, now_s)
            chooser.sent(choice.ranked[0], found, choice, now_s)
    gc.collect()
    gc.freeze()
    for _ in range(repeats):
        keys = rng.choice(fleet.keys)
        now_s += 2 * SETTLE_S
        for replicas, index in indexes.items():
            chooser, found = choosers[replicas], _found(index, keys, replicas)
            pods = list(found.matches[0])
            for which in ("settling", "settled"):
                us, choice = timed(partial(chooser.choose, pods, found, now_s))
                times.setdefault(f"choose {replicas} {which}", []).append(us)
            best = max(found.matches[0].values(), key=lambda match: match.total_tokens).total_tokens
            assert max(choice.held_tokens.values()) >= best, "the choice does not know of the longest match"
            us, sent = timed(partial(chooser.sent, choice.ranked[0], found, choice, now_s))
            times.setdefault(f"sent {replicas}", []).append(us)
            chooser.withdraw(sent)
    gc.unfreeze()
    return {
        "prompt_blocks": PROMPT_BLOCKS,
        "open_requests": OPEN_REQUESTS,
        "us": {name: {"median": rounded(median(us)), "p10": rounded(p10(us))} for name, us in times.items()},
    }


def _found(index: MemoryIndex, keys: BlockKeys, replicas: int) -> Found:
    tokens = PROMPT_BLOCKS * BLOCK_SIZE + BLOCK_SIZE // 2
    pods = [PodId(f"p{r}") for r in range(replicas)]
    return Found([EncodedKeys(keys, tokens, tokens)], [index.match(keys, pods)], BLOCK_SIZE)


# -- whole path -------------------------------------------------------------------------------------------------------


class Chat:
    """A request of about `tokens` tokens, the last of a conversation, and the request that came 10% earlier."""

    def __init__(self, tokens: int, count: Callable[[str], int]) -> None:
        from pydoc_data.topics import topics

        text = "\n".join(topics[name] for name in sorted(topics))  # Python's documentation, 700,000 characters
        turn_chars = max(tokens // 40, 30) * 4
        messages = [{"role": "system", "content": f"You explain Python. Answer in {tokens} words."}]
        size = count(messages[0]["content"])
        at = 0
        earlier = messages
        while size < tokens or messages[-1]["role"] != "user":
            role = "assistant" if messages[-1]["role"] == "user" else "user"
            messages = [*messages, {"role": role, "content": text[at : at + turn_chars].strip()}]
            at += turn_chars
            size += count(messages[-1]["content"]) + 5  # and the template's own
            if role == "user" and size <= tokens * 0.9:
                earlier = messages
        self.body = json.dumps({"model": MODEL, "messages": messages, "max_tokens": 200}).encode()
        self.earlier = {"model": MODEL, "messages": earlier}


class MemoryStage:
    """IndexStage over a MemoryIndex."""

    def __init__(self, index: MemoryIndex, spec: EngineSpec) -> None:
        self._index = index
        self._spec = spec

    async def spec(self) -> EngineSpec:
        return self._spec

    async def match(
        self, keys: BlockKeys, pods: Sequence[PodId] | None, *, count_hits: bool, prompt_tokens: int | None = None
    ) -> Mapping[PodId, PodMatch]:
        return self._index.match(keys, pods, count_hits=count_hits, prompt_tokens=prompt_tokens)


class ReadPath:
    """The read path of one model, with a store that can be emptied."""

    def __init__(self, spec: EngineSpec, index: MemoryIndex, encoder: PromptEncoder, local: PromptService) -> None:
        self.spec = spec
        self.index = index
        self.encoder = encoder
        self.indexer = Indexer(local, MemoryStage(index, spec))

    @classmethod
    async def load(cls, spec: EngineSpec, index: MemoryIndex) -> ReadPath:
        local = PromptService(PrefixStore(STORE_BYTES))
        return cls(spec, index, await local.encoder(spec), local)

    def prepare(self, chat: Chat, warmth: str) -> None:
        """A new store that knows as much as it shall. A new encoder would load the tokenizer again."""
        self.encoder._store = PrefixStore(STORE_BYTES)
        if warmth != "cold":
            self.encoder.encode(chat.earlier if warmth == "90% warm" else msgspec.json.decode(chat.body))

    async def whole(self, chat: Chat) -> Scored:
        return await self.indexer.score(msgspec.json.decode(chat.body))

    def text(self, body: Mapping[str, Any]) -> str:
        (prompt,) = parse_request(body)
        assert isinstance(prompt, ChatPrompt)
        return self.encoder._renderer.render(prompt)

    def tokenize(self, text: str) -> list[int]:
        """The whole prompt at once, the fastest way that the library has."""
        (encoding,) = self.encoder._tokenizer._backend.encode_batch_fast([text], add_special_tokens=False)
        return list(encoding.ids)

    def stages(self, chat: Chat) -> dict[str, float]:
        """Microseconds of every stage; what `Indexer.score` does, spelled out."""
        encoder, spec = self.encoder, self.spec
        us: dict[str, float] = {}
        us["json"], body = timed(lambda: msgspec.json.decode(chat.body))
        us["render"], text = timed(lambda: self.text(body))
        us["split"], segments = timed(lambda: encoder._tokenizer.split(text, False))
        root = namespace_key(spec.model, spec.block_size)
        us["lookup"], known = timed(lambda: encoder._store.lookup(root, segments, spec.block_size, spec.tokenizer))
        us["tokenize"], ids = timed(lambda: encoder.tokenize(known.missing))
        us["complete"], encoded = timed(lambda: encoder._store.complete(known, ids))
        us["match"], match = timed(lambda: self.index.match(encoded.block_keys))
        us["score"], _ = timed(lambda: {pod: score(m, encoded.token_count) for pod, m in match.items()})
        return us


async def bench_path(index: MemoryIndex, spec: EngineSpec, repeats: int) -> dict[str, Any]:
    say("  loading the tokenizer")
    path = await ReadPath.load(spec, index)
    chats: dict[str, Chat] = {}
    texts: dict[str, str] = {}
    prompts: dict[str, dict[str, int]] = {}
    for size, tokens in PROMPT_SIZES.items():
        chats[size] = Chat(tokens, lambda text: len(path.tokenize(text)))
        texts[size] = path.text(msgspec.json.decode(chats[size].body))
        prompts[size] = await _check_path(path, chats[size], texts[size])
        say(f"  {size}: {prompts[size]}")
    cases = [(size, warmth) for size in PROMPT_SIZES for warmth in WARMTHS]
    rng = random.Random(3)
    wholes: dict[tuple[str, str], list[float]] = {case: [] for case in cases}
    stages: dict[tuple[str, str], list[dict[str, float]]] = {case: [] for case in cases}
    again: dict[str, list[float]] = {size: [] for size in PROMPT_SIZES}  # the same request right after: warm, always
    full: dict[str, list[float]] = {size: [] for size in PROMPT_SIZES}
    gc.collect()
    gc.freeze()
    for turn in range(repeats):
        rng.shuffle(cases)
        for size, warmth in cases:
            if size == "60k" and turn % 4:
                continue  # takes most of the time and varies least
            chat = chats[size]
            path.prepare(chat, warmth)
            start = time.perf_counter_ns()
            await path.whole(chat)
            wholes[size, warmth].append((time.perf_counter_ns() - start) / NS_PER_US)
            start = time.perf_counter_ns()
            await path.whole(chat)
            again[size].append((time.perf_counter_ns() - start) / NS_PER_US)
            path.prepare(chat, warmth)
            stages[size, warmth].append(path.stages(chat))
            full[size].append(timed(partial(path.tokenize, texts[size]))[0])
        if turn % max(repeats // 4, 1) == 0:
            say(f"  path {turn}/{repeats}")
    gc.unfreeze()
    report: dict[str, Any] = {}
    for size in PROMPT_SIZES:
        tokenizing = median(full[size])
        report[size] = {**prompts[size], "full_tokenization_us": rounded(tokenizing)}
        for warmth in WARMTHS:
            whole = median(wholes[size, warmth])
            report[size][warmth] = {
                "stages_us": {s: rounded(median([us[s] for us in stages[size, warmth]])) for s in STAGES},
                "whole_us": rounded(whole),
                "whole_p10_us": rounded(p10(wholes[size, warmth])),
                "whole_to_full_tokenization": rounded(whole / tokenizing),
                "times_faster_than_full_tokenization": rounded(tokenizing / whole),
            }
        report[size]["again"] = {
            "whole_us": rounded(median(again[size])),
            "whole_to_full_tokenization": rounded(median(again[size]) / tokenizing),
            "times_faster_than_full_tokenization": rounded(tokenizing / median(again[size])),
        }
    return report


async def _check_path(path: ReadPath, chat: Chat, text: str) -> dict[str, int]:
    """Give replica r the first (r + 1)/n of the prompt; whatever the store knows, the scores must say so."""
    spec = path.spec
    ids = path.tokenize(text)
    keys = block_keys(pack_tokens(ids), spec.block_size, namespace_key(spec.model, spec.block_size))
    domains = path.index.domains()
    expected: dict[PodId, float] = {}
    for r, domain in enumerate(domains):
        assert domain.pod is not None
        count = len(keys) // KEY_BYTES * (r + 1) // len(domains)
        path.index.add(domain.id, domain.epoch, GPU, keys[: count * KEY_BYTES])
        expected[domain.pod] = float(count * spec.block_size)
    known = 0
    for warmth in WARMTHS:
        path.prepare(chat, warmth)
        scored = await path.whole(chat)
        assert scored.scores == expected, f"{warmth}: scores are {scored.scores}, not {expected}"
        assert scored.found.prompt_tokens == len(ids), f"{warmth}: {scored.found.prompt_tokens} tokens, not {len(ids)}"
        known = scored.found.known_tokens if warmth == "90% warm" else known
    return {"tokens": len(ids), "body_bytes": len(chat.body), "known_tokens_when_90%_warm": known}


# -- the next turn of a long conversation ------------------------------------------------------------------------------


async def bench_next_turn(spec: EngineSpec, repeats: int) -> dict[str, Any]:
    """An answer and a question more in a conversation of `TURNS` messages that is known, in turns: rendered from where
    the last turn ended, and whole, as transformers renders it. All of it is on the event loop, but for reading JSON.
    """
    services = {name: PromptService(PrefixStore(STORE_BYTES)) for name in ("resumed", "whole")}
    encoders = {name: await service.encoder(spec) for name, service in services.items()}
    whole = encoders["whole"]._renderer
    whole._whole_only.add(whole.template(None))
    report: dict[str, Any] = {}
    for name, chars in TURN_CHARS.items():
        messages = _turns(chars)
        us: dict[str, list[float]] = {"json": [], **{which: [] for which in services}}
        tokens = 0
        for service in services.values():
            await service.encode({"model": MODEL, "messages": messages}, spec)
        gc.collect()
        gc.freeze()
        for turn in range(repeats):
            question = {"role": "user", "content": f"And what of point {turn}?"}
            raw = json.dumps({"model": MODEL, "messages": [*messages, *_turns(chars)[1:2], question]}).encode()
            spent, body = timed(partial(msgspec.json.decode, raw))
            us["json"].append(spent)
            keys = {}
            for which in random.sample(list(services), 2):
                start = time.perf_counter_ns()
                (keys[which],) = await services[which].encode(body, spec)
                us[which].append((time.perf_counter_ns() - start) / NS_PER_US)
            assert keys["resumed"].keys == keys["whole"].keys, "the next turn has other keys than the whole prompt"
            tokens = keys["whole"].token_count
        gc.unfreeze()
        report[name] = {
            "messages": TURNS + 2,
            "tokens": tokens,
            "us": {which: {"median": rounded(median(t)), "p10": rounded(p10(t))} for which, t in us.items()},
            "resumed_to_whole": rounded(median(us["resumed"]) / median(us["whole"])),
        }
    return report


def _turns(chars: int) -> list[dict[str, str]]:
    from pydoc_data.topics import topics

    text = "\n".join(topics[name] for name in sorted(topics))
    return [
        {"role": ("user", "assistant")[i % 2], "content": text[i * chars : (i + 1) * chars].strip()}
        for i in range(TURNS)
    ]


# -- memory, each in a process of its own -----------------------------------------------------------------------------


def rss_bytes() -> int:
    """Resident memory, after what is free has been given back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def measure_memory(what: str, blocks: int) -> dict[str, float]:
    """Growth of RSS per indexed block, or per byte that the prefix store accounts for."""
    if what == "prefix_store":
        return _prefix_store_memory(blocks)
    fleet = make_fleet(blocks, [8])
    if what == "index":
        before = rss_bytes()
        index = MemoryIndex()
        fill_index(index, fleet, 8, EngineSpec(MODEL, BLOCK_SIZE, ""))
        held = sum(index.block_counts().values())
    else:
        core, _ = import_dynamo()
        hashes = [core.compute_block_hash_for_seq(array("I", p).tolist(), BLOCK_SIZE) for p in fleet.prompts]
        before = rss_bytes()
        tree = DynamoTree(core, fleet, hashes, 8)
        assert tree.scores(hashes[0])
        held = fleet.blocks
    return {"blocks": held, "rss_bytes": (grown := rss_bytes() - before), "bytes_per_block": rounded(grown / held)}


def _prefix_store_memory(tokens_in_blocks: int) -> dict[str, float]:
    """Segments as a chat has them: 150 tokens each, 20 in a prompt."""
    rng = random.Random(4)
    root = namespace_key(MODEL, BLOCK_SIZE)
    before = rss_bytes()
    store = PrefixStore(STORE_BYTES)
    tokens = 0
    while tokens < tokens_in_blocks * BLOCK_SIZE // 4:
        segments = [Segment(f"{rng.random()} {tokens} {i}") for i in range(20)]
        lookup = store.lookup(root, segments, BLOCK_SIZE)
        store.complete(lookup, [rng.randbytes(4 * rng.randint(80, 220)) for _ in segments])
        tokens += 20 * 150
    grown = rss_bytes() - before
    stats = store.stats()
    return {
        "entries": stats.entries,
        "rss_bytes": grown,
        "accounted_bytes": stats.bytes,
        "rss_to_accounted": rounded(grown / stats.bytes),
        "bytes_per_token": rounded(grown / tokens),
    }


def in_own_process(what: str, blocks: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--memory", what, "--blocks", str(blocks)]
    out = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
    return dict(json.loads(out.splitlines()[-1]))


# -- report -----------------------------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_gib": round(memory / 2**30),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "load_average_at_start": round(os.getloadavg()[0], 1),
    }


def targets(report: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The targets of the read path, what was measured, and whether that is enough."""
    of_9k = report["path"]["9k"]
    rows: dict[str, tuple[float, float | None]] = {
        "warm 9k: whole / full tokenization, first": (1 / 50, of_9k["warm"]["whole_to_full_tokenization"]),
        "warm 9k: whole / full tokenization, again": (1 / 50, of_9k["again"]["whole_to_full_tokenization"]),
        "bytes per indexed block": (150, report["memory"]["index"]["bytes_per_block"]),
    }
    for replicas in (8, 64):
        ratios = report["match"].get("ratio_to_dynamo", {}).get(f"match {replicas} first")
        rows[f"match / Dynamo's find_matches, {replicas} replicas"] = (0.5, ratios["median"] if ratios else None)
    return {
        name: {"at_most": most, "measured": value, "met": None if value is None else value <= most}
        for name, (most, value) in rows.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the blocks, few repeats: does it run at all?")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/read_path.json", help="JSON to write")
    parser.add_argument("--memory", choices=("index", "prefix_store", "dynamo"), help=argparse.SUPPRESS)
    parser.add_argument("--choice", action="store_true", help="only the choice, into an existing --output")
    parser.add_argument("--turns", action="store_true", help="only the next turn, into an existing --output")
    parser.add_argument("--blocks", type=int, help="distinct blocks in the index (default: 1,000,000)")
    args = parser.parse_args()
    blocks = args.blocks or (100_000 if args.quick else 1_000_000)
    if args.memory:
        print(json.dumps(measure_memory(args.memory, blocks)))
        return
    report: dict[str, Any] = {"machine": machine(), "quick": args.quick, "block_size": BLOCK_SIZE}
    if (args.choice or args.turns) and args.output.exists():
        report = json.loads(args.output.read_text())
    spec = EngineSpec(MODEL, BLOCK_SIZE, resolve_model("builtin:smollm2-135m-instruct"))
    if not args.choice:
        say("the next turn of a long conversation")
        load = round(os.getloadavg()[0], 1)
        report["next_turn"] = {**asyncio.run(bench_next_turn(spec, 10 if args.quick else 200)), "load_average": load}
        say(json.dumps(report["next_turn"], indent=2))
    if args.turns:
        args.output.write_text(json.dumps(report, indent=2) + "\n")
        return
    if not args.choice:
        say("memory, each in a process of its own")
        measured = ["index", "prefix_store"] + ["dynamo"] * (import_dynamo()[0] is not None)
        report["memory"] = {what: in_own_process(what, blocks) for what in measured}
    say(f"filling indexes of {blocks:,} blocks")
    fleet = make_fleet(blocks, (8, 64))
    indexes = {replicas: MemoryIndex() for replicas in (8, 64)}
    for replicas, index in indexes.items():
        fill_index(index, fleet, replicas, spec)
    say("choice")
    report["choice"] = {
        **bench_choice(fleet, indexes, 40 if args.quick else 2000),
        "load_average": round(os.getloadavg()[0], 1),
    }
    say(json.dumps(report["choice"], indent=2))
    if not args.choice:
        bench_reads(report, fleet, indexes, spec, args.quick)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(report, indent=2) + "\n")
    say(f"written: {args.output}")


def bench_reads(
    report: dict[str, Any], fleet: Fleet, indexes: Mapping[int, MemoryIndex], spec: EngineSpec, quick: bool
) -> None:
    """Index match and whole path, and what they are to reach, into `report`."""
    say("index match")
    report["match"] = bench_match(fleet, indexes, 20 if quick else 400)
    say("whole path")
    report["path"] = asyncio.run(bench_path(indexes[8], spec, 4 if quick else 80))
    report["targets"] = targets(report)
    say(json.dumps({k: report[k] for k in ("memory", "targets")}, indent=2))


if __name__ == "__main__":
    main()
