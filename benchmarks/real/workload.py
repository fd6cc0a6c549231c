"""What is sent: scenarios, as data that is complete before the first request.

In: a tokenizer, and how large. Out: `Scenario`s; a scenario is one or two phases with something happening in between, a
phase is chains that run side by side, a chain is requests that follow one another. The assistant's turns in the history
are fixed texts, not what an engine answered, so that every system gets the same bytes.

    base            8 documents are talked about on two engines whose caches together just hold them
    engine_reset    half-way one engine loses its cache
    router_restart  half-way the router is started anew; the engines keep what they hold
    bypass          the first question about each document goes to an engine directly, past the router
    zipf            more documents than fit, some asked about often and many seldom
    lmcache         the same with an LMCache server, that both engines store to and load from
    two_routers     two routers in front of three engines, whose caches together just hold the documents
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, Final

from tokenizers import Tokenizer

from serve_app.blocks import split_keys
from serve_app.demo import QUESTIONS
from serve_app.prompts.encoder import PromptEncoder
from serve_app.prompts.prefix_store import PrefixStore
from serve_app.types import EngineSpec, ModelId

BLOCK_SIZE: Final = 32
ANSWER_TOKENS: Final = 24
_CHARS_PER_TOKEN: Final = 8  # more than any text here has
_SEED: Final = 7

_ANSWER: Final = (
    "It explains how this part of the language works, which rules apply to it, and what to look out for. ({})"
)


class Name(StrEnum):
    BASE = "base"
    ENGINE_RESET = "engine_reset"
    ROUTER_RESTART = "router_restart"
    BYPASS = "bypass"
    ZIPF = "zipf"
    LMCACHE = "lmcache"
    TWO_ROUTERS = "two_routers"


@dataclass(frozen=True, slots=True)
class Shape:
    """Of the fleet that a scenario wants. Fleets take up to a minute to start: scenarios of one shape share one."""

    engines: int = 2
    routers: int = 1
    lmcache: bool = False


class Between(StrEnum):
    """What happens after the first phase."""

    NOTHING = "nothing"
    RESET_ENGINE = "the first engine's cache is reset"
    RESTART_ROUTER = "the router is started anew"


@dataclass(frozen=True, slots=True)
class Ask:
    document: int
    turn: int
    messages: list[dict[str, str]]
    engine: int | None = None  # asked directly, past the router


@dataclass(frozen=True, slots=True)
class Chain:
    asks: list[Ask]
    start_s: float = 0.0  # after the phase has begun


@dataclass(frozen=True, slots=True)
class Scenario:
    name: Name
    title: str
    phases: list[list[Chain]]
    between: Between = Between.NOTHING
    shape: Shape = Shape()

    def asks(self) -> list[list[Ask]]:
        """All requests of each phase, turn after turn, as an engine would see them."""
        return [
            [
                chain.asks[i]
                for i in range(max(len(chain.asks) for chain in phase))
                for chain in phase
                if i < len(chain.asks)
            ]
            for phase in self.phases
        ]


@dataclass(frozen=True, slots=True)
class Size:
    """Documents and caches go together: two engines' caches just hold all documents and what is said of them."""

    documents: int = 8
    document_tokens: int = 1280
    turns: int = 6
    kv_blocks: int = 230  # of each engine
    start_every_s: float = 2.5  # about what it takes to compute one document where the CPU has bfloat16
    zipf_documents: int = 24
    zipf_chains: int = 3
    zipf_asks: int = 16  # of each chain
    lmcache_documents: int = 14

    @classmethod
    def quick(cls) -> Size:
        return cls(
            documents=4, turns=4, kv_blocks=115, zipf_documents=12, zipf_chains=2, zipf_asks=8, lmcache_documents=8
        )


