"""The coordinator's API as ``v1/coordinator.proto`` describes it: its methods, one row each.

Server and callers are made from these rows, so that neither can have a method the other lacks.
Loads neither gRPC nor torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from anabranch.wire.v1 import coordinator_pb2

CODE_KEY = "anabranch-code"
"""Trailing metadata of a refused call: a short reason for machines."""
ENROL = b"anabranch.enrol/1\0"
"""Prefix of what a client's update key signs when it is enrolled."""


@dataclass(frozen=True)
class Method:
    """One method.

    Attributes:
        service: Its service, without the package.
        name: Its own name.
        path: As gRPC names it.
        request: Class of what the caller sends.
        reply: Class of what comes back.
        streams_up: Whether the caller sends several.
        streams_down: Whether several come back.
    """

    service: str
    name: str
    path: str
    request: type[Message]
    reply: type[Message]
    streams_up: bool
    streams_down: bool


@cache
def methods() -> dict[str, Method]:
    """Every method, by its path."""
    found = {}
    for service in coordinator_pb2.DESCRIPTOR.services_by_name.values():
        for method in service.methods:
            path = f"/{service.full_name}/{method.name}"
            found[path] = Method(
                service=service.name,
                name=method.name,
                path=path,
                request=GetMessageClass(method.input_type),
                reply=GetMessageClass(method.output_type),
                streams_up=method.client_streaming,
                streams_down=method.server_streaming,
            )
    return found


def enrolment_statement(token_hash: bytes, csr_pem: bytes) -> bytes:
    """What a client's update key signs when it is enrolled: for this token and request alone."""
    return ENROL + token_hash + csr_pem
