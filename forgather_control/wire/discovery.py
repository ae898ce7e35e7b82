"""``rpc.discover``: the methods of a job as an OpenRPC document (https://spec.open-rpc.org).

It is not listed in the document itself, as the specification asks, because generators reject the dot in its name.
"""

from __future__ import annotations

from typing import Any, Final

from .. import errors
from ..version import VERSION
from .methods import Method, MethodTable

Json = Any

_ANY_METHOD: Final = (errors.InvalidRequest, errors.InvalidParams, errors.InternalError, errors.TooManyCommands)
_COMMANDS: Final = (
    errors.CommandRefused,
    errors.CommandExpired,
    errors.JobEnding,
    errors.DeadlinePassed,
)
_BY_ID: Final = (errors.CommandNotFound,)
_SPECIAL: Final[dict[str, tuple[type[errors.ControlError], ...]]] = {
    "get_command": _BY_ID,
    "cancel_command": (*_BY_ID, errors.NotCancellable),
    "authenticate": (errors.NotAuthenticated,),
}


def document(methods: MethodTable) -> dict[str, Json]:
    """Describe all methods: parameters, results and errors with their JSON Schemas."""
    return {
        "openrpc": "1.3.2",
        "info": {"title": "forgather_control", "version": VERSION},
        "methods": [{**method.describe(), "errors": _errors(method)} for method in methods.values()],
    }


def _errors(method: Method) -> list[dict[str, Json]]:
    classes = (*_ANY_METHOD, *(_COMMANDS if method.is_command else ()), *_SPECIAL.get(method.name, ()))
    return [
        {"code": cls.code, "message": _first_line(cls), "data": {"title": "ErrorData", "type": "object"}}
        for cls in classes
    ]


def _first_line(cls: type[errors.ControlError]) -> str:
    return (cls.__doc__ or cls.__name__).strip().partition("\n")[0]  # no docstrings under -OO
