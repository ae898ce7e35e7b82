"""Logged values as JSON values. Floor 0: imports nothing of ours, and torch and numpy only by their manners.

A logged value may be anything: a tensor on a device, a NumPy scalar, a list of a million numbers.
``hold`` runs on the training thread and must cost next to nothing, above all no synchronisation
with a device; ``plain`` runs on the server thread, when somebody has asked.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

#: Most names kept, and the longest text of one value; what is logged ends up in every status reply.
MAX_NAMES: Final = 256
MAX_TEXT: Final = 200


def hold(logs: Mapping[Any, Any]) -> dict[str, Any]:
    """The values as they are, without the graphs and memory behind them."""
    return {str(name)[:MAX_TEXT]: _light(value) for name, value in logs.items()}


def merge(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """A new dictionary with the latest value of each name, the latest ``MAX_NAMES`` of them."""
    merged = {**{name: value for name, value in old.items() if name not in new}, **new}
    return dict(list(merged.items())[-MAX_NAMES:])


def plain(held: Mapping[str, Any]) -> dict[str, Any]:
    """The values as JSON values: numbers where they are numbers, else short texts."""
    return {name: _plain(value) for name, value in held.items()}


def _light(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, str):
        return value[:MAX_TEXT]
    if hasattr(value, "detach"):  # a tensor: not its graph, and nothing larger than a number
        return value.detach() if value.numel() == 1 else f"tensor of shape {tuple(value.shape)}"[:MAX_TEXT]
    if hasattr(value, "item") and getattr(value, "size", 1) == 1:
        return value
    return repr(value)[:MAX_TEXT] if isinstance(value, (list, tuple, dict)) and len(value) <= 16 else type(value).__name__


def _plain(value: Any) -> Any:
    if hasattr(value, "item"):
        value = value.item()
    if value is None or isinstance(value, (bool, float, str)):
        return value
    if isinstance(value, int):
        return value if abs(value) < 1 << 63 else float(value) if abs(value) < 1 << 1000 else str(value)[:MAX_TEXT]
    return repr(value)[:MAX_TEXT]
