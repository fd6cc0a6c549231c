"""ASGI middleware of a replica: its answers name it, and say why it was chosen; and it learns when a request is over.

In: requests with what the router has set on them (`ingress_router.py`, through HAProxy). Out: `x-kvcache-replica` on
every answer, where it is asked for `x-kvcache-matched` and `x-kvcache-reason`; the id of every request that has ended,
whether the engine has seen it or not; and a count of requests that no router has chosen this replica for.
"""

from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.config import MATCHED_HEADER, REASON_HEADER, REPLICA_HEADER
from serve_app.deployments import rank_header
from serve_app.deployments.ray_host import RayInstruments
from serve_app.haproxy import UNROUTED_HEADER, UNROUTED_REASONS
from serve_app.metric_table import UNROUTED


class AnswerHeaders:
    """Args:
    name: of the replica.
    ranks: data parallel ranks of which a request can name one; None: there are none.
    explain: whether answers say what the choice rested on.
    over: is told the `x-request-id` of every request that has one, when it has ended.
    model: for the metric.
    """

    def __init__(
        self,
        app: ASGIApp,
        name: str,
        ranks: range | None,
        explain: bool,
        over: Callable[[str], None],
        model: str,
    ) -> None:
        self._app = app
        self._name = name
        self._ranks = ranks
        self._echoed = (MATCHED_HEADER, REASON_HEADER) if explain else ()
        self._over = over
        self._unrouted = RayInstruments(model).make(UNROUTED)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Headers(scope=scope)
        if (reason := request.get(UNROUTED_HEADER)) in UNROUTED_REASONS:
            self._unrouted(1, {"reason": reason})

        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                named = request.get(rank_header.ENGINE_HEADER) if self._ranks else None
                name = rank_header.served_by(self._name, self._ranks, named)
                own = [(REPLICA_HEADER.encode(), name.encode())]
                own += [(key.encode(), value.encode()) for key in self._echoed if (value := request.get(key))]
                message["headers"] = [*message.get("headers", ()), *own]
            await send(message)

        try:
            await self._app(scope, receive, send_named)
        finally:
            if request_id := request.get("x-request-id"):
                self._over(request_id)
