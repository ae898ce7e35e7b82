"""What a command did on each rank, as it travels to rank 0 and into the command's record. Pure functions."""

from __future__ import annotations

import json
import sys
from concurrent.futures import CancelledError, Future
from typing import Any

from ..errors import CommandFailed, ControlError
from ..wire.limits import MAX_DEPTH
from ..wire.methods import Method
from ..wire.records import CommandRecord, Outcome
from . import limits


def value(name: str, returned: Any) -> Any:
    """Return what an effect returned, as it arrives at rank 0 and its clients.

    Raises:
        CommandFailed: JSON cannot carry it, or it is too long.
    """
    try:
        text = json.dumps(returned)
        if len(text) > limits.MAX_VALUE:
            raise CommandFailed(
                f"{name} returned {len(text)} bytes of JSON, more than {limits.MAX_VALUE}; "
                "write them to a file, and return its path"
            )
        found = json.loads(text)
        _check(found)
    except (TypeError, ValueError, RecursionError) as err:
        why = "it is nested too deeply" if isinstance(err, RecursionError) else err
        text = f"{name} returned a value that is not JSON: {why}; return numbers, text, lists and dictionaries of them"
        raise CommandFailed(text) from err
    return found


def _check(value: Any, depth: int = 0) -> None:
    """Raise ValueError for what other programs may not be able to read."""
    if depth > MAX_DEPTH:
        raise ValueError(f"it is nested deeper than {MAX_DEPTH}")
    if type(value) is int and abs(value) > sys.float_info.max:
        raise ValueError("a number is beyond the range of a double")
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check(item, depth + 1)


def failure(err: BaseException) -> Outcome:
    """Return the outcome of a rank on which a command has failed."""
    if not isinstance(err, ControlError):  # those of other libraries may have a code, too, even a method of that name
        err = CommandFailed(f"{type(err).__name__}: {_text(err)}")
    data = {"data": err.data} if err.data else {}
    return {"error": {"code": err.code, "message": str(err.message)[:1000], **data}}


def _text(err: BaseException) -> str:
    try:
        return str(err)
    except Exception:  # boundary: the text of an exception is the script's code
        return "(its text cannot be read)"


def result(method: Method, outcomes: dict[int, Outcome]) -> dict[str, Any]:
    """Return the result of a command that no rank failed; CommandFailed: the ranks did not do the same."""
    values = {rank: outcomes[rank].get("value") for rank in sorted(outcomes)}
    return method.combine(values) if method.combine is not None else {"value": values.get(0)}


def of_future(name: str, future: Future[Any]) -> Outcome:
    """Return the outcome of an effect that returned a future, which is done."""
    try:
        found = value(name, future.result())
    except (Exception, CancelledError) as err:  # boundary: the effect's
        return failure(err)
    return {} if found is None else {"value": found}


def error_text(outcomes: dict[int, Outcome]) -> str | None:
    """Say which ranks failed and why: rank 0's message stands for the same message of others."""
    messages: dict[str, list[str]] = {}
    for rank, outcome in sorted(outcomes.items()):
        if "error" in outcome:
            messages.setdefault(outcome["error"]["message"], []).append(str(rank))
    texts = [text if ranks[0] == "0" else f"rank {', '.join(ranks)}: {text}" for text, ranks in messages.items()]
    return "; ".join(texts) or None


def brief(record: CommandRecord) -> dict[str, Any]:
    """Return a record for an answer that holds many: a long value is left out, and ``value_omitted`` says so."""
    found = record.to_json()
    result = found["result"]
    if result and "value" in result and _size(result["value"]) > limits.BRIEF_VALUE:
        found["result"] = {**{name: result[name] for name in result if name != "value"}, "value_omitted": True}
    return found


def _size(value: Any) -> int:
    """Return about how many characters a value has as JSON; of a long one perhaps fewer, but more than the limit."""
    if isinstance(value, str):
        return 4 + len(value)
    size = 4
    items = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else ()
    for item in items:
        size += _size(item)
        if size > limits.BRIEF_VALUE:
            break
    return size
