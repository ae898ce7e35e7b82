"""All errors of this package: one base class, one JSON-RPC code for each class.

A branch says what was at fault: the request line (:class:`WireError`), the job or its command (:class:`CommandError`),
the name or the reach of a job (:class:`FindError`), the start of control in a job (:class:`StartError`).

An error keeps its facts in ``data``, a JSON object that travels with it; ``from_wire`` makes the same class again
on the other side.
"""

from __future__ import annotations

from typing import Any, ClassVar, Final


class ControlError(Exception):
    """Base of all errors raised by this package.

    Args:
        message: one sentence for a person: which value, what was expected, what to do.
        data: the facts behind the sentence, JSON values only; attribute ``data``.
    """

    #: The JSON-RPC error code; unique to the class.
    code: ClassVar[int] = -32000

    def __init__(self, message: str, **data: Any) -> None:
        super().__init__(message)
        self.message = message
        self.data: dict[str, Any] = data

    def __init_subclass__(cls, code: int | None = None) -> None:
        if code is not None:
            cls.code = code
            _BY_CODE[code] = cls


_BY_CODE: Final[dict[int, type[ControlError]]] = {ControlError.code: ControlError}


class WireError(ControlError, code=-31099):
    """The request line is at fault; nothing was done."""


class ParseError(WireError, code=-32700):
    """The line is not one JSON text (JSON-RPC 2.0, section 5.1)."""


class InvalidRequest(WireError, code=-32600):
    """The JSON is not a request object (JSON-RPC 2.0, section 5.1), or it exceeds a limit."""


class MethodNotFound(WireError, code=-32601):
    """No method of this name is in the table."""


class InvalidParams(WireError, ValueError, code=-32602):
    """A parameter is unknown, missing or of the wrong kind."""


class InternalError(WireError, code=-32603):
    """A fault in this package. The traceback is in the job's log, never on the wire."""


class CommandError(ControlError, code=-32001):
    """The job refused a command, or the command did not finish as asked."""


class CommandFailed(CommandError, code=-32002):
    """The command was accepted and ended as failed or cancelled; ``data`` is its record."""


class CommandNotFound(CommandError, LookupError, code=-32003):
    """No record of this ``command_id``; finished ones are kept for a while only."""


class NotCancellable(CommandError, code=-32004):
    """The command is already applied or finished; ``data`` is its record."""


class TooManyCommands(CommandError, code=-32005):
    """A limit on commands or waiting requests is reached; nothing was queued. ``data["limit"]`` is the limit."""


class JobEnding(CommandError, code=-32006):
    """Training ended before the command could be applied."""


class DeadlinePassed(CommandError, TimeoutError, code=-32007):
    """The wait timed out; the command is still pending. ``data`` is its record, if known."""


class CommandRefused(CommandError, code=-32008):
    """This job cannot do what was asked; nothing was queued. ``data["needs"]`` names what it lacks."""


class CommandExpired(CommandError, code=-32009):
    """The job read the request after its ``expires_at``; nothing was queued."""


class FindError(ControlError, code=-31020):
    """No job could be reached."""


class NoSuchJob(FindError, LookupError, code=-31021):
    """No job of this name, or no live job at all."""


class AmbiguousJob(FindError, LookupError, code=-31022):
    """Several jobs fit; ``data["candidates"]`` names them."""


class JobDead(FindError, ConnectionError, code=-31023):
    """The job's process is gone, or ended before it answered."""


class JobNotAnswering(FindError, TimeoutError, code=-31024):
    """The job's process runs, or is on another host, and its socket did not answer in time."""


class NotAuthenticated(FindError, PermissionError, code=-31025):
    """The token or the certificate is not the job's."""


class StartError(ControlError, code=-31040):
    """This job cannot be controlled. Integrations log one warning, and training continues."""


class BadJobId(StartError, ValueError, code=-31041):
    """A job id is 1 to 128 of ``A-Z a-z 0-9 . _ -`` and starts with neither a dot nor a dash."""


class JobIdTaken(StartError, code=-31042):
    """Another job has this id; ``data`` has its ``pid`` and ``host``."""


class JobsDirUnusable(StartError, code=-31043):
    """The jobs directory cannot be made or listed, is not safe, or belongs to another user."""


class Unsupported(StartError, code=-31044):
    """This version does not have what was asked for."""


class PortTaken(StartError, code=-31045):
    """The TCP port cannot be opened; the job is controlled over its socket alone."""


class TlsUnusable(StartError, code=-31046):
    """Certificate and key cannot be used; the port is not opened, as it would be open without them."""


def from_wire(code: object, message: object, data: object) -> ControlError:
    """Return the error that a reply carries, as the class that was raised on the other side.

    An unknown code becomes a plain :class:`ControlError` that keeps it in ``data["code"]``.
    """
    facts = dict(data) if isinstance(data, dict) else {} if data is None else {"data": data}
    known = _BY_CODE.get(code) if isinstance(code, int) else None
    error = (known or ControlError)(str(message))
    error.data = facts if known else {**facts, "code": code}
    return error
