"""Real vLLM engines with small caches, `kvcache publish` beside each, and clients that converse without a pause.

In: the demo model. Out: engines at their limit, which evict all the time; at a quiet moment, how many tokens the mirror
says an engine would reuse beside how many it does.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import sys
import threading
import time
from typing import Any, Final

import httpx
import psutil

from benchmarks.processes import answers
from benchmarks.soak.children import Children
from benchmarks.soak.wire import Asker
from serve_app.blocks import KEY_BYTES, block_keys, namespace_key, pack_tokens
from serve_app.model import resolve_model
from serve_app.ports import free_port
from serve_app.types import ModelId

_BLOCKS: Final = 160
_NICE: Final = 5
_CLIENTS: Final = 2  # at once, of each engine
_TALKS: Final = 8  # conversations of an engine; its cache holds some of them
_ANSWER_TOKENS: Final = 12
_TALK_CHARACTERS: Final = 6000  # a conversation that is longer begins anew
_QUIET_S: Final = 60.0  # for the requests under way to end
_ANSWER_S: Final = 300.0  # on a machine that is busy with everything else
_STOP_S: Final = 2.0
_SETTLE_S: Final = 0.5  # for the last events to arrive
_WORDS: Final = ("river", "stone", "lamp", "winter", "copper", "garden", "engine", "letter", "moon", "bridge")


class RealEngine:
    def __init__(self, pod: str, model: ModelId, block_size: int, model_path: str, children: Children) -> None:
        self.pod, self._model, self._size = pod, model, block_size
        self._port, self._events, self._replay = free_port(), free_port(), free_port()
        self._url = f"http://127.0.0.1:{self._port}"
        self._dice = random.Random(pod)
        self._talks: list[list[dict[str, str]]] = [self._new_talk() for _ in range(_TALKS)]
        self._free = list(range(_TALKS))
        self._lock = threading.Lock()
        self._quiet, self._stop = threading.Event(), threading.Event()
        self._busy = 0
        self._threads: list[threading.Thread] = []
        self.served = 0
        kv_events = {
            "enable_kv_cache_events": True,
            "publisher": "zmq",
            "endpoint": f"tcp://*:{self._events}",
            "replay_endpoint": f"tcp://*:{self._replay}",
            "buffer_steps": 1000,  # the default of 10,000 would still fill up while memory is judged
        }
        self._process = children.start(
            pod,
            "vLLM",
            [
                *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model_path),
                *("--served-model-name", model, "--host", "127.0.0.1", "--port", str(self._port)),
                *("--block-size", str(block_size), "--num-gpu-blocks-override", str(_BLOCKS)),
                *("--max-model-len", "4096", "--enforce-eager", "--enable-prompt-tokens-details"),
                *("--kv-events-config", json.dumps(kv_events)),
            ],
            # One thread each: two engines that spin on two cores wait for each other.
            env={"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"},
        )

    def publish(self, redis_url: str, model_path: str, children: Children) -> None:
        """The command that the README gives."""
        children.start(
            f"publisher-{self.pod}",
            "kvcache publish",
            [
                *(sys.executable, "-m", "serve_app.cli", "publish", "--redis", redis_url),
                *("--engine", f"tcp://127.0.0.1:{self._events}", "--replay", f"tcp://127.0.0.1:{self._replay}"),
                *("--pod", self.pod, "--model", self._model, "--tokenizer", model_path),
                *("--block-size", str(self._size)),
            ],
        )

    def is_up(self) -> bool:
        return answers(f"{self._url}/health")

    def step_back(self, children: Children) -> None:
        """Once it is up: the engine's own processes are watched too, and everything of it gets a lower priority."""
        server = psutil.Process(self._process.pid)
        family = server.children(recursive=True)
        for process in family:
            children.watch(f"{self.pod}-{process.pid}", "vLLM", process.pid)
        for process in (server, *family):
            # What is measured goes first: in real life it has other cores. A thread has a priority of its own.
            for thread in process.threads():
                with contextlib.suppress(ProcessLookupError):
                    os.setpriority(os.PRIO_PROCESS, thread.id, _NICE)

    def start_clients(self) -> None:
        self._threads = [threading.Thread(target=self._converse, daemon=True) for _ in range(_CLIENTS)]
        for thread in self._threads:
            thread.start()

    def stop_clients(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(_STOP_S)  # one that waits for an answer ends with its engine

    def held(self) -> int:
        """No more blocks than this."""
        return _BLOCKS

    def compare(self, follower: Asker) -> tuple[int, int] | None:
        """Tokens of a conversation that it reuses, by the mirror and by itself; None: never quiet, or no answer."""
        self._quiet.set()
        try:
            deadline_s = time.monotonic() + _QUIET_S
            while self._any_busy():
                if time.monotonic() > deadline_s:
                    return None
                time.sleep(0.02)
            time.sleep(_SETTLE_S)
            return self._compare(follower)
        except httpx.HTTPError:
            return None
        finally:
            self._quiet.clear()

    def _any_busy(self) -> bool:
        with self._lock:  # a client that has not yet seen that it should wait has it
            return self._busy > 0

    def _compare(self, follower: Asker) -> tuple[int, int]:
        messages = self._dice.choice(self._talks)
        with httpx.Client(base_url=self._url, timeout=_ANSWER_S) as client:
            body = {"model": self._model, "messages": messages}
            tokens = client.post("/tokenize", json=body).raise_for_status().json()["tokens"]
            keys = block_keys(pack_tokens(tokens), self._size, namespace_key(self._model, self._size))
            said, _ = follower.ask(what="held", pod=self.pod, keys=keys)
            run = (said + b"\0").index(0)
            predicted = min(run, (len(tokens) - 1) // self._size) * self._size  # the last token is always computed
            assert len(keys) // KEY_BYTES >= run
            return predicted, self._ask(client, messages, 1)[1]

    def _converse(self) -> None:
        with httpx.Client(base_url=self._url, timeout=_ANSWER_S) as client:
            while not self._stop.is_set():
                if self._quiet.is_set():
                    self._stop.wait(0.05)
                    continue
                with self._lock:
                    if self._quiet.is_set():
                        continue
                    at = self._free.pop(self._dice.randrange(len(self._free)))
                    self._busy += 1
                try:
                    answer, _ = self._ask(client, self._talks[at], _ANSWER_TOKENS)
                    self._go_on(at, answer)
                    self.served += 1
                except httpx.HTTPError:
                    self._stop.wait(1.0)
                finally:
                    with self._lock:
                        self._free.append(at)
                        self._busy -= 1

    def _go_on(self, at: int, answer: str) -> None:
        talk = self._talks[at]
        if sum(len(message["content"]) for message in talk) > _TALK_CHARACTERS:
            self._talks[at] = self._new_talk()
            return
        self._talks[at] = [
            *talk,
            {"role": "assistant", "content": answer},
            {"role": "user", "content": self._text(60)},
        ]

    def _new_talk(self) -> list[dict[str, str]]:
        return [{"role": "user", "content": self._text(200)}]

    def _text(self, words: int) -> str:
        return " ".join(self._dice.choices(_WORDS, k=words))

    def _ask(self, client: httpx.Client, messages: list[dict[str, str]], max_tokens: int) -> tuple[str, int]:
        """The answer, and the tokens of the prompt that were cached."""
        body: dict[str, Any] = {"model": self._model, "messages": messages, "max_tokens": max_tokens}
        response = client.post("/v1/chat/completions", json=body).raise_for_status().json()
        details = response["usage"]["prompt_tokens_details"] or {}
        return response["choices"][0]["message"]["content"] or "", details.get("cached_tokens") or 0


def start_real_engines(
    count: int, children: Children, redis_url: str, model: ModelId, block_size: int
) -> list[RealEngine]:
    """Their processes and publishers; they take a minute or so until `is_up`."""
    if not count:
        return []
    path = resolve_model("builtin:smollm2-135m-instruct")
    engines = [RealEngine(f"real-{i}", model, block_size, path, children) for i in range(count)]
    for engine in engines:
        engine.publish(redis_url, path, children)
    return engines
