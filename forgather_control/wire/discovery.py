"""``rpc.discover``: the methods of a job as an OpenRPC document (https://spec.open-rpc.org).

It is not listed in the document itself, because generators reject the dot in its name.
"""

from __future__ import annotations

from typing import Final

from .. import errors
from ..version import VERSION
from .jsonrpc import Json
from .methods import Method, MethodTable

# The errors of each method...

_Errors = tuple[type[errors.ControlError], ...]
_ANY: Final[_Errors] = (errors.InvalidRequest, errors.InvalidParams, errors.InternalError, errors.TooManyCommands)
_COMMANDS: Final[_Errors] = (errors.CommandRefused, errors.CommandExpired, errors.JobEnding, errors.DeadlinePassed)
_QUERIES: Final[dict[str, _Errors]] = {
    "get_command": (errors.CommandNotFound,),
    "cancel_command": (errors.CommandNotFound, errors.NotCancellable),
    "authenticate": (errors.NotAuthenticated,),
    "add_rule": (errors.MethodNotFound, errors.CommandRefused),
}


def document(methods: MethodTable) -> dict[str, Json]:
    """Describe all methods: parameters, results and errors with their JSON Schemas."""
    return {
        "openrpc": "1.2.6",  # the last version that @open-rpc/generator knows
        "info": {"title": "forgather_control", "version": VERSION},
        "methods": [{**method.describe(), "errors": _errors(method)} for method in methods.values()],
    }


def _errors(method: Method) -> list[dict[str, Json]]:
    own = _COMMANDS if method.is_command else _QUERIES.get(method.name, ())
    data = {"title": "ErrorData", "type": "object"}
    # The first line of the docstring says when it is raised; there are no docstrings under -OO.
    return [
        {"code": cls.code, "message": (cls.__doc__ or cls.__name__).partition("\n")[0], "data": data}
        for cls in (*_ANY, *own)
    ]
