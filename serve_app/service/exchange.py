"""One HTTP request on its way through Envoy, as the endpoint picker sees it: message in, answers out.

    request headers, body  ->  pick  ->  header `x-gateway-destination-endpoint`, the same in metadata `envoy.lb`
    response headers, body ->  first token, usage, end

By the Gateway API Inference Extension's endpoint picker protocol (its proposal 004) on Envoy's ext_proc. How bodies
come, Envoy says in its first message:

    BUFFERED, BUFFERED_PARTIAL   the headers are answered at once, the body, in one message, with the endpoint
    FULL_DUPLEX_STREAMED         Envoy hands its data over: chunks are kept until the last has come, then headers and
                                 all chunks are given back; what comes later is given back as it comes
    NONE, STREAMED               the endpoint must be named with the headers: nothing can be scored
"""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import msgspec

from serve_app.config import REASON_HEADER
from serve_app.prompts.forms import GENERATION_PATHS
from serve_app.protos import ext_proc_pb2 as wire
from serve_app.service.picking import EndpointChooser, Picked
from serve_app.service.usage import AnswerEnd, Usage

DESTINATION = "x-gateway-destination-endpoint"
SERVED = "x-gateway-destination-endpoint-served"
SUBSET = "x-gateway-destination-endpoint-subset"
DESTINATION_NAMESPACE = "envoy.lb"
SUBSET_NAMESPACE = "envoy.lb.subset_hint"

Answers = Sequence[wire.ProcessingResponse]

_FILTER = "envoy.filters.http.ext_proc"  # under which attributes come
_NOT_CHOSEN = Picked((), reason="error")
_REQUEST_ID = "x-request-id"
_SESSION_HEADERS = ("x-session-id", "x_session_id")
_NO_ENDPOINT = msgspec.json.encode(
    {
        "error": {
            "message": "no engine is known that can take this request; try again soon",
            "type": "service_unavailable",
            "code": "no_endpoint",
        }
    }
)


