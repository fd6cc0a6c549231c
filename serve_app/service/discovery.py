"""Where replicas are, if it is not enough to know who publishes: a list, a DNS name, or Kubernetes' endpoint slices.

Who is found and does not publish is a candidate too, of which nothing is known. Who publishes and is not found is none.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any, Final

import httpx
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, model_validator

from serve_app.supervision import Backoff, LoopGuard

logger = logging.getLogger("kvcache.scores")

_ACCOUNT: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_TIMEOUT_S: Final = 5.0
_PAGE: Final = 500

Port = Annotated[int, Field(ge=1, le=65535)]


class KubernetesSettings(BaseModel):
    """Ready pods behind a Service (headless or not), as its endpoint slices say."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    service: str
    port: Annotated[Port | None, Field(description="Of the engine's API; null: the slice's first port.")] = None
    namespace: Annotated[str, Field(description="Empty: that of this pod.")] = ""
    api: Annotated[str, Field(description="URL of the API server.")] = "https://kubernetes.default.svc"
    account: Annotated[Path, Field(description="Folder with `token`, `ca.crt` and `namespace`.")] = _ACCOUNT


class DiscoverySettings(BaseModel):
    """One of them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    static: Annotated[tuple[str, ...], Field(description="host:port of each engine's API.")] = ()
    dns: Annotated[str, Field(pattern=r"^(|[^:/\s]+:\d+)$", description="name:port, e.g. of a headless Service.")] = ""
    kubernetes: KubernetesSettings | None = None
    every_s: Annotated[PositiveFloat, Field(description="How often it is looked up.")] = 5.0

    @model_validator(mode="after")
    def _one(self) -> DiscoverySettings:
        if sum(map(bool, (self.static, self.dns, self.kubernetes))) != 1:
            raise ValueError("give one of `static`, `dns` and `kubernetes`")
        return self


class Discovery:
    """What was found last. A look-up that fails leaves it as it was."""

    def __init__(self, settings: DiscoverySettings) -> None:
        self._every_s = settings.every_s
        self._look_up = _way(settings)
        self.addresses: frozenset[str] = frozenset(settings.static)  # host:port

    async def run(self) -> None:
        """For ever."""
        guard = LoopGuard("kvcache: replicas could not be looked up; the former ones stay", Backoff(1.0), logger)
        while True:
            wait_s = self._every_s
            try:
                found = frozenset(await self._look_up())
                if found != self.addresses:
                    logger.info("replicas found: %s", ", ".join(sorted(found)) or "none")
                    self.addresses = found
                guard.went_well()
            except Exception as error:
                wait_s = guard.failed(error)
            await asyncio.sleep(wait_s)


def _way(settings: DiscoverySettings) -> Callable[[], Awaitable[list[str]]]:
    if settings.kubernetes is not None:
        kubernetes = settings.kubernetes
        return lambda: ready_endpoints(kubernetes)
    if settings.dns:
        return lambda: resolve(settings.dns)

    async def static() -> list[str]:
        return list(settings.static)

    return static


async def resolve(name: str) -> list[str]:
    """All addresses of a DNS name, each with the port.

    Raises:
        OSError: it has none, or DNS does not answer.
    """
    host, _, port = name.rpartition(":")
    found = await asyncio.get_running_loop().getaddrinfo(host, int(port), type=socket.SOCK_STREAM)
    return sorted({_with_port(str(address[0]), int(port)) for *_, address in found})


async def ready_endpoints(settings: KubernetesSettings) -> list[str]:
    """Ready pods of the Service's endpoint slices (discovery.k8s.io/v1).

    Raises:
        httpx.HTTPError: the API server does not answer, or refuses.
        OSError: the account's files are not there.
    """
    account = settings.account
    token = (account / "token").read_text().strip()
    namespace = settings.namespace or (account / "namespace").read_text().strip()
    authority = account / "ca.crt"
    found: set[str] = set()
    async with httpx.AsyncClient(
        base_url=settings.api,
        headers={"authorization": f"Bearer {token}"},
        verify=_trust(authority),
        timeout=_TIMEOUT_S,
    ) as client:
        page = ""
        while True:
            asked = {"labelSelector": f"kubernetes.io/service-name={settings.service}", "limit": str(_PAGE)}
            answer = await client.get(
                f"/apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices",
                params={**asked, **({"continue": page} if page else {})},
            )
            answer.raise_for_status()
            slices = answer.json()
            for one in slices["items"]:
                found |= _ready(one, settings.port)
            page = slices.get("metadata", {}).get("continue") or ""
            if not page:
                return sorted(found)


def _trust(authority: Path) -> Any:
    import ssl

    return ssl.create_default_context(cafile=str(authority)) if authority.exists() else True


def _ready(one: dict[str, Any], port: int | None) -> set[str]:
    """Addresses of a slice whose endpoints are ready; `ready: null` means ready, by the API's documentation."""
    ports = [entry["port"] for entry in one.get("ports") or () if entry.get("port")]
    number = port or (ports[0] if ports else None)
    if number is None:
        return set()
    return {
        _with_port(address, number)
        for endpoint in one.get("endpoints") or ()
        if (endpoint.get("conditions") or {}).get("ready") is not False
        for address in endpoint["addresses"]
    }


def _with_port(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
