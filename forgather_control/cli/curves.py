"""Curves of metrics over the steps of a run, in characters: one line each, or with axes where there is room."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any, Final

from . import output

#: From the lowest to the highest value within one line.
_SHADES: Final = " ▁▂▃▄▅▆▇█", " _.-=+*#@"
#: Metrics that the status shows already, and whose curve would be a straight line.
_LEFT_OUT: Final = ("epoch",)
#: Columns of a curve at most; lines of one with axes at least and at most; least columns of the terminal for those.
_WIDEST: Final = 100
_LOWEST, _HIGHEST = 5, 9
_WIDE: Final = 80
#: Columns of the values beside an axis.
_MARGIN: Final = 11

Points = list[tuple[float, float]]


def draw(history: Mapping[str, Any], names: Sequence[str], width: int, height: int, unicode: bool) -> list[str]:
    """Return the curves of these metrics, as large as fits into so many columns and lines; at least a line each.

    Where not all of them can have axes, losses come first: of a loss it is the form that matters.
    """
    known = {name: points for name in names if len(points := _points(history.get(name))) > 1 and name not in _LEFT_OUT}
    spare = height - len(known)
    charts = min(len(known), spare // (_LOWEST - 1)) if width >= _WIDE else 0
    if charts <= 0:
        return _lines(known, width, unicode)
    chosen = sorted(known, key=lambda name: "loss" not in name)[:charts]
    rows = min(_HIGHEST - 1, spare // charts)
    large = [line for name in known if name in chosen for line in _chart(name, known[name], width, rows, unicode)]
    return [*large, *_lines({name: known[name] for name in known if name not in chosen}, width, unicode)]


def _points(found: Any) -> Points:
    """Return the step and the value of each point, without those that are no numbers or are infinite."""
    return [(step, value) for step, _, value in found or () if _is_number(step) and _is_number(value)]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and abs(value) < 1e300  # not NaN either


def _lines(known: Mapping[str, Points], width: int, unicode: bool) -> list[str]:
    """Return a line for each: its name, its curve, its lowest and highest value."""
    size = max(8, min(60, width - 36))
    ranges = [" to ".join(_range(points)) for points in known.values()]
    room = max(4, min(16, width - size - 2 - max(map(len, ranges), default=0)))
    return [
        f"{output.safe(name)[:room]:{room}} {_bars(points, size, 1, unicode)[0]} {span}"
        for (name, points), span in zip(known.items(), ranges)
    ]


def _chart(name: str, points: Points, width: int, rows: int, unicode: bool) -> list[str]:
    """Return a line that names the metric and its steps, and the curve beside its highest and lowest value."""
    low, high = _range(points)
    curve = _bars(points, min(_WIDEST, width - _MARGIN - 4), rows, unicode)
    side = "┤" if unicode else "|"
    steps = f"steps {output.number(points[0][0])} to {output.number(points[-1][0])}"
    ticks = [high, *[""] * (rows - 2), low]
    return [f"{output.safe(name)}   {steps}", *(f"{tick:>{_MARGIN}} {side}{line}" for tick, line in zip(ticks, curve))]


def _range(points: Points) -> tuple[str, str]:
    values = [value for _, value in points]
    return output.number(min(values)), output.number(max(values))


def _bars(points: Points, columns: int, rows: int, unicode: bool) -> list[str]:
    """Return lines of bars, the highest line first: in each column the last value up to its step."""
    shades = _SHADES[0 if unicode else 1]
    full = len(shades) - 1
    values = _at_steps(points, columns)
    low, high = min(value for _, value in points), max(value for _, value in points)
    scale = (rows * full - 1) / (high - low) if high > low else 0.0
    levels = [1 + round((value - low) * scale) for value in values]
    return ["".join(shades[min(full, max(0, level - row * full))] for level in levels) for row in reversed(range(rows))]


def _at_steps(points: Points, columns: int) -> list[float]:
    steps = [step for step, _ in points]
    first, last = steps[0], steps[-1]
    at = (first + (last - first) * column / (columns - 1) for column in range(columns))
    return [points[max(0, bisect_right(steps, step) - 1)][1] for step in at]
