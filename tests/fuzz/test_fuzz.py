"""Whatever comes in, only the errors that are meant come out: 1,000 inputs a surface here, 10,000 in `make fuzz`.

Inputs are real ones with parts exchanged, and made-up ones. Hypothesis keeps what failed, and tries it first.
"""

from __future__ import annotations

import contextlib
import gc
import os
import time
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from vllm.distributed.kv_events import BlockRemoved, BlockStored, KVEventBatch

from serve_app.access import Access, AccessDenied, read_keys
from serve_app.commands.configs import load_config
from serve_app.config import GraphArgs, LLMArgs, RouterSettings
from serve_app.errors import ConfigError, PromptError, RecordNotUnderstood, WireError
from serve_app.events.engine_blocks import Added, Cleared, EngineBlocks, Removed
from serve_app.events.lmcache_source import decode_records
from serve_app.events.wire import decode_batch
from serve_app.index.keyspace import (
    DomainRecord,
    HeartbeatRecord,
    LogRecord,
    decode_domain,
    decode_heartbeat,
    decode_log,
    encode,
)
from serve_app.limits import LimitExceeded, Limits, check_prompts, parse
from serve_app.prompts.encoder import PromptEncoder
from serve_app.prompts.prefix_store import PrefixStore
from serve_app.prompts.service import is_light
from serve_app.types import ID_MAX_CHARS, DomainId, EngineSpec, ModelId, short_id
from tests.helpers import MODEL, keys, pod
from tests.unit.prompts.conftest import write_model

INPUTS = int(os.environ.get("KVCACHE_FUZZ", "1000"))
LOOP_GAP_S = 0.05
STORE_BYTES = 1 << 20
fuzz = settings(
    max_examples=INPUTS,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)

TEXT = st.text(st.characters(), max_size=12) | st.sampled_from(["user", "assistant", "system", "tool", "\ud800", "\0"])
SCALAR = st.none() | st.booleans() | st.integers(-(2**65), 2**65) | st.floats() | TEXT
_WORDS = """
model messages prompt input role content tools tool_choice tool_calls function name parameters type text system
instructions previous_response_id chat_template chat_template_kwargs documents token_ids features cache_salt
add_special_tokens truncate_prompt_tokens max_tokens n stream image_url source reasoning_effort kv_transfer_params
prompt_embeds suffix thinking tool_use_id arguments output summary
"""
FIELDS = st.sampled_from(_WORDS.split())
JSON = st.recursive(
    SCALAR,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(FIELDS | TEXT, inner, max_size=6),
    max_leaves=25,
)
MESSAGE = st.fixed_dictionaries(
    {}, optional={"role": TEXT, "content": JSON, "tool_calls": JSON, "name": JSON, "type": TEXT}
)
BODY = st.dictionaries(FIELDS, JSON, max_size=8) | st.fixed_dictionaries(
    {"messages": st.lists(MESSAGE, max_size=5)},
    optional={"tools": JSON, "system": JSON, "chat_template_kwargs": JSON, "model": TEXT, "max_tokens": JSON},
)
RAW = st.binary(max_size=200)


def packed(real: bytes) -> st.SearchStrategy[bytes]:
    """Something like `real`: bytes of it exchanged, or fields, or none of it."""

    @st.composite
    def cut(draw: st.DrawFn) -> bytes:
        data = bytearray(real)
        for _ in range(draw(st.integers(0, 4))):
            data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
        return bytes(data[: draw(st.integers(0, len(data)))]) if draw(st.booleans()) else bytes(data)

    @st.composite
    def refilled(draw: st.DrawFn) -> bytes:
        whole = [msgspec.msgpack.decode(real, strict=False)]
        for _ in range(draw(st.integers(1, 3))):
            into: Any = whole
            while True:  # down a random way
                place = draw(st.sampled_from(sorted(into, key=str) if isinstance(into, dict) else range(len(into))))
                if not (isinstance(into[place], list | dict) and into[place] and draw(st.booleans())):
                    break
                into = into[place]
            into[place] = draw(JSON)
        try:
            return msgspec.msgpack.encode(whole[0])
        except (TypeError, ValueError, OverflowError, UnicodeEncodeError):
            assume(False)
            raise

    return RAW | cut() | refilled()


# -- requests ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> PromptEncoder:
    path = write_model(tmp_path_factory.mktemp("chatml"))
    return PromptEncoder(EngineSpec(ModelId("m"), 16, path), PrefixStore(STORE_BYTES))


@fuzz
@given(BODY)
def test_bodies(encoder: PromptEncoder, body: dict[str, Any]) -> None:
    on_the_loop = is_light(body)
    spent_s = min(_encode(encoder, body), _encode(encoder, body))  # the first may have met the garbage collector
    assert spent_s < LOOP_GAP_S or not on_the_loop


