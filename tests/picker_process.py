"""A picker that a test can kill or stop: `python -m tests.picker_process PORT ENDPOINT...` always names these."""

import asyncio
import sys
from collections.abc import Sequence

import grpc.aio

from serve_app.service.ext_proc import add_picker, server_options
from serve_app.service.picking import Picked


class First:
    def __init__(self, endpoints: Sequence[str]) -> None:
        self._picked = Picked(endpoints, reason="first")

    async def pick(self, request_id: str, session: str, body: bytes | None, subset: Sequence[str] | None) -> Picked:
        return self._picked

    def first_token(self, request_id: str) -> None:
        pass

    def ended(self, request_id: str, prompt_tokens: int | None, cached_tokens: int | None) -> None:
        pass


async def main(port: str, *endpoints: str) -> None:
    server = grpc.aio.server(options=server_options())
    add_picker(server, First(endpoints))
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    print("ready", flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
