"""What the load client itself costs: the same requests to a server that reads them and answers a constant.

`python -m benchmarks.overhead.floor` is that server; it prints its port. It parses nothing but the length, on uvloop.
"""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, cast

from benchmarks.overhead.client import Endpoint

_BODY: Final = b'{"system_fingerprint": "floor"}'
_ANSWER: Final = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(_BODY), _BODY)


class _Sink(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._left = 0

    def data_received(self, data: bytes) -> None:
        if not self._left:
            head, _, _ = data.partition(b"\r\n\r\n")
            length = re.search(rb"content-length: (\d+)", head)
            assert length is not None
            self._left = len(head) + 4 + int(length[1])
        self._left -= len(data)
        if not self._left:
            self._transport.write(_ANSWER)


@contextmanager
def floor_server() -> Iterator[Endpoint]:
    with subprocess.Popen(
        [sys.executable, "-m", "benchmarks.overhead.floor"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        try:
            yield Endpoint("127.0.0.1", int(process.stdout.readline()))
        finally:
            process.terminate()


async def _serve() -> None:
    server = await asyncio.get_running_loop().create_server(_Sink, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    import uvloop

    uvloop.run(_serve())
