"""Does the router make the engine's prompts? vLLM's own tokenizer and template are the engine's side."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from vllm.renderers.hf import resolve_chat_template
from vllm.tokenizers import get_tokenizer

from serve_app.errors import PromptError
from serve_app.index.keyspace import DomainRecord, decode_domain, encode
from serve_app.index.memory import MemoryIndex
from serve_app.prompts import hf, service
from serve_app.prompts.encoder import PromptEncoder
from serve_app.prompts.identity import PROBES, digest_of_ids, parts_of, probe_name
from serve_app.prompts.prefix_store import PrefixStore
from serve_app.prompts.service import PromptService
from serve_app.types import GPU, DomainId, EngineSpec, ModelId, PodId, Trust
from tests.helpers import keys, pod

BODY = {"model": "m", "messages": [{"role": "user", "content": "The capital of France is"}]}
OTHER_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }} v2\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)


def engine(path: str, **options: Any) -> tuple[tuple[str, str], ...]:
    """The identity of a vLLM engine with this tokenizer."""
    tokenizer: Any = get_tokenizer(path, **options)
    config: Any = SimpleNamespace(revision=options.get("revision"), code_revision=None, trust_remote_code=False)

    def template(with_tools: bool) -> str | None:
        resolved: str | None = resolve_chat_template(tokenizer, None, [{}] if with_tools else None, model_config=config)
        return resolved

    parts = parts_of(tokenizer.backend_tokenizer, template)
    for name, body in PROBES.items():
        if "prompt" in body:
            ids = tokenizer(body["prompt"]).input_ids
        else:
            text = tokenizer.apply_chat_template(
                body["messages"], tools=body.get("tools"), tokenize=False, add_generation_prompt=True
            )
            ids = tokenizer(text, add_special_tokens=False).input_ids
        parts[probe_name(name)] = digest_of_ids(ids)
    return tuple(sorted(parts.items()))


def spec_of(path: str | Path, **more: Any) -> EngineSpec:
    return EngineSpec(ModelId("m"), 16, str(path), **more)


def ids(spec: EngineSpec) -> list[int]:
    encoder = PromptEncoder(spec, PrefixStore(1 << 20))
    assert encoder.differing() == []
    return encoder.encode(BODY)[0].token_ids()


@pytest.fixture
def folder(model_path: str, tmp_path: Path) -> Path:
    """A checkpoint's folder without its weights, to change."""
    return Path(shutil.copytree(model_path, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors")))


def other_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(OTHER_TEMPLATE)


def more_added_tokens(folder: Path) -> None:
    path = folder / "tokenizer.json"
    about = json.loads(path.read_text())
    last = max(token["id"] for token in about["added_tokens"])
    about["added_tokens"].append({**about["added_tokens"][0], "id": last + 1, "content": "capital"})
    path.write_text(json.dumps(about))


def other_normalizer(folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"normalizer": {"type": "Lowercase"}}))


def test_the_same_files_have_the_same_identity(model_path: str) -> None:
    said = engine(model_path)
    assert {part for part, _ in said} == {"tokenizer", "template", "tools_template", *map(probe_name, PROBES)}
    assert ids(spec_of(model_path, identity=said))


@pytest.mark.parametrize(
    ("change", "part"),
    [(other_template, "template"), (more_added_tokens, "tokenizer"), (other_normalizer, "tokenizer")],
)
async def test_what_is_replaced_under_its_name_is_noticed_and_loaded_anew(
    folder: Path, change: Callable[[Path], None], part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "RETRY_S", 0.0)
    old = spec_of(folder, identity=engine(str(folder)))
    prompts = PromptService(PrefixStore(1 << 24))
    before = await prompts.encode(BODY, old)
    change(folder)
    new = spec_of(folder, identity=engine(str(folder)))  # a replica that starts now
    assert not old.makes_prompts_as(new)
    assert ids(new)
    assert (await prompts.encode(BODY, new))[0].keys != before[0].keys
    assert (await prompts.encode(BODY, old))[0].keys == before[0].keys  # while replicas of both are there
    for cached in (hf.load_tokenizer, hf.processor_template, hf.model_config):
        cached.cache_clear()
    elsewhere = PromptService(PrefixStore(1 << 24))  # a router that starts now has the old files no more
    with pytest.raises(PromptError) as refused:
        await elsewhere.encode(BODY, old)
    assert refused.value.reason == "unknown_prompt"
    assert part in str(refused.value)


def test_a_revision_is_followed(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tmp_path / "hub" / "models--acme--chat"
    (base / "refs").mkdir(parents=True)
    for revision, change in (("main", lambda _: None), ("v2", other_template)):
        commit = hashlib.sha1(revision.encode()).hexdigest()
        (base / "refs" / revision).write_text(commit)
        change(Path(shutil.copytree(folder, base / "snapshots" / commit)))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"), raising=False)
    main, v2 = engine("acme/chat"), engine("acme/chat", revision="v2")
    assert dict(main)["template"] != dict(v2)["template"]
    assert ids(spec_of("acme/chat", identity=main)) != ids(spec_of("acme/chat", identity=v2, revision="v2"))
    unpinned = PromptEncoder(spec_of("acme/chat", identity=v2), PrefixStore(1 << 20))
    assert set(unpinned.differing()) >= {"template", "probe:chat"}


def test_code_of_vllms_own_is_not_scored(model_path: str) -> None:
    with pytest.raises(PromptError) as refused:
        PromptEncoder(spec_of(model_path, tokenizer_mode="mistral"), PrefixStore(1 << 20))
    assert refused.value.reason == "unsupported_model"


def test_pods_that_make_other_prompts_than_most_are_not_scored() -> None:
    index = MemoryIndex()
    specs = {"a": (("template", "1"),), "b": (("template", "2"),), "c": (("template", "1"),), "old": ()}
    for name, identity in specs.items():
        domain = pod(name)
        index.join(replace(domain, spec=replace(domain.spec, identity=identity)))
        index.add(domain.id, domain.epoch, GPU, keys(*range(4)))
    match = index.match(keys(*range(4)))
    held = {name: match[PodId(name)].total_tokens > 0 for name in specs}
    assert held == {"a": True, "b": False, "c": True, "old": True}  # an old record does not say
    assert index.trust(PodId("b")) is Trust.DEGRADED
    assert "unknown_prompt: template differ" in index.unlike(DomainId("b"))
    assert index.unlike(DomainId("a")) == index.unlike(DomainId("old")) == ""
    index.leave(DomainId("a"), pod("a").epoch)
    index.leave(DomainId("c"), pod("c").epoch)
    assert index.match(keys(*range(4)))[PodId("b")].total_tokens > 0  # now it is what most are


def test_the_record_carries_it_and_old_records_do_without() -> None:
    domain = pod("a")
    said = replace(domain.spec, identity=(("template", "1"),), revision="v2", tokenizer_mode="hf")
    record = DomainRecord.of(replace(domain, spec=said))
    assert decode_domain(encode(record)).domain(domain.id).spec == said
    before = msgspec.msgpack.decode(encode(record))[:24]
    assert decode_domain(msgspec.msgpack.encode(before)).domain(domain.id).spec.identity == ()
