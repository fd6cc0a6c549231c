"""A simulated engine as a server of its own: `python -m benchmarks.overhead.engine_server FOLDER NAME ...`.

In: the command line. Out: an HTTP server (uvicorn with the settings that Ray Serve's replicas have) on a free port of
127.0.0.1, which it writes to FOLDER/NAME.port once it serves; the engine of a Serve replica uses `serve_engine.py`.
"""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Annotated, Any

import typer
import uvicorn

from benchmarks.overhead.engine_app import Answers, Core, build_app, core_config


def serve_app(app: Any) -> tuple[uvicorn.Server, socket.socket, int]:
    """A uvicorn server for the app as Ray Serve configures it, its socket and its port."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    config = uvicorn.Config(app, lifespan="off", access_log=False, log_config=None, timeout_keep_alive=90)
    return uvicorn.Server(config), listener, int(listener.getsockname()[1])


def write_port(folder: Path, name: str, port: int) -> None:
    """Whole or not at all: whoever sees the file can read it."""
    partial = folder / f"{name}.port.partial"
    partial.write_text(str(port))
    partial.rename(folder / f"{name}.port")


def main(
    folder: Annotated[Path, typer.Argument(help="Where sockets, counter and port file go.")],
    name: Annotated[str, typer.Argument(help="What the answers call this engine.")],
    model_path: Annotated[str, typer.Option()],
    model: Annotated[str, typer.Option()],
    block_size: Annotated[int, typer.Option()],
    events_port: Annotated[int, typer.Option(help="Of the KV events; the replay socket has the next one.")],
) -> None:
    async def run() -> None:
        events, replay = (f"tcp://*:{port}" for port in (events_port, events_port + 1))
        core = Core(core_config(folder, name, model_path, model, block_size, events, replay))
        app = await build_app(model_path, model, Answers(model, name), core)
        server, listener, port = serve_app(app)
        write_port(folder, name, port)
        try:
            await server.serve(sockets=[listener])
        finally:
            core.close()

    import uvloop

    uvloop.run(run())


if __name__ == "__main__":
    typer.run(main)
