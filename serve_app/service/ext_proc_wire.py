"""Messages of Envoy's external processing (`envoy.service.ext_proc.v3.ExternalProcessor`): what a picker needs of them.

A table of fields and numbers, from which protobuf makes the classes; what else Envoy sends is skipped. Numbers and
types are those of envoy/service/ext_proc/v3/external_processor.proto (Envoy 1.40) and of what it imports.

The wheel with all of Envoy's messages (`xds-protos`) is not used: it writes its own copies over 60 modules of
`googleapis-common-protos` and `opentelemetry-proto`, which Ray and vLLM import.
"""

from __future__ import annotations

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, struct_pb2

PROCESS = ("envoy.service.ext_proc.v3.ExternalProcessor", "Process")  # service, method

# Of ProcessingMode.BodySendMode
NONE, STREAMED, BUFFERED, BUFFERED_PARTIAL, FULL_DUPLEX_STREAMED = range(5)
OVERWRITE = 2  # of HeaderValueOption.HeaderAppendAction: whatever was there is gone

_PACKAGE = "kvcache.ext_proc"
_STRUCT = f".{struct_pb2.Struct.DESCRIPTOR.full_name}"
_Field = descriptor_pb2.FieldDescriptorProto
_SCALARS = {
    "bool": _Field.TYPE_BOOL,
    "bytes": _Field.TYPE_BYTES,
    "enum": _Field.TYPE_INT32,  # the same on the wire
    "string": _Field.TYPE_STRING,
}

# message: {field: (number, type)}; `*` before a type: repeated; `?`: one of the message's alternatives.
_MESSAGES = {
    "ProcessingRequest": {
        "request_headers": (2, "?HttpHeaders"),
        "response_headers": (3, "?HttpHeaders"),
        "request_body": (4, "?HttpBody"),
        "response_body": (5, "?HttpBody"),
        "request_trailers": (6, "?HttpTrailers"),
        "response_trailers": (7, "?HttpTrailers"),
        "metadata_context": (8, "Metadata"),
        "protocol_config": (11, "ProtocolConfiguration"),
    },
    "ProtocolConfiguration": {"request_body_mode": (1, "enum"), "response_body_mode": (2, "enum")},
    "HttpHeaders": {"headers": (1, "HeaderMap"), "end_of_stream": (3, "bool")},
    "HttpBody": {"body": (1, "bytes"), "end_of_stream": (2, "bool")},
    "HttpTrailers": {},
    "HeaderMap": {"headers": (1, "*HeaderValue")},
    "HeaderValue": {"key": (1, "string"), "value": (2, "string"), "raw_value": (3, "bytes")},
    "Metadata": {"filter_metadata": (1, "*FilterMetadata")},
    "FilterMetadata": {"key": (1, "string"), "value": (2, _STRUCT)},  # an entry of a map
    "ProcessingResponse": {
        "request_headers": (1, "?CommonResponseOf"),
        "response_headers": (2, "?CommonResponseOf"),
        "request_body": (3, "?CommonResponseOf"),
        "response_body": (4, "?CommonResponseOf"),
        "request_trailers": (5, "?TrailersResponse"),
        "response_trailers": (6, "?TrailersResponse"),
        "immediate_response": (7, "?ImmediateResponse"),
        "dynamic_metadata": (8, _STRUCT),
        "mode_override": (9, "ProcessingMode"),
    },
    "CommonResponseOf": {"response": (1, "CommonResponse")},  # HeadersResponse and BodyResponse
    "TrailersResponse": {},
    "CommonResponse": {
        "header_mutation": (2, "HeaderMutation"),
        "body_mutation": (3, "BodyMutation"),
        "clear_route_cache": (5, "bool"),
    },
    "HeaderMutation": {"set_headers": (1, "*HeaderValueOption"), "remove_headers": (2, "*string")},
    "HeaderValueOption": {"header": (1, "HeaderValue"), "append_action": (3, "enum")},
    "BodyMutation": {"streamed_response": (3, "StreamedBodyResponse")},
    "StreamedBodyResponse": {"body": (1, "bytes"), "end_of_stream": (2, "bool")},
    "ImmediateResponse": {"status": (1, "HttpStatus"), "headers": (2, "HeaderMutation"), "body": (3, "bytes")},
    "HttpStatus": {"code": (1, "enum")},
    "ProcessingMode": {"request_body_mode": (3, "enum"), "response_body_mode": (4, "enum")},
}


def _classes() -> dict[str, Any]:
    file = descriptor_pb2.FileDescriptorProto(
        name="serve_app/service/ext_proc_wire", package=_PACKAGE, syntax="proto3", dependency=[_STRUCT_FILE]
    )
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for field, (number, kind) in fields.items():
            added = message.field.add(name=field, number=number, label=_Field.LABEL_OPTIONAL)
            if kind.startswith("*"):
                added.label = _Field.LABEL_REPEATED
            elif kind.startswith("?"):
                added.oneof_index = 0
            added.type = _SCALARS.get(name_of := kind.lstrip("*?"), _Field.TYPE_MESSAGE)
            if added.type == _Field.TYPE_MESSAGE:
                added.type_name = name_of if name_of.startswith(".") else f".{_PACKAGE}.{name_of}"
        if any(kind.startswith("?") for _, kind in fields.values()):
            message.oneof_decl.add(name="kind")
    pool = descriptor_pool.Default()
    pool.AddSerializedFile(file.SerializeToString())
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.{name}")) for name in _MESSAGES
    }


_STRUCT_FILE = struct_pb2.DESCRIPTOR.name
_made = _classes()
ProcessingRequest: Any = _made["ProcessingRequest"]
ProcessingResponse: Any = _made["ProcessingResponse"]