def scenarios(size: Size, model_path: str) -> list[Scenario]:
    """All of them, each about documents of its own: no cache, and no router, has seen them in another one."""
    tokenizer = Tokenizer.from_file(str(Path(model_path) / "tokenizer.json"))
    three_hold = size.documents * 3 // 2
    count = 4 * size.documents + size.zipf_documents + size.lmcache_documents + three_hold
    texts = _documents(tokenizer, count, size.document_tokens)

    def take(count: int) -> list[str]:
        taken, texts[:count] = texts[:count], []
        return taken

    def talks(turns: range, documents: Sequence[str], *, direct: bool = False) -> list[Chain]:
        return [
            Chain(
                [Ask(i, turn, _talk(text, turn), i % Shape().engines if direct else None) for turn in turns],
                i * size.start_every_s if turns.start == 0 else 0.0,
            )
            for i, text in enumerate(documents)
        ]

    half, short = size.turns // 2 - 1, size.turns - 2  # the other scenarios are shorter: there are many of them
    base = Scenario(Name.BASE, "conversations", [talks(range(size.turns), take(size.documents))])
    documents = take(size.documents)
    reset = Scenario(
        Name.ENGINE_RESET,
        "one engine's cache is reset half-way",
        [talks(range(half), documents), talks(range(half, short), documents)],
        Between.RESET_ENGINE,
    )
    documents = take(size.documents)
    restart = Scenario(
        Name.ROUTER_RESTART,
        "the router is restarted half-way",
        [talks(range(half), documents), talks(range(half, short), documents)],
        Between.RESTART_ROUTER,
    )
    documents = take(size.documents)
    bypass = Scenario(
        Name.BYPASS,
        "first turns reach the engines past the router",
        [talks(range(1), documents, direct=True), talks(range(1, short), documents)],
    )
    documents = take(size.zipf_documents)
    zipf = Scenario(Name.ZIPF, f"Zipf: {len(documents)} documents, more than fit", [_zipf(size, documents)])
    documents = take(size.lmcache_documents)
    lmcache = Scenario(
        Name.LMCACHE,
        f"Zipf with LMCache: {len(documents)} documents, more than the engines hold",
        [_zipf(size, documents)],
        shape=Shape(lmcache=True),
    )
    two_routers = Scenario(
        Name.TWO_ROUTERS,
        "two routers, three engines",
        [talks(range(short), take(three_hold))],
        shape=Shape(engines=3, routers=2),
    )
    return [base, reset, restart, bypass, zipf, lmcache, two_routers]


def oracle(scenario: Scenario, model_path: str, model: str, lost: Collection[int] = ()) -> tuple[int, int]:
    """Prompt tokens of what passes the router, and how many of them one cache that never forgets would have had.

    Whole blocks, and never the whole prompt, which is vLLM's rule: its last token must be computed.

    Args:
        lost: documents that no engine holds any more when the second phase begins.
    """
    encoder = PromptEncoder(EngineSpec(ModelId(model), BLOCK_SIZE, model_path), PrefixStore(1 << 28))
    seen: set[bytes] = set()
    of_document: dict[int, set[bytes]] = defaultdict(set)
    prompt_tokens = cached_tokens = 0
    for number, asks in enumerate(scenario.asks()):
        if number == 1:
            seen.difference_update(*(of_document[document] for document in lost))
        for ask in asks:
            (encoded,) = encoder.encode({"model": model, "messages": ask.messages})
            keys = [bytes(key) for key in split_keys(encoded.block_keys)]
            held = next((i for i, key in enumerate(keys) if key not in seen), len(keys))
            if ask.engine is None:
                prompt_tokens += encoded.token_count
                cached_tokens += min(held, (encoded.token_count - 1) // BLOCK_SIZE) * BLOCK_SIZE
            seen.update(keys)
            of_document[ask.document].update(keys)
    return prompt_tokens, cached_tokens


def _talk(document: str, turn: int) -> list[dict[str, str]]:
    """Messages of the request that asks question `turn`."""
    messages = [{"role": "system", "content": document}]
    for i in range(turn):
        messages.append({"role": "user", "content": QUESTIONS[i % len(QUESTIONS)]})
        messages.append({"role": "assistant", "content": _ANSWER.format(i + 1)})
    return [*messages, {"role": "user", "content": QUESTIONS[turn % len(QUESTIONS)]}]


def _zipf(size: Size, documents: list[str]) -> list[Chain]:
    """One question per request; document k is asked about with weight 1/k."""
    draw = random.Random(_SEED)
    weights = [1 / (k + 1) for k in range(len(documents))]
    asked = [0] * len(documents)
    chains: list[Chain] = []
    for _ in range(size.zipf_chains):
        asks = []
        for number in draw.choices(range(len(documents)), weights, k=size.zipf_asks):
            question = {"role": "user", "content": QUESTIONS[asked[number] % len(QUESTIONS)]}
            asks.append(Ask(number, asked[number], [{"role": "system", "content": documents[number]}, question]))
            asked[number] += 1
        chains.append(Chain(asks))
    return chains


def _documents(tokenizer: Any, count: int, tokens: int) -> list[str]:
    """English texts of just so many tokens that are on every machine: the topics of Python's help.

    All different from the first line on, so that no two share a block; the text below it may come again.
    """
    corpus = " ".join(" ".join(topics[name].split()) for name in sorted(topics))
    documents, at = [], 0
    for i in range(count):
        at = at if at + tokens * _CHARS_PER_TOKEN <= len(corpus) else 0
        text = f"Document {i}.\n{corpus[at : at + tokens * _CHARS_PER_TOKEN]}"
        encoding = tokenizer.encode(text, add_special_tokens=False)
        if len(encoding.ids) < tokens:
            raise ValueError(f"Python's help is too short for a document of {tokens} tokens")
        end = encoding.offsets[tokens - 1][1]
        documents.append(text[:end])
        at += end
    return documents
