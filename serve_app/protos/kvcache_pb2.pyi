from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class TokenIds(_message.Message):
    __slots__ = ("ids",)
    IDS_FIELD_NUMBER: _ClassVar[int]
    ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, ids: _Optional[_Iterable[int]] = ...) -> None: ...

class Prompt(_message.Message):
    __slots__ = ("text", "token_ids", "request_json", "cache_salt")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    REQUEST_JSON_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    text: str
    token_ids: TokenIds
    request_json: bytes
    cache_salt: str
    def __init__(self, text: _Optional[str] = ..., token_ids: _Optional[_Union[TokenIds, _Mapping]] = ..., request_json: _Optional[bytes] = ..., cache_salt: _Optional[str] = ...) -> None: ...

class ScoreRequest(_message.Message):
    __slots__ = ("model", "prompt", "pods", "strategy")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    PODS_FIELD_NUMBER: _ClassVar[int]
    STRATEGY_FIELD_NUMBER: _ClassVar[int]
    model: str
    prompt: Prompt
    pods: _containers.RepeatedScalarFieldContainer[str]
    strategy: str
    def __init__(self, model: _Optional[str] = ..., prompt: _Optional[_Union[Prompt, _Mapping]] = ..., pods: _Optional[_Iterable[str]] = ..., strategy: _Optional[str] = ...) -> None: ...

class PodScore(_message.Message):
    __slots__ = ("score", "matched_tokens", "trust", "age_s", "expected_ttft_s")
    class MatchedTokensEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    SCORE_FIELD_NUMBER: _ClassVar[int]
    MATCHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TRUST_FIELD_NUMBER: _ClassVar[int]
    AGE_S_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_TTFT_S_FIELD_NUMBER: _ClassVar[int]
    score: float
    matched_tokens: _containers.ScalarMap[str, int]
    trust: str
    age_s: float
    expected_ttft_s: float
    def __init__(self, score: _Optional[float] = ..., matched_tokens: _Optional[_Mapping[str, int]] = ..., trust: _Optional[str] = ..., age_s: _Optional[float] = ..., expected_ttft_s: _Optional[float] = ...) -> None: ...

class ScoreResponse(_message.Message):
    __slots__ = ("model", "strategy", "prompt_tokens", "block_size", "complete", "pods")
    class PodsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: PodScore
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[PodScore, _Mapping]] = ...) -> None: ...
    MODEL_FIELD_NUMBER: _ClassVar[int]
    STRATEGY_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    COMPLETE_FIELD_NUMBER: _ClassVar[int]
    PODS_FIELD_NUMBER: _ClassVar[int]
    model: str
    strategy: str
    prompt_tokens: int
    block_size: int
    complete: bool
    pods: _containers.MessageMap[str, PodScore]
    def __init__(self, model: _Optional[str] = ..., strategy: _Optional[str] = ..., prompt_tokens: _Optional[int] = ..., block_size: _Optional[int] = ..., complete: bool = ..., pods: _Optional[_Mapping[str, PodScore]] = ...) -> None: ...

class ScoreBatchRequest(_message.Message):
    __slots__ = ("requests",)
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    requests: _containers.RepeatedCompositeFieldContainer[ScoreRequest]
    def __init__(self, requests: _Optional[_Iterable[_Union[ScoreRequest, _Mapping]]] = ...) -> None: ...

