"""Every error this package raises on purpose.

KVCacheError
├── ConfigError           a setting is wrong; the message says which and what to write instead
├── PromptError           a request body has no prompt that can be scored; `reason` is a metric label
├── WireError             bytes from an engine that are not a KV event batch
├── EngineAway            an engine's HTTP server does not answer now
├── RecordNotUnderstood   a record in Redis says what this version does not know; `reason` is a metric label
├── StoreError            Redis did not do what it was asked
│   └── DomainTaken       another publisher writes what this one writes
└── IndexUnavailable      the index has no data for this model (yet)
"""


class KVCacheError(Exception):
    """Base of all errors below."""


class ConfigError(KVCacheError, ValueError):
    """A setting is wrong. Raised at start, never while serving."""


class PromptError(KVCacheError):
    """A request has no prompt that can be scored. The router falls back; the Score API answers 400.

    With a reason in `NOT_NOW` the request is not to blame: the Score API answers 503.
    """

    NOT_NOW = frozenset({"tokenizer_loading", "no_tokenizer"})

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(reason, message)  # both are args, so that it survives pickling between deployments
        self.reason = reason
        self.message = message

    def __str__(self) -> str:
        return self.message


class WireError(KVCacheError):
    """Bytes from an engine that are not a KV event batch."""


class EngineAway(KVCacheError):
    """An engine's HTTP server does not answer now, or answers that it cannot.

    `refused`: nobody listens on its port, so its process is gone or not there yet. `status`: its answer; 0: none.
    """

    def __init__(self, message: str, *, refused: bool = False, status: int = 0) -> None:
        super().__init__(message)
        self.refused = refused
        self.status = status


class RecordNotUnderstood(KVCacheError):
    """A record in Redis says what this version of the package does not know, or what cannot be.

    Whoever it is about is left out, under `reason`; nothing is guessed.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class IndexUnavailable(KVCacheError):
    """The index has no data for this model yet: no replica has registered."""


class StoreError(KVCacheError):
    """Redis did not do what it was asked. What was being written may or may not be there: resync.

    `refused`: it answered, and said no; asking again soon will not help. `advice`: what a person can do about it.
    """

    def __init__(self, message: str, *, advice: str = "", refused: bool = False) -> None:
        super().__init__(f"{message}; {advice}" if advice else message)
        self.advice = advice
        self.refused = refused


class DomainTaken(StoreError):
    """Another publisher has joined under the same name since: what we write is void."""
