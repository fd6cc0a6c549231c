"""What the service has refused, or did not answer."""

from __future__ import annotations

from serve_app.errors import KVCacheError


class ServiceError(KVCacheError):
    """`status`: HTTP status, 0 if nobody answered. `code`: the service's name of it. `field`: the one that is wrong."""

    def __init__(self, status: int, code: str, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.field = status, code, field
