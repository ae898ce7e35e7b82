"""Every error of this package: one base, one JSON-RPC code a class. Floor 0: imports nothing.

The question each branch answers is *whose fault*::

    ControlError                    -32000
    ├── WireError                   -31099   the line: nothing was done
    │   ├── ParseError              -32700
    │   ├── InvalidRequest          -32600
    │   ├── MethodNotFound          -32601
    │   ├── InvalidParams           -32602   (also a ValueError)
    │   └── InternalError           -32603   ours; the job's log has the traceback
    ├── CommandError                -32001   the job, about a command
    │   ├── CommandFailed           -32002   accepted, and ended as failed or cancelled
    │   ├── CommandNotFound         -32003   (also a LookupError) no record of this command_id
    │   ├── NotCancellable          -32004   already applied, or already over
    │   ├── TooManyCommands         -32005   a bound was reached; nothing was queued
    │   ├── JobEnding               -32006   training ends: the command could not be applied
    │   ├── DeadlinePassed          -32007   (also a TimeoutError) the wait ended; the command is still pending
    │   ├── CommandRefused          -32008   this job cannot do it; nothing was queued
    │   └── CommandExpired          -32009   read after its expires_at; nothing was queued
    ├── FindError                   -31020   the name of a job, or its silence
    │   ├── NoSuchJob               -31021   (also a LookupError)
    │   ├── AmbiguousJob            -31022   (also a LookupError) a prefix of several, or none named
    │   ├── JobDead                 -31023   (also a ConnectionError) nobody is there any more
    │   ├── JobNotAnswering         -31024   (also a TimeoutError) the process lives, its socket is silent
    │   └── NotAuthenticated        -31025   (also a PermissionError) one side could not prove who it is
    └── StartError                  -31040   a job that cannot be made controllable; it trains on
        ├── BadJobId                -31041   (also a ValueError)
        ├── JobIdTaken              -31042
        ├── JobsDirUnusable         -31043
        ├── Unsupported             -31044
        ├── PortTaken               -31045
        └── TlsUnusable             -31046

An error keeps its facts in ``data``, a JSON object that travels with it; ``from_wire`` makes the
same class again on the other side.
"""

from __future__ import annotations

from typing import Any, ClassVar


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


class WireError(ControlError):
    """The request line was at fault; nothing was done."""

    code = -31099


class ParseError(WireError):
    """The line is not one JSON text (JSON-RPC 2.0, section 5.1)."""

    code = -32700


class InvalidRequest(WireError):
    """The JSON is not a request object (JSON-RPC 2.0, section 5.1), or it exceeds a limit."""

    code = -32600


class MethodNotFound(WireError):
    """No method of this name is in the table."""

    code = -32601


class InvalidParams(WireError, ValueError):
    """A parameter is unknown, missing or of the wrong kind."""

    code = -32602


class InternalError(WireError):
    """A fault of this package. The traceback is in the job's log, never on the wire."""

    code = -32603


class CommandError(ControlError):
    """The job says no, or what became of a command."""

    code = -32001


class CommandFailed(CommandError):
    """The command was accepted and ended as failed or cancelled; ``data`` is its record."""

    code = -32002


class CommandNotFound(CommandError, LookupError):
    """No record of this ``command_id`` (finished ones are kept for a while, not for ever)."""

    code = -32003


class NotCancellable(CommandError):
    """The command is applied or over; ``data`` is its record."""

    code = -32004


class TooManyCommands(CommandError):
    """As many commands or waiting requests as are allowed; ``data["limit"]`` says how many."""

    code = -32005


class JobEnding(CommandError):
    """Training ends or has ended before the command could be applied."""

    code = -32006


class DeadlinePassed(CommandError, TimeoutError):
    """The wait was over before the command was; the command goes on. ``data`` is its record, if known."""

    code = -32007


class CommandRefused(CommandError):
    """This job cannot do what was asked; nothing was queued. ``data["needs"]`` names what it lacks."""

    code = -32008


class CommandExpired(CommandError):
    """The job read the request after its ``expires_at``; nothing was queued."""

    code = -32009


class FindError(ControlError):
    """No job could be talked to."""

    code = -31020


class NoSuchJob(FindError, LookupError):
    """No job of this id or prefix, or no live job at all."""

    code = -31021


class AmbiguousJob(FindError, LookupError):
    """Several jobs fit; ``data["candidates"]`` names them."""

    code = -31022


class JobDead(FindError, ConnectionError):
    """The job's process is gone, or went away before it answered."""

    code = -31023


class JobNotAnswering(FindError, TimeoutError):
    """The job's process lives, or its host is another one, and its socket did not answer in time."""

    code = -31024


class NotAuthenticated(FindError, PermissionError):
    """The token is not the job's, or the certificate is not."""

    code = -31025


class StartError(ControlError):
    """This job cannot be controlled. Adapters turn it into one warning; training goes on."""

    code = -31040


class BadJobId(StartError, ValueError):
    """A job id is 1 to 128 of ``A-Z a-z 0-9 . _ -`` and starts with neither a dot nor a dash."""

    code = -31041


class JobIdTaken(StartError):
    """Another live job holds this id; ``data`` has its ``pid`` and ``host``."""

    code = -31042


class JobsDirUnusable(StartError):
    """The jobs directory cannot be made, is not safe, or belongs to somebody else."""

    code = -31043


class Unsupported(StartError):
    """What was asked for is not in this version."""

    code = -31044


class PortTaken(StartError):
    """The TCP port cannot be had; the job is controlled over its socket alone."""

    code = -31045


class TlsUnusable(StartError):
    """Certificate and key cannot be used; the port is not opened, as it would be open without them."""

    code = -31046


def _classes(base: type[ControlError]) -> dict[int, type[ControlError]]:
    found = {base.code: base}
    for sub in base.__subclasses__():
        found |= _classes(sub)
    return found


def from_wire(code: object, message: object, data: object) -> ControlError:
    """The error that a reply carries, as the class that was raised on the other side.

    An unknown code becomes a plain :class:`ControlError` that keeps it in ``data["code"]``.
    """
    facts = dict(data) if isinstance(data, dict) else {} if data is None else {"data": data}
    known = _classes(ControlError).get(code) if isinstance(code, int) else None
    error = (known or ControlError)(str(message))
    error.data = facts if known else {**facts, "code": code}
    return error
