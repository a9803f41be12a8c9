"""Errors of the server and its clients. A class's code is its name on the wire.

KVError
├── RequestError                 the request is wrong; sending it again is useless
│   ├── BadRequest               a frame, a field or a value that cannot be accepted
│   ├── UnknownRequest           no request of that name
│   ├── RequestMismatch          the two sides declare that request differently
│   ├── TooLarge                 over the size that the server accepts
│   ├── LayoutError              an impossible cache description
│   ├── LayoutConflict           another live instance of the model has another layout
│   ├── HandleError              a memory handle that cannot be attached
│   ├── UnknownModel             not every rank of the model is registered
│   ├── UnknownInstance          no such registered cache
│   ├── UnknownTicket            no such reservation or hold, or it has ended
│   └── InstanceExists           that instance id is another live client's
├── StateError                   right request, wrong moment
│   ├── StaleBoot                meant for an earlier run of the server: register again
│   ├── TokensNeeded             the session lacks the tokens of that range: send them
│   ├── ChunksMissing            a retrieve lacks a chunk; nothing was written
│   ├── DeadlineExceeded         the deadline passed before the work was done
│   └── Overloaded               too many requests under way; try again later
├── ServerError
│   ├── Internal                 a defect of the server; its log has the traceback
│   ├── DeviceFailed             a GPU or its driver refused or failed
│   ├── Unavailable              no server answers, or it went away (client side)
│   └── Closed                   this end was closed
└── SetupError                   a flag, a file or the machine prevents a start
"""

from __future__ import annotations

from typing import ClassVar


class KVError(Exception):
    """Root of the tree. `details` are plain values that a program may act on."""

    code: ClassVar[str] = "error"

    def __init__(self, message: str, /, **details: int | str) -> None:
        super().__init__(message)
        self.message = message
        self.details = details

    def __init_subclass__(cls, code: str = "", **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        if code:
            cls.code = code
            ERRORS[code] = cls


ERRORS: dict[str, type[KVError]] = {}
"""Wire code to class, filled as the classes are declared."""


class RequestError(KVError):
    """The request is wrong in itself."""


class BadRequest(RequestError, code="bad_request"):
    """A frame, a field or a value that cannot be accepted."""


class UnknownRequest(RequestError, code="unknown_request"):
    """No request of that name."""


class RequestMismatch(RequestError, code="request_mismatch"):
    """The two sides declare the request differently: their versions differ."""


class TooLarge(RequestError, code="too_large"):
    """Over the size that the server accepts."""


class LayoutError(RequestError, code="bad_layout"):
    """An impossible cache description."""


class LayoutConflict(RequestError, code="layout_conflict"):
    """Another live instance of this model, world size and rank has another layout."""


class HandleError(RequestError, code="bad_handle"):
    """A memory handle that cannot be attached, or is smaller than it claims."""


class UnknownModel(RequestError, code="unknown_model"):
    """Not every rank of this model with this world size is registered."""


class UnknownInstance(RequestError, code="unknown_instance"):
    """No cache is registered under that instance id by this client."""


class InstanceExists(RequestError, code="instance_exists"):
    """The instance id belongs to another client that is alive."""


class UnknownTicket(RequestError, code="unknown_ticket"):
    """That reservation or hold has ended, or is not this client's."""


class StateError(KVError):
    """A right request at the wrong moment."""


class StaleBoot(StateError, code="stale_boot"):
    """Meant for an earlier run of the server; connect and register again."""


class TokensNeeded(StateError, code="tokens_needed"):
    """The session lacks tokens; `details["have"]` is the number it has."""


class ChunksMissing(StateError, code="chunks_missing"):
    """A retrieve lacks a chunk. Nothing was written."""


class DeadlineExceeded(StateError, code="deadline_exceeded"):
    """The deadline passed before the work was done."""


class Overloaded(StateError, code="overloaded"):
    """Too many requests of this client are in progress."""


class ServerError(KVError):
    """The server, its GPU or this client failed or is closed."""


class Internal(ServerError, code="internal"):
    """A defect of the server; its log has the traceback."""


class DeviceFailed(ServerError, code="device_failed"):
    """A GPU or its driver refused or failed; `details["status"]` is the driver's."""


class Unavailable(ServerError, code="unavailable"):
    """No server answers, or the server ended during the request."""


class Closed(ServerError, code="closed"):
    """This end was closed."""


class SetupError(KVError, code="setup"):
    """A flag, a file or the machine prevents a start. Exit code 2."""


def from_wire(code: str, message: str, details: dict[str, int | str]) -> KVError:
    """Build the error that a code names; an unknown code becomes `Internal`."""
    cls = ERRORS.get(code)
    if cls is None:
        return Internal(f"{code}: {message}", **details)
    return cls(message, **details)