def _encode(encoder: PromptEncoder, body: dict[str, Any]) -> float:
    """Seconds of this thread's own, which a busy machine does not make more of."""
    started_s = time.thread_time()
    with contextlib.suppress(PromptError):
        prompts = encoder.encode(body)
        assert all(len(prompt.block_keys) // 8 == prompt.token_count // 16 for prompt in prompts)
    return time.thread_time() - started_s


def test_memory_is_back_where_it_was(encoder: PromptEncoder) -> None:
    @settings(fuzz, max_examples=max(INPUTS // 20, 20), database=None)
    @given(BODY)
    def feed(body: dict[str, Any]) -> None:
        _encode(encoder, body)

    feed()  # what is kept for the next request is there now
    tracemalloc.start()
    try:
        before = _memory()
        feed()
        assert _memory() - before < STORE_BYTES + 2**20
    finally:
        tracemalloc.stop()


def _memory() -> int:
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


@fuzz
@given(
    RAW | BODY.map(lambda body: repr(body).encode("utf-8", "replace")) | st.sampled_from([b"[" * 5000, b'{"a":' * 900])
)
def test_score_bodies(raw: bytes) -> None:
    limits = Limits()
    with contextlib.suppress(PromptError, LimitExceeded):
        check_prompts(parse(raw, limits), limits)


@fuzz
@given(
    st.text(max_size=400), st.dictionaries(st.sampled_from(["authorization", "x-session-id"]), st.text(max_size=300))
)
def test_headers(given_id: str, headers: dict[str, str]) -> None:
    short = short_id(given_id)
    assert len(short) <= max(len(given_id), 0) or len(short) == ID_MAX_CHARS
    assert len(short) <= ID_MAX_CHARS
    assert short_id(short) == short
    access = Access("")
    access._path = Path("nowhere")  # keys are set, and this is none of them
    with pytest.raises(AccessDenied):
        access.caller(headers, 0.0)


# -- engines ----------------------------------------------------------------------------------------------------------

_EVENTS = msgspec.msgpack.encode(
    KVEventBatch(
        ts=0.0,
        events=[
            BlockStored([1, 2], None, list(range(32)), 16, None, "GPU", None, None, 0, "full_attention", None),
            BlockStored([3], 2, list(range(16)), 16, None, "CPU", "lora", [("salt",)], 1, "sliding_window", 64),
            BlockRemoved([1], "GPU"),
        ],
    )
)


@fuzz
@given(st.lists(packed(_EVENTS), max_size=6))
def test_event_frames(frames: list[bytes]) -> None:
    """What a reader of the changes has is what the publisher has."""
    blocks = EngineBlocks(MODEL, 16, 100)
    held: dict[str, set[bytes]] = {}
    for frame in frames:
        try:
            events = decode_batch(frame).events
        except WireError:
            continue
        for change in blocks.apply(events):
            match change:
                case Added(tier, packed_keys):
                    held.setdefault(tier, set()).update(packed_keys[i : i + 8] for i in range(0, len(packed_keys), 8))
                case Removed(tier, packed_keys):
                    held.setdefault(tier, set()).difference_update(
                        packed_keys[i : i + 8] for i in range(0, len(packed_keys), 8)
                    )
                case Cleared():
                    held.clear()
        snapshot = {
            tier: {packed_keys[i : i + 8] for i in range(0, len(packed_keys), 8)}
            for tier, packed_keys in blocks.snapshot().items()
        }
        assert {tier: each for tier, each in held.items() if each} == snapshot


_CHUNK = {"block_hashes": [b"a"], "parent_block_hash": None, "token_ids": list(range(64)), "medium": "CPU@salt"}
_LMCACHE = msgspec.msgpack.encode({"events": [{"kind": "stored", **_CHUNK}, {"kind": "removed", **_CHUNK}]})


def test_the_real_ones_are_understood() -> None:
    """Or the others would fail for another reason than is thought."""
    assert len(decode_batch(_EVENTS).events) == 3
    assert len(decode_records(_LMCACHE, 64).events) == 2


@fuzz
@given(packed(_LMCACHE) | packed(_EVENTS) | st.just(b"\x91" * 3000))
def test_lmcaches_stream(payload: bytes) -> None:
    blocks = EngineBlocks(MODEL, 16, counted=False)
    with contextlib.suppress(WireError):
        blocks.apply(decode_records(payload, 64).events)


# -- Redis ------------------------------------------------------------------------------------------------------------


@fuzz
@given(packed(encode(DomainRecord.of(pod("a")))))
def test_records(raw: bytes) -> None:
    with contextlib.suppress(msgspec.DecodeError, RecordNotUnderstood):
        decode_domain(raw).domain(DomainId("a"))


@fuzz
@given(packed(encode(LogRecord("add", "a", 1, 1, "gpu", keys(1, 2)))))
def test_log_entries(raw: bytes) -> None:
    try:
        record = decode_log(raw)
    except msgspec.DecodeError:
        return
    assert len(record.keys) % 8 == 0
    assert record.seq >= 0


@fuzz
@given(packed(encode(HeartbeatRecord(1, 2, 3))))
def test_leases(raw: bytes) -> None:
    with contextlib.suppress(msgspec.DecodeError):
        decode_heartbeat(raw)


# -- configuration ----------------------------------------------------------------------------------------------------


@fuzz
@given(RAW | st.text(max_size=200).map(lambda text: text.encode("utf-8", "replace")))
def test_config_files(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "file.yaml"
    path.write_bytes(raw)
    for read in (load_config, read_keys):
        _only((ConfigError,), partial(read, path))


@fuzz
@given(st.dictionaries(st.sampled_from(list(RouterSettings.model_fields)) | TEXT, JSON, max_size=4))
def test_settings(args: dict[str, Any]) -> None:
    for model in (RouterSettings, GraphArgs, LLMArgs):
        _only((ConfigError, ValidationError), partial(model.model_validate, args))


def _only(errors: tuple[type[Exception], ...], call: Callable[[], object]) -> None:
    with contextlib.suppress(*errors):
        call()
