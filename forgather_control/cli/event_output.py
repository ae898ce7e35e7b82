"""Events as text for a terminal, one line each."""

from typing import Any

from .. import states
from . import command_output, output


def line(event: dict[str, Any]) -> str:
    """Show an event: when it was, what kind it is, and its facts."""
    lost = f"  ({event['lost']} events before it are missing)" if event.get("lost") else ""
    return output.safe(f"{output.moment(event['time'])}  {event['kind']:10}  {_facts(event)}{lost}")


def _facts(event: dict[str, Any]) -> str:
    kind = event["kind"]
    if kind == states.EVENT_STARTED:
        return f"pid {event.get('pid')}, {_ranks(event.get('world_size'))}, at step {event.get('step')}"
    if kind == states.EVENT_PHASE:
        return str(event.get("phase"))
    if kind == states.EVENT_COMMAND:
        return _command(event)
    if kind == states.EVENT_CHECKPOINT:
        return f"step {event.get('step')}: {event.get('path')}"
    if kind == states.EVENT_RANK:
        told = event.get("reason") or _ranks(event.get("ranks"))
        return f"{event.get('state')}: {told}"
    if kind == states.EVENT_ENDED:
        return f"at step {event.get('step')}" + (f": {event['reason']}" if event.get("reason") else "")
    known = {name: value for name, value in event.items() if name not in ("seq", "time", "kind", "lost")}
    return output.pairs(known)


def _ranks(count: Any) -> str:
    return "1 rank" if count == 1 else f"{count} ranks"


def _command(record: dict[str, Any]) -> str:
    """Say what became of a command, and who gave it and why when it was accepted."""
    text = f"{output.verb(record.get('command'))} {record.get('state')}{output.applied(record)}"
    if record.get("state") == states.COMMAND_ACCEPTED:
        by, why = command_output.requester(record.get("requested_by") or {}), record.get("reason")
        return text + (f", by {by}" if by else "") + (f": {why}" if why else "")
    told = output.note(record)
    return f"{text}: {told}" if told else text
