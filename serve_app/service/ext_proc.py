"""Envoy's external processor: for every HTTP request a gRPC stream, on which an Exchange answers Envoy.

What goes wrong in one stream ends that stream: cleanly, so that Envoy goes on with the request by itself.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from typing import Any

import grpc
import grpc.aio

from serve_app.protos import ext_proc_pb2 as wire
from serve_app.service.exchange import Exchange
from serve_app.service.picking import EndpointChooser
from serve_app.supervision import ErrorLog

logger = logging.getLogger(__name__)

SERVICE, METHOD = "envoy.service.ext_proc.v3.ExternalProcessor", "Process"
MAX_BODY_BYTES = 32 * 1024 * 1024
_BESIDE_THE_BODY = 1024 * 1024  # headers and metadata in the same message


def server_options(max_body_bytes: int = MAX_BODY_BYTES) -> list[tuple[str, int]]:
    """What the server must be made with: gRPC's own limit is 4 MiB for a message, and a body is one."""
    return [("grpc.max_receive_message_length", max_body_bytes + _BESIDE_THE_BODY)]


def add_picker(
    server: grpc.aio.Server,
    chooser: EndpointChooser,
    *,
    max_body_bytes: int = MAX_BODY_BYTES,
    counters: Counter[str] | None = None,
) -> None:
    """Have the server answer Envoy's ext_proc filter.

    Args:
        server: made with `server_options`, and not started yet.
        chooser: says who gets a request.
        max_body_bytes: a longer body is passed on, and not looked at.
        counters: `requests`, `no_endpoint`, `body_too_long`, `body_not_sent` (the filter's request_body_mode is neither
            BUFFERED nor FULL_DUPLEX_STREAMED), `served_by_another`, `cut_off` (no end was seen), and ErrorLog's.
    """
    handler = grpc.stream_stream_rpc_method_handler(
        _Processor(chooser, max_body_bytes, Counter() if counters is None else counters).process,
        request_deserializer=wire.ProcessingRequest.FromString,
        response_serializer=wire.ProcessingResponse.SerializeToString,
    )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {METHOD: handler}),))


class _Processor:
    def __init__(self, chooser: EndpointChooser, max_body_bytes: int, counters: Counter[str]) -> None:
        self._chooser = chooser
        self._max_body_bytes = max_body_bytes
        self._counters = counters
        self._errors = ErrorLog("kvcache: a request goes on without the endpoint picker", logger, counters)

    async def process(self, _: Any, context: Any) -> None:
        exchange = Exchange(self._chooser, self._max_body_bytes, self._counters, self._errors.failed)
        try:
            while (message := await context.read()) is not grpc.aio.EOF:
                for answer in await exchange.take(message):
                    await context.write(answer)
                if exchange.is_over:
                    return  # sooner than Envoy says so
        except asyncio.CancelledError:
            raise  # Envoy has ended it: the client has gone
        except Exception as error:
            self._errors.failed(error)
        finally:
            exchange.close()
