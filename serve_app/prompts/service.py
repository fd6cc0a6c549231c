"""The prompt stage: request body -> block keys, with cold text tokenized off the event loop.

Short cold text is tokenized on the spot. Longer text (a millisecond and more) goes to threads, or to whatever
`tokenize` is. The request waits for it up to a deadline; then what is known of the prompt has to do for its decision,
and the tokens arrive for the next one. Requests that come meanwhile with the same text, or with text that starts with
it, wait for the same tokens: each segment is tokenized once.

    request 1   [system prompt][document][question 1]     tokenizes all three segments
    request 2   [system prompt][document][question 2]     waits for two of them, tokenizes the third

What is taken on and not done yet is bounded: beyond, a prompt is what is known of it, and its cold text is left alone.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import Any

from serve_app.errors import PromptError
from serve_app.once import RETRY_S, Once
from serve_app.prompts.encoder import CHARS_PER_TOKEN, Prepared, PromptEncoder
from serve_app.prompts.prefix_store import EncodedPrompt, PrefixStore
from serve_app.prompts.tokenizer import Segment
from serve_app.types import EncodedKeys, EngineSpec, TokenizerSource

logger = logging.getLogger(__name__)

INLINE_CHARS = 4_000  # under a millisecond
# Of cold text that is given to the threads and not tokenized yet: some 4 s of one thread, which does 60,414 tokens in
# 55 ms (docs/benchmarks.md), so about 4.4M characters/s. Behind more, text would be tokenized long after its request.
MAX_PENDING_CHARS = 16 * 2**20

MAX_PREPARING = 8  # large requests at a time, of which one is worked on
# What a request on the loop may have: parsing, rendering and naming it takes some 3 ms then.
LIGHT_ITEMS = 4_000  # values in its JSON, however deep
LIGHT_CHARS = 2**20  # in its strings
LIGHT_IDS = 60_000  # token ids, which are packed and hashed, no more

Tokenize = Callable[[TokenizerSource, Sequence[Segment]], Awaitable[list[bytes]]]
"""(tokenizer, segments) -> packed token ids of each segment, made elsewhere."""

_Coming = tuple[asyncio.Task[list[bytes]], int]
"""A segment's ids to be: those of several segments, and its place among them."""

_Outcome = EncodedPrompt | asyncio.Task[EncodedPrompt] | None
"""A prompt's keys, there or to be; None: its cold text was not taken on."""