class Error(_message.Message):
    __slots__ = ("code", "message", "reason")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    code: int
    message: str
    reason: str
    def __init__(self, code: _Optional[int] = ..., message: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class ScoreBatchItem(_message.Message):
    __slots__ = ("answer", "error")
    ANSWER_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    answer: ScoreResponse
    error: Error
    def __init__(self, answer: _Optional[_Union[ScoreResponse, _Mapping]] = ..., error: _Optional[_Union[Error, _Mapping]] = ...) -> None: ...

class ScoreBatchResponse(_message.Message):
    __slots__ = ("items",)
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    items: _containers.RepeatedCompositeFieldContainer[ScoreBatchItem]
    def __init__(self, items: _Optional[_Iterable[_Union[ScoreBatchItem, _Mapping]]] = ...) -> None: ...

class ChooseRequest(_message.Message):
    __slots__ = ("model", "prompt", "pods", "request_id", "session", "lease_s", "without_reservation")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    PODS_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    LEASE_S_FIELD_NUMBER: _ClassVar[int]
    WITHOUT_RESERVATION_FIELD_NUMBER: _ClassVar[int]
    model: str
    prompt: Prompt
    pods: _containers.RepeatedScalarFieldContainer[str]
    request_id: str
    session: str
    lease_s: float
    without_reservation: bool
    def __init__(self, model: _Optional[str] = ..., prompt: _Optional[_Union[Prompt, _Mapping]] = ..., pods: _Optional[_Iterable[str]] = ..., request_id: _Optional[str] = ..., session: _Optional[str] = ..., lease_s: _Optional[float] = ..., without_reservation: bool = ...) -> None: ...

class Candidate(_message.Message):
    __slots__ = ("pod", "replica", "address", "rank")
    POD_FIELD_NUMBER: _ClassVar[int]
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    pod: str
    replica: str
    address: str
    rank: int
    def __init__(self, pod: _Optional[str] = ..., replica: _Optional[str] = ..., address: _Optional[str] = ..., rank: _Optional[int] = ...) -> None: ...

class ChooseResponse(_message.Message):
    __slots__ = ("request_id", "chosen", "others", "outcome", "reason", "lease_s", "prompt_tokens", "matched_tokens", "expected_cached_tokens", "expected_ttft_s")
    class MatchedTokensEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    CHOSEN_FIELD_NUMBER: _ClassVar[int]
    OTHERS_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    LEASE_S_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MATCHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_TTFT_S_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    chosen: Candidate
    others: _containers.RepeatedCompositeFieldContainer[Candidate]
    outcome: str
    reason: str
    lease_s: float
    prompt_tokens: int
    matched_tokens: _containers.ScalarMap[str, int]
    expected_cached_tokens: int
    expected_ttft_s: float
    def __init__(self, request_id: _Optional[str] = ..., chosen: _Optional[_Union[Candidate, _Mapping]] = ..., others: _Optional[_Iterable[_Union[Candidate, _Mapping]]] = ..., outcome: _Optional[str] = ..., reason: _Optional[str] = ..., lease_s: _Optional[float] = ..., prompt_tokens: _Optional[int] = ..., matched_tokens: _Optional[_Mapping[str, int]] = ..., expected_cached_tokens: _Optional[int] = ..., expected_ttft_s: _Optional[float] = ...) -> None: ...

class ReportRequest(_message.Message):
    __slots__ = ("request_id", "event", "pod", "prompt_tokens", "cached_tokens")
    class Event(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        ENDED: _ClassVar[ReportRequest.Event]
        FIRST_TOKEN: _ClassVar[ReportRequest.Event]
    ENDED: ReportRequest.Event
    FIRST_TOKEN: ReportRequest.Event
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    EVENT_FIELD_NUMBER: _ClassVar[int]
    POD_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    event: ReportRequest.Event
    pod: str
    prompt_tokens: int
    cached_tokens: int
    def __init__(self, request_id: _Optional[str] = ..., event: _Optional[_Union[ReportRequest.Event, str]] = ..., pod: _Optional[str] = ..., prompt_tokens: _Optional[int] = ..., cached_tokens: _Optional[int] = ...) -> None: ...

class ReportResponse(_message.Message):
    __slots__ = ("known",)
    KNOWN_FIELD_NUMBER: _ClassVar[int]
    known: bool
    def __init__(self, known: bool = ...) -> None: ...

class WatchPodsRequest(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: str
    def __init__(self, model: _Optional[str] = ...) -> None: ...

class PodState(_message.Message):
    __slots__ = ("pod", "replica", "address", "live", "trust", "cause", "blocks", "in_flight", "capacity")
    POD_FIELD_NUMBER: _ClassVar[int]
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    LIVE_FIELD_NUMBER: _ClassVar[int]
    TRUST_FIELD_NUMBER: _ClassVar[int]
    CAUSE_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_FIELD_NUMBER: _ClassVar[int]
    pod: str
    replica: str
    address: str
    live: bool
    trust: str
    cause: str
    blocks: int
    in_flight: int
    capacity: int
    def __init__(self, pod: _Optional[str] = ..., replica: _Optional[str] = ..., address: _Optional[str] = ..., live: bool = ..., trust: _Optional[str] = ..., cause: _Optional[str] = ..., blocks: _Optional[int] = ..., in_flight: _Optional[int] = ..., capacity: _Optional[int] = ...) -> None: ...

class PodStates(_message.Message):
    __slots__ = ("model", "pods")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PODS_FIELD_NUMBER: _ClassVar[int]
    model: str
    pods: _containers.RepeatedCompositeFieldContainer[PodState]
    def __init__(self, model: _Optional[str] = ..., pods: _Optional[_Iterable[_Union[PodState, _Mapping]]] = ...) -> None: ...
