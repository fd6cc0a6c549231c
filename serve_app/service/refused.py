"""What is answered to a question that gets no score: an HTTP status, a code, and a message that says what to do.

PromptError, IndexUnavailable, AccessDenied, LimitExceeded, a field that is wrong  ->  Refused
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import msgspec

from serve_app.access import AccessDenied
from serve_app.errors import IndexUnavailable, PromptError
from serve_app.limits import LimitExceeded

_TOO_MUCH: Final = {"body_too_long": 413, "body_too_deep": 422, "many_prompts": 422}
"""Statuses of a PromptError's reasons that are limits."""


class Refused(Exception):
    """`field`: path of the one that is wrong; `retry_after_s`: when it is worth while to ask again."""

    def __init__(
        self, status: int, code: str, message: str, *, field: str | None = None, retry_after_s: float = 0.0
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message
        self.field, self.retry_after_s = field, retry_after_s

    @property
    def body(self) -> bytes:
        """OpenAI's error shape."""
        return msgspec.json.encode({"error": self.as_dict()})

    def as_dict(self) -> dict[str, str | None]:
        return {"message": self.message, "type": "invalid_request_error", "code": self.code, "param": self.field}

    @property
    def headers(self) -> dict[str, str]:
        headers = {}
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        if self.retry_after_s:
            headers["retry-after"] = str(math.ceil(self.retry_after_s))
        return headers


@contextmanager
def refusing() -> Iterator[None]:
    """Errors of the layers below, as a Refused."""
    try:
        yield
    except AccessDenied as error:
        raise Refused(error.status, error.code, str(error)) from error
    except LimitExceeded as error:
        raise Refused(error.status, error.code, str(error), retry_after_s=error.retry_after_s) from error
    except PromptError as error:
        status = 503 if error.reason in PromptError.NOT_NOW else _TOO_MUCH.get(error.reason, 400)
        code = "invalid_request" if error.reason == "no_body" else error.reason
        raise Refused(status, code, str(error)) from error
    except IndexUnavailable as error:
        raise Refused(503, "index_unavailable", str(error), retry_after_s=1.0) from error
    except msgspec.ValidationError as error:
        message = str(error)
        raise Refused(422, "invalid_field", message, field=_path(message)) from error


def _path(message: str) -> str | None:
    """`... - at `$.pods[0]`` -> pods[0]."""
    _, found, rest = message.rpartition("at `$")
    return rest.rstrip("`").lstrip(".") or None if found else None
