"""A real `vllm serve` that Ray does not manage, and `kvcache publish` beside it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx

from serve_app.model import fast_dtype
from serve_app.ports import free_port
from serve_app.types import ModelId, PodId

MODEL = ModelId("smol")
ALIAS = "smollm2"
POD = PodId("standalone")
BLOCK = 32  # tokens
SETTLE_S = 0.3  # the engine sends its events, the publisher writes them, the mirror reads them


class Vllm:
    """Serves `MODEL`, also called `ALIAS`, with few blocks, and publishes its KV events.

    Args:
        options: more of the server's command line.
        path: the folder from which the engine imports what `options` name.
        ports: of the API, the events and the replay; else any that are free.
        developer: it has /reset_prefix_cache and /server_info.
    """

    def __init__(
        self,
        model_path: str,
        log: Path,
        *options: str,
        path: Path | None = None,
        ports: tuple[int, int, int] | None = None,
        developer: bool = True,
    ) -> None:
        self.port, self.events, self.replay = ports or (free_port(), free_port(), free_port())
        config = (
            '{"enable_kv_cache_events": true, "publisher": "zmq", '
            f'"endpoint": "tcp://*:{self.events}", "replay_endpoint": "tcp://*:{self.replay}"}}'
        )
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model_path),
                *("--served-model-name", MODEL, ALIAS, "--host", "127.0.0.1", "--port", str(self.port)),
                *("--block-size", str(BLOCK), "--num-gpu-blocks-override", "160", "--max-model-len", "4096"),
                *("--dtype", fast_dtype(), "--enforce-eager", "--enable-prompt-tokens-details"),
                *("--kv-events-config", config),
                *options,
            ],
            env={
                **os.environ,
                "VLLM_CPU_KVCACHE_SPACE": "1",
                "VLLM_CPU_OMP_THREADS_BIND": "nobind",
                "VLLM_SERVER_DEV_MODE": str(int(developer)),
                **({"PYTHONPATH": str(path)} if path else {}),
            },
            stdout=log.open("wb"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.url = f"http://127.0.0.1:{self.port}"

    def is_up(self) -> bool:
        assert self.process.poll() is None
        try:
            return httpx.get(f"{self.url}/health", timeout=5).status_code == 200
        except httpx.HTTPError:
            return False

    def ask(self, body: dict[str, Any]) -> tuple[int, int]:
        """Prompt tokens and cached tokens, as the engine counts them."""
        answer = httpx.post(f"{self.url}/v1/chat/completions", json=body, timeout=120)
        assert answer.status_code == 200, answer.text
        usage = answer.json()["usage"]
        return usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"] or 0

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(30)

    def publish(self, redis_url: str, model_path: str, *options: str) -> subprocess.Popen[bytes]:
        """The command that the README gives."""
        return subprocess.Popen(
            [
                *(sys.executable, "-m", "serve_app.cli", "publish", "--redis", redis_url),
                *("--engine", f"tcp://127.0.0.1:{self.events}", "--replay", f"tcp://127.0.0.1:{self.replay}"),
                *("--pod", POD, "--model", MODEL, "--served-name", ALIAS, "--tokenizer", model_path),
                *("--server", self.url, *options),
            ]
        )