class PromptService:
    """Used on one event loop. Loading a tokenizer takes seconds and is done once per engine spec, in a thread.

    Args:
        store: what is known of prompts.
        tokenize: where cold text goes; None means threads of this process (the tokenizer releases the GIL).
        deadline_s: how long a request waits for its cold text; None means until it is there. With a deadline it does
            not wait for the tokenizer to be loaded either: there is none until then.
        inline_chars: of a request, shorter cold text is tokenized on the spot.
        max_pending_chars: beyond it no further cold text is taken on; the known prefix decides.
    """

    def __init__(
        self,
        store: PrefixStore,
        tokenize: Tokenize | None = None,
        deadline_s: float | None = None,
        inline_chars: int = INLINE_CHARS,
        max_pending_chars: int = MAX_PENDING_CHARS,
    ) -> None:
        self.store = store
        self.encoder: Once[EngineSpec, PromptEncoder] = Once(self._load)
        self._tokenize = tokenize
        self._deadline_s = deadline_s
        self._inline_chars = inline_chars
        self._max_pending_chars = max_pending_chars
        self._pending_chars = 0
        # Half of the cores at most, so that a burst of cold prompts leaves the event loop one of its own.
        self._threads = ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 2), "kvcache-tokenize")
        self._preparers = ThreadPoolExecutor(1, "kvcache-prepare")
        self._preparing = 0
        self._coming: dict[bytes, _Coming] = {}  # by the segment's digest
        self._tasks: set[asyncio.Task[EncodedPrompt]] = set()

    async def encode(self, body: Mapping[str, Any], spec: EngineSpec) -> list[EncodedKeys]:
        """Block keys of every prompt in the request; of one whose tokens are late, those that are known.

        Raises:
            PromptError: there is nothing that can be scored; "tokenizer_loading" and "no_tokenizer": not now.
        """
        encoder = await self._loaded(spec)
        prompts = encoder.prepare(body) if is_light(body) else await self._prepare_elsewhere(encoder, body)
        inline = sum(_chars(prepared.missing) for prepared in prompts) < self._inline_chars
        started = [self._start(encoder, prepared, inline) for prepared in prompts]
        tasks = [task for _, task in started if isinstance(task, asyncio.Task)]
        if tasks:
            await asyncio.wait(tasks, timeout=self._deadline_s)
        return [_result(encoder, prepared, done) for prepared, done in started]

    def _load(self, spec: EngineSpec) -> PromptEncoder:
        """In a thread. Logs its failure here, once, since any number of requests, or none, may be waiting for it."""
        try:
            encoder = PromptEncoder(spec, self.store)
            if differing := encoder.differing():
                raise PromptError("unknown_prompt", _unlike(spec, differing))
            return encoder
        except PromptError as error:
            logger.error("kvcache: no request is scored: %s; looked at again after %.0f s", error, RETRY_S)
            raise
        except Exception:
            logger.exception(
                "kvcache: tokenizer %r cannot be loaded, so no request is scored; the first after %.0f s tries again",
                spec.tokenizer,
                RETRY_S,
            )
            raise

    async def _loaded(self, spec: EngineSpec) -> PromptEncoder:
        loading = self.encoder.start(spec)
        if self._deadline_s is not None and not loading.done():
            raise PromptError("tokenizer_loading", f"the tokenizer {spec.tokenizer!r} is being loaded")
        try:
            return await asyncio.shield(loading)
        except PromptError:
            raise
        except Exception as error:
            raise PromptError("no_tokenizer", f"the tokenizer cannot be loaded: {error}") from error

    async def _prepare_elsewhere(self, encoder: PromptEncoder, body: Mapping[str, Any]) -> list[Prepared]:
        """Of a body that would hold the loop for long. It takes what time it takes: the caller has a deadline.

        Raises:
            PromptError: also "prepare_busy": as many as there may be are under way.
        """
        if self._preparing >= MAX_PREPARING:
            raise PromptError("prepare_busy", f"{MAX_PREPARING} large requests are being prepared")
        self._preparing += 1
        work = asyncio.get_running_loop().run_in_executor(self._preparers, encoder.prepare, body)
        work.add_done_callback(self._prepared)  # with the work, not with who waits for it
        return await asyncio.shield(work)

    def _prepared(self, work: asyncio.Future[list[Prepared]]) -> None:
        self._preparing -= 1
        if not work.cancelled():
            work.exception()  # who has given up waiting does not look

    def _start(self, encoder: PromptEncoder, prepared: Prepared, inline: bool) -> tuple[Prepared, _Outcome]:
        if inline or not _chars(prepared.missing):
            return prepared, encoder.finish(prepared, encoder.tokenize(prepared.missing))
        coming = self._order(encoder, prepared)
        if coming is None:
            return prepared, None
        task = asyncio.ensure_future(_complete(encoder, prepared, coming))
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return prepared, task

    def _order(self, encoder: PromptEncoder, prepared: Prepared) -> list[_Coming] | None:
        """Have the missing segments tokenized, but for those that another request is waiting for already.

        None: it would be too much. With nothing else pending, no text is too much.
        """
        cold = dict(zip(prepared.missing_digests, prepared.missing, strict=True))
        new = [digest for digest in cold if digest not in self._coming]
        if new:
            segments = [cold[digest] for digest in new]
            chars = _chars(segments)
            if self._pending_chars and self._pending_chars + chars > self._max_pending_chars:
                return None
            self._pending_chars += chars
            ids = asyncio.ensure_future(self._elsewhere(encoder, segments))
            self._coming.update({digest: (ids, place) for place, digest in enumerate(new)})
            ids.add_done_callback(lambda _: self._arrived(new, chars))
        return [self._coming[digest] for digest in cold]

    async def _elsewhere(self, encoder: PromptEncoder, segments: Sequence[Segment]) -> list[bytes]:
        if self._tokenize is not None:
            return await self._tokenize(encoder.spec.source, segments)
        return await asyncio.get_running_loop().run_in_executor(self._threads, encoder.tokenize, segments)

    def _arrived(self, digests: Sequence[bytes], chars: int) -> None:
        self._pending_chars -= chars
        for digest in digests:
            del self._coming[digest]

    def _done(self, task: asyncio.Task[EncodedPrompt]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.warning("kvcache: cold text could not be tokenized, known prefixes decide: %r", error)


def is_light(body: Mapping[str, Any]) -> bool:
    """Whether to prepare it takes no more than some milliseconds. Looks at no more than `LIGHT_ITEMS` values.

    Level by level, since that is a third of the time of going from value to value; JSON has no mapping but `dict`.
    """
    items, chars, ids = 0, 0, 0
    level: list[Any] = [body]
    while level:
        items += sum(map(len, level))
        if items > LIGHT_ITEMS:
            return False
        values = [*chain.from_iterable([v if type(v) is list else v.values() for v in level])]
        chars += sum([len(v) for v in values if type(v) is str])
        within = [v for v in values if type(v) is dict or type(v) is list]
        level = [v for v in within if type(v) is dict or not v or type(v[0]) is not int]
        if len(level) < len(within):
            ids += sum([len(v) for v in within if type(v) is list and v and type(v[0]) is int])
        if chars > LIGHT_CHARS or ids > LIGHT_IDS:
            return False
    return True


def _unlike(spec: EngineSpec, parts: Sequence[str]) -> str:
    return (
        f"prompts made here are not the engine's: {', '.join(parts)} of {spec.tokenizer!r} "
        f"(revision {spec.revision or 'main'}) differ; give the router the engine's files and versions"
    )


async def _complete(encoder: PromptEncoder, prepared: Prepared, coming: Sequence[_Coming]) -> EncodedPrompt:
    return encoder.finish(prepared, [(await ids)[place] for ids, place in coming])


def _result(encoder: PromptEncoder, prepared: Prepared, done: _Outcome) -> EncodedKeys:
    if done is None:
        return _known(encoder, prepared, "tokenizer_busy")
    if isinstance(done, asyncio.Task):
        if not done.done() or done.cancelled() or done.exception() is not None:
            return _known(encoder, prepared, "tokens_late")
        done = done.result()
    tokens = done.token_count + prepared.unknown_tokens
    return EncodedKeys(done.block_keys, tokens, done.cached_token_count, prepared.incomplete)


def _known(encoder: PromptEncoder, prepared: Prepared, why: str) -> EncodedKeys:
    known = encoder.known(prepared)
    guess = _chars(prepared.missing) // CHARS_PER_TOKEN + prepared.unknown_tokens
    return EncodedKeys(known.block_keys, known.token_count + guess, known.token_count, why)


def _chars(segments: Sequence[Segment]) -> int:
    return sum(len(segment.text) for segment in segments)
