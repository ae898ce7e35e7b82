"""Command records, settings and rules as text for a terminal."""

from typing import Any, Final

from .. import states
from ..wire.builtin import BUILTIN
from . import output

#: The columns of ``commands``, from a command's record.
_COMMAND_COLUMNS: Final[dict[str, Any]] = {
    "ID": "command_id",
    "COMMAND": lambda record: output.verb(record.get("command")),
    "STATE": "state", "STEP": "applied_at_step",
    "REQUESTED": lambda record: output.moment(record.get("requested_at")),
    "BY": lambda record: requester(record.get("requested_by") or {}),
    "NOTE": lambda record: output.note(record) or record.get("reason") or "",
}  # fmt: skip
#: The columns of settings.
_SETTING_COLUMNS: Final[dict[str, Any]] = {
    "NAME": "name",
    "VALUE": lambda setting: output.number(setting.get("value")) + _age(setting.get("read_at_step")),
    "TYPE": "type", "MINIMUM": "minimum", "MAXIMUM": "maximum", "WHAT": "doc",
}  # fmt: skip


def outcome(job: str, record: dict[str, Any]) -> str:
    """Say in one line what became of a command; how it ended depends on what its method finishes with."""
    name, result = output.verb(record["command"]), record.get("result") or {}
    method = BUILTIN.get(record["command"])
    finishes_when = method.finishes_when if method is not None else frozenset()
    path = result.get("path")
    at_step = f" at step {result['step']}" if "step" in result else output.applied(record)
    took = f"{at_step} in {output.duration(result.get('seconds'))}: "
    if record["state"] != states.COMMAND_FINISHED:
        text = f"{name} {record['state']}{output.applied(record)}" + (f"; {record['note']}" if "note" in record else "")
    elif states.WHEN_ENDED in finishes_when:
        text = f"ended{at_step}, " + (f"saved: {path}" if path else "no checkpoint was saved for it")
    elif states.WHEN_SAVED in finishes_when:
        text = f"saved{took}{path}"
    elif record["command"] == "change_settings":
        text = f"set{at_step}: " + "; ".join(_setting_change(each, change) for each, change in result.items())
    elif record["command"] == "profile":
        return _profile(job, result)
    elif states.WHEN_EVALUATED in finishes_when:
        text = f"evaluated{took}{output.pairs(result.get('metrics') or {})}"
    else:
        known = {each: value for each, value in result.items() if value is not None}
        text = f"{name} finished{at_step}" + (f": {output.pairs(known)}" if known else "")
    return output.safe(f"{job}: {text}")


def command_table(records: list[dict[str, Any]]) -> str:
    """Show command records in aligned columns, oldest first."""
    return output.align(_COMMAND_COLUMNS, records, colour=False) if records else "no commands"


def settings_table(settings: list[dict[str, Any]]) -> str:
    """Show settings with the values that are in force, in aligned columns."""
    return output.align(_SETTING_COLUMNS, settings, colour=False) if settings else "no settings"


def _age(step: Any) -> str:
    return "" if step is None else f" at step {step}"


def _setting_change(name: str, change: dict[str, Any]) -> str:
    old, new, effective = (output.number(change[each]) for each in ("old", "new", "effective"))
    later = "" if effective == new else f", {effective} after the next step"
    note = f" ({change['note']})" if change.get("note") else ""
    return f"{name} {old} -> {new}{later}{note}"


#: The columns of a profile.
_OPERATION_COLUMNS: Final[dict[str, Any]] = {
    "OPERATION": "name", "DEVICE": "device", "CALLS": "calls",
    "SELF MS": lambda row: f"{row['self_ms']:.3f}",
    "TOTAL MS": lambda row: f"{row['total_ms']:.3f}",
}  # fmt: skip


def _profile(job: str, result: dict[str, Any]) -> str:
    note = f"; {result['note']}" if result.get("note") else ""
    cost = output.duration(result["seconds_lost"])
    lines = [f"{job}: profiled {result['steps']} steps, which cost training {cost}{note}"]
    sizes = zip(result["paths"], result["sizes"])
    lines += [f"rank {rank}: {path}, {size / 2**20:.1f} MiB" for rank, (path, size) in enumerate(sizes)]
    table = output.align(_OPERATION_COLUMNS, result["operations"], colour=False) if result["operations"] else ""
    return "\n".join([*map(output.safe, lines), *([table] if table else [])])


def requester(by: dict[str, Any]) -> str | None:
    """Name the user and the process that gave a command, as far as the job knows them."""
    user = by.get("user") or ("" if by.get("uid") is None else f"uid {by['uid']}")
    process = "" if by.get("pid") is None else f"{by.get('program') or 'pid'} {by['pid']}"
    return ", ".join(part for part in (user, process, by.get("via")) if part) or None


def changed_rule(job: str, rule: dict[str, Any], done: str) -> str:
    """Show what was done to a rule."""
    return rules_text(f"{job}: rule {rule['id']} {done}", [rule])


def rules_text(head: str, rules: list[dict[str, Any]]) -> str:
    """Show rules, two lines for each."""
    lines = [head] if head else []
    for rule in rules:
        lines.append(output.rule_line(rule))
        if rule["note"]:
            lines.append(f"   {rule['note']}")
    return "\n".join(map(output.safe, lines)) or "no rules"