class Exchange:
    """Args:
    chooser: is asked once, and told once that it is over.
    max_body_bytes: a longer body is passed on, and not looked at.
    counters: what happened, by name.
    failed: is told of an error of the chooser's. The request goes on, to whom Envoy sends it.
    """

    def __init__(
        self,
        chooser: EndpointChooser,
        max_body_bytes: int,
        counters: Counter[str],
        failed: Callable[[Exception], None],
    ) -> None:
        self._chooser = chooser
        self._max_body_bytes = max_body_bytes
        self._counters = counters
        self._failed = failed
        self._request_id = ""
        self._engine_headers: Mapping[str, str] = {}
        self._session = ""
        self._subset: Sequence[str] | None = None
        self._request_mode = self._response_mode = wire.NONE
        self._is_generation = False
        self._held: list[bytes] = []  # chunks that Envoy has handed over, until they are given back
        self._held_bytes = 0
        self._picked: Picked | None = None
        self._asked = self._refused = self.is_over = False
        self._is_good: bool | None = None  # the answer; None: not known yet
        self._has_token = False
        self._end = AnswerEnd()

    async def take(self, message: wire.ProcessingRequest) -> Answers:
        """ProcessingRequest -> what Envoy is to be told now, in this order."""
        match message.WhichOneof("request"):
            case "response_body":
                return self._response_body(message)
            case "response_headers":
                return self._response_headers(message)
            case "request_headers":
                return await self._request_headers(message)
            case "request_body":
                return await self._request_body(message)
            case "request_trailers":
                return await self._request_trailers()
            case "response_trailers":
                return self._response_trailers()
        return ()

    def close(self) -> None:
        """Nothing more will come."""
        if self._asked and not self.is_over and self._is_generation:
            self._counters["cut_off"] += 1
        self._ended(Usage())

    # ------------------------------------------------------------------------------------------ the request

    async def _request_headers(self, message: wire.ProcessingRequest) -> Answers:
        self._counters["requests"] += 1
        self._request_mode = message.protocol_config.request_body_mode
        self._response_mode = message.protocol_config.response_body_mode
        headers = _headers(message.request_headers)
        named = headers.get(_REQUEST_ID)
        self._request_id = named or str(uuid.uuid4())
        self._engine_headers = {} if named else {_REQUEST_ID: self._request_id}
        self._session = next((headers[name] for name in _SESSION_HEADERS if name in headers), "")
        self._subset = _subset(message.metadata_context)
        path = headers.get(":path", "").partition("?")[0].rstrip("/")
        self._is_generation = headers.get(":method") == "POST" and path.endswith(GENERATION_PATHS)
        if message.request_headers.end_of_stream or not self._is_generation:
            return await self._named_with_headers()
        if _length(headers) > self._max_body_bytes:
            self._counters["body_too_long"] += 1
            return await self._named_with_headers()
        if self._request_mode in {wire.BUFFERED, wire.BUFFERED_PARTIAL}:
            answer = wire.ProcessingResponse()
            answer.request_headers.response.header_mutation.remove_headers.append(DESTINATION)  # a client's
            self._watch(answer, self._request_mode)
            return (answer,)
        if self._request_mode == wire.FULL_DUPLEX_STREAMED:
            return ()  # with the whole body
        self._counters["body_not_sent"] += 1
        return await self._named_with_headers()

    async def _request_body(self, message: wire.ProcessingRequest) -> Answers:
        body, is_last = message.request_body.body, message.request_body.end_of_stream
        if self._request_mode == wire.FULL_DUPLEX_STREAMED:
            if self._picked is not None:
                return (_given_back("request_body", body, is_last),)
            self._held.append(body)
            self._held_bytes += len(body)
            if self._held_bytes > self._max_body_bytes:
                self._counters["body_too_long"] += 1
                return await self._released(None, is_last)
            return await self._released(b"".join(self._held), True) if is_last else ()
        answer = wire.ProcessingResponse()
        answer.request_body.SetInParent()
        if self._picked is not None:
            return (answer,)
        # Without its end it is either followed by trailers, or it is what Envoy's buffer has room for.
        is_whole = is_last or self._request_mode == wire.BUFFERED
        can_be_scored = is_whole and len(body) <= self._max_body_bytes
        if not can_be_scored:
            self._counters["body_too_long"] += 1
        picked = await self._pick(body if can_be_scored else None)
        return (self._named(answer, answer.request_body.response, picked),)

    async def _request_trailers(self) -> Answers:
        released: Answers = ()
        if self._picked is None and self._request_mode == wire.FULL_DUPLEX_STREAMED:
            released = await self._released(b"".join(self._held), False)
            if self._refused:
                return released
        answer = wire.ProcessingResponse()
        answer.request_trailers.SetInParent()
        return (*released, answer)

    async def _named_with_headers(self) -> Answers:
        answer = wire.ProcessingResponse()
        answer.request_headers.SetInParent()
        picked = await self._pick(None)
        self._watch(answer, wire.NONE)
        return (self._named(answer, answer.request_headers.response, picked),)

    async def _released(self, body: bytes | None, is_last: bool) -> Answers:
        """The answer to the headers, and all chunks that were held, the last of them being the body's last if so."""
        answer = wire.ProcessingResponse()
        answer.request_headers.SetInParent()
        first = self._named(answer, answer.request_headers.response, await self._pick(body))
        held, self._held = self._held, []
        if self._refused:
            return (first,)
        last = len(held) - 1
        return (first, *(_given_back("request_body", one, is_last and i == last) for i, one in enumerate(held)))

    async def _pick(self, body: bytes | None) -> Picked:
        """The chooser's answer, without what the operator has ruled out."""
        self._picked = picked = Picked(()) if self._subset == [] else await self._ask(body)
        if self._subset is not None:
            allowed = frozenset(self._subset)
            self._picked = picked._replace(endpoints=[one for one in picked.endpoints if one in allowed])
        return self._picked

    async def _ask(self, body: bytes | None) -> Picked:
        self._asked = True
        try:
            return await self._chooser.pick(self._request_id, self._session, body, self._subset)
        except Exception as error:
            self._failed(error)
            return _NOT_CHOSEN if self._subset is None else Picked(self._subset, reason=_NOT_CHOSEN.reason)

    def _named(
        self, answer: wire.ProcessingResponse, response: wire.CommonResponse, picked: Picked
    ) -> wire.ProcessingResponse:
        """The same answer with the endpoints in it; if there are none, one that ends the request."""
        if picked is _NOT_CHOSEN:
            response.header_mutation.remove_headers.append(DESTINATION)  # a client's
            return answer
        if not picked.endpoints:
            self._refused = True
            self._counters["no_endpoint"] += 1
            refused = wire.ProcessingResponse()
            refused.immediate_response.status.code = 503
            refused.immediate_response.body = _NO_ENDPOINT
            _set(refused.immediate_response.headers, {"content-type": "application/json", "retry-after": "1"})
            return refused
        endpoints = ",".join(picked.endpoints)
        _set(response.header_mutation, {**self._engine_headers, **picked.headers, DESTINATION: endpoints})
        response.clear_route_cache = True
        named = answer.dynamic_metadata.fields[DESTINATION_NAMESPACE].struct_value
        named.fields[DESTINATION].string_value = endpoints
        if picked.reason:
            named.fields[REASON_HEADER].string_value = picked.reason
        return answer

    def _watch(self, answer: wire.ProcessingResponse, request_mode: wire.BodySendMode) -> None:
        """Ask for the parts that are still needed; Envoy obeys if it is set up so (`allow_mode_override`)."""
        if wire.FULL_DUPLEX_STREAMED in {self._request_mode, self._response_mode}:
            return  # they are under way already
        response_mode = wire.NONE
        if self._is_generation:
            response_mode = wire.STREAMED if self._response_mode == wire.NONE else self._response_mode
        if (request_mode, response_mode) != (self._request_mode, self._response_mode):
            answer.mode_override.request_body_mode = request_mode
            answer.mode_override.response_body_mode = response_mode

    # ------------------------------------------------------------------------------------------ the response

    def _response_headers(self, message: wire.ProcessingRequest) -> Answers:
        self._answered(message, _headers(message.response_headers).get(":status", ""))
        answer = wire.ProcessingResponse()
        answer.response_headers.SetInParent()
        if self._picked is not None and self._picked.reason:
            _set(answer.response_headers.response.header_mutation, {REASON_HEADER: self._picked.reason})
        if message.response_headers.end_of_stream:
            self._ended(Usage())
        return (answer,)

    def _response_body(self, message: wire.ProcessingRequest) -> Answers:
        body, is_last = message.response_body.body, message.response_body.end_of_stream
        if self._is_good is None:  # no headers have come; if the attribute has not either, it is taken to be good
            self._answered(message, _attribute(message, "response.code") or "200")
        if self._is_good:
            self._end.passed(body)
            if body and not self._has_token:
                self._has_token = True
                self._chooser.first_token(self._request_id)
        if is_last:
            self._ended(self._end.usage())
        if self._response_mode == wire.FULL_DUPLEX_STREAMED:
            return (_given_back("response_body", body, is_last),)
        return (_GO_ON_WITH_RESPONSE_BODY,)

    def _answered(self, message: wire.ProcessingRequest, status: str) -> None:
        self._is_good = self._is_generation and status.startswith("2")
        named = _metadata(message.metadata_context, DESTINATION_NAMESPACE, SERVED)
        served = _attribute(message, "upstream.address") if named is None else named.string_value
        if served and self._picked is not None and served not in self._picked.endpoints[:1]:
            self._counters["served_by_another"] += 1

    def _response_trailers(self) -> Answers:
        self._ended(self._end.usage())
        answer = wire.ProcessingResponse()
        answer.response_trailers.SetInParent()
        return (answer,)

    def _ended(self, usage: Usage) -> None:
        if not self.is_over and self._asked:
            self.is_over = True
            self._chooser.ended(self._request_id, usage.prompt_tokens, usage.cached_tokens)


