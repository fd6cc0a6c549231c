"""The simulated engine's HTTP side: vLLM's own GPU-less app, plus completions that are answered at once.

In: OpenAI requests. Out: a fixed small answer whose `system_fingerprint` names the engine; the body goes on to the
engine's core process (`engine_core.py`), which is what tokenizes it and publishes KV events. No answer waits for that.

`/v1/chat/completions/render`, `/tokenize`, `/v1/models` and `/health` are vLLM's (`vllm launch render`): a router that
asks its engines for token ids pays what it would pay at a real vLLM.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import msgspec
import zmq
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from benchmarks.overhead.engine_core import CoreConfig

MAX_MODEL_LEN: Final = 131_072  # 256 KiB of text are some 60,000 tokens; nothing is computed with them
WHERE_PATH: Final = "/overhead/where"  # answers with the engine's name, and the server that was asked
_COMPLETION_PATHS: Final = ("/v1/chat/completions", "/v1/completions")
_STREAM_MARKS: Final = (b'"stream":true', b'"stream": true')  # inside a JSON string the quotes would be escaped


class Core:
    """The engine's core process, and the socket on which it is handed request bodies."""

    def __init__(self, config: CoreConfig) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.overhead.engine_core"],
            stdin=subprocess.PIPE,
            env={**os.environ, "PYTHONHASHSEED": "0"},
        )
        assert self._process.stdin is not None
        self._process.stdin.write(msgspec.json.encode(config) + b"\n")
        self._process.stdin.flush()  # and stays open: its end tells the core that we are gone
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PUSH)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.connect(config.requests)

    def send(self, body: bytes) -> None:
        self._socket.send(body, copy=False)

    def close(self) -> None:
        self._socket.close(linger=0)
        self._process.terminate()
        self._process.wait()


class Answers:
    """The fixed answers of one engine."""

    def __init__(self, model: str, name: str) -> None:
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        common = {"id": "chatcmpl-0", "created": 1, "model": model, "system_fingerprint": name}
        finished = {"index": 0, "finish_reason": "stop"}
        message = {"role": "assistant", "content": "Noted."}
        self.chat: dict[str, Any] = {
            **common,
            "object": "chat.completion",
            "choices": [{**finished, "message": message}],
            "usage": usage,
        }
        self.text: dict[str, Any] = {
            **common,
            "object": "text_completion",
            "choices": [{**finished, "text": "Noted."}],
            "usage": usage,
        }
        chunk = {**common, "object": "chat.completion.chunk", "choices": [{**finished, "delta": message}]}
        self.chat_events = [_event(chunk), "data: [DONE]\n\n"]
        self.text_events = [_event(self.text), "data: [DONE]\n\n"]


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"


async def build_app(model_path: str, model: str, answers: Answers, core: Core) -> Any:
    """vLLM's render app with the completion routes put before its own."""
    os.environ["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"
    from vllm import AsyncEngineArgs
    from vllm.config import VllmConfig
    from vllm.entrypoints.launchers.app import build_app as build_vllm_app
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.entrypoints.launchers.render.app_state import init_render_app_state
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    options = {"--model": model_path, "--served-model-name": model, "--max-model-len": str(MAX_MODEL_LEN)}
    args = make_arg_parser(FlexibleArgumentParser()).parse_args([part for option in options.items() for part in option])
    model_config = AsyncEngineArgs.from_cli_args(args).create_model_config()
    app = build_vllm_app(args, ("render",))
    await init_render_app_state(VllmConfig(model_config=model_config), app.state, args)

    whole = {
        "/v1/chat/completions": json.dumps(answers.chat).encode(),
        "/v1/completions": json.dumps(answers.text).encode(),
    }
    streamed = {
        "/v1/chat/completions": "".join(answers.chat_events).encode(),
        "/v1/completions": "".join(answers.text_events).encode(),
    }

    async def complete(request: Request) -> Response:
        body = await request.body()
        core.send(body)
        path = request.scope["path"]
        if any(mark in body for mark in _STREAM_MARKS):
            return Response(streamed[path], media_type="text/event-stream")
        return Response(whole[path], media_type="application/json")

    async def where(request: Request) -> Response:
        host, port = request.scope["server"]
        return Response(json.dumps({"name": answers.chat["system_fingerprint"], "host": host, "port": port}))

    app.router.routes[:0] = [
        *(Route(path, complete, methods=["POST"]) for path in _COMPLETION_PATHS),
        Route(WHERE_PATH, where, methods=["GET"]),
    ]
    return app


def core_config(
    folder: Path, name: str, model_path: str, model: str, block_size: int, events: str, replay: str
) -> CoreConfig:
    """What the core of the engine `name` is started with; its sockets and counter are in `folder`."""
    return CoreConfig(
        requests=f"ipc://{folder}/{name}.requests",
        counter=str(folder / f"{name}.learned"),
        events=events,
        replay=replay,
        model_path=model_path,
        model=model,
        block_size=block_size,
    )