def _go_on(part: str) -> wire.ProcessingResponse:
    answer = wire.ProcessingResponse()
    getattr(answer, part).SetInParent()
    return answer


_GO_ON_WITH_RESPONSE_BODY = _go_on("response_body")


def _given_back(part: str, body: bytes, is_last: bool) -> wire.ProcessingResponse:
    answer = wire.ProcessingResponse()
    chunk = getattr(answer, part).response.body_mutation.streamed_response
    chunk.body, chunk.end_of_stream = body, is_last
    return answer


def _set(mutation: wire.HeaderMutation, headers: Mapping[str, str]) -> None:
    for name, value in headers.items():
        option = mutation.set_headers.add(append_action=wire.OVERWRITE_IF_EXISTS_OR_ADD)
        option.header.key = name
        option.header.raw_value = value.encode("latin-1", "replace")


def _headers(part: wire.HttpHeaders) -> dict[str, str]:
    """By name in lower case, as Envoy sends them; of several of a name, the first."""
    headers: dict[str, str] = {}
    for one in part.headers.headers:
        headers.setdefault(one.key, one.raw_value.decode("latin-1") if one.raw_value else one.value)
    return headers


def _attribute(message: wire.ProcessingRequest, name: str) -> str:
    """Of those that the filter's `response_attributes` name; empty: it has not come."""
    value = message.attributes[_FILTER].fields.get(name) if _FILTER in message.attributes else None
    if value is None:
        return ""
    return value.string_value or str(int(value.number_value))


def _length(headers: Mapping[str, str]) -> int:
    length = headers.get("content-length", "")
    return int(length) if length.isdecimal() and len(length) < 20 else 0


def _metadata(context: wire.Metadata, namespace: str, key: str) -> Any:
    """The value, a protobuf Value; None: not set."""
    if namespace not in context.filter_metadata:
        return None
    return context.filter_metadata[namespace].fields.get(key)


def _subset(context: wire.Metadata) -> Sequence[str] | None:
    """The operator's hint: a list; some data planes send a text with commas."""
    value = _metadata(context, SUBSET_NAMESPACE, SUBSET)
    if value is None:
        return None
    parts: Iterable[str] = (
        (one.string_value for one in value.list_value.values)
        if value.WhichOneof("kind") == "list_value"
        else value.string_value.split(",")
    )
    return [part for one in parts if (part := one.strip())]
