"""The values of each metric over the whole run, in bounded memory: where it is full, the resolution is halved.

The training thread writes, the server thread reads. A reader copies arrays, which are replaced whole when points
are left out of them, so that neither needs a lock. Only numbers of the host are kept: no device is ever read.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Iterable, Mapping
from typing import Any

from . import limits

Columns = tuple["array[float]", "array[float]", "array[float]"]


class _Series:
    """The points of one metric: the first that was logged, and then every 2nd, 4th, 8th ... of those that follow."""

    __slots__ = ("capacity", "columns", "last", "logged", "mask")

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.columns: Columns = (array("d"), array("d"), array("d"))  # step, time, value
        self.logged = self.mask = 0  # how many points were logged, and the bits of the number of a kept one that are 0
        self.last = (0.0, 0.0, 0.0)  # kept or not

    def add(self, point: tuple[float, float, float]) -> None:
        self.last = point
        number = self.logged
        self.logged = number + 1
        if not number & self.mask:
            steps, times, values = self.columns
            steps.append(point[0])
            times.append(point[1])
            values.append(point[2])
            if len(values) > self.capacity:
                self.reduce(self.capacity)

    def reduce(self, capacity: int) -> None:
        """Keep at most so many points from now on: leave out every second one until they fit."""
        self.capacity = capacity
        while len((columns := self.columns)[0]) > capacity:
            self.mask = 2 * self.mask + 1
            self.columns = columns[0][::2], columns[1][::2], columns[2][::2]

    def report(self, most: int) -> list[list[float]]:
        """Return at most so many points, with the first and the last one. On any thread."""
        points = list(zip(*(column.tolist() for column in self.columns)))
        last = self.last
        if not points or points[-1][:2] != last[:2]:
            points.append(last)
        count = len(points)
        if count > most:
            gaps = max(1, most - 1)
            chosen = [points[round(number * (count - 1) / gaps)] for number in range(most)]
            points = chosen if most > 1 else points[-1:]
        return [[int(step), at, value] for step, at, value in points]


class MetricsHistory:
    """The history of all metrics of one run."""

    def __init__(self) -> None:
        self._series: dict[str, _Series] = {}
        self._capacity = limits.HISTORY_POINTS // limits.HISTORY_NAMES

    def log(self, step: int, held: Mapping[str, Any]) -> None:
        """Keep the numbers among values that were logged. On the training thread; takes about a microsecond a name."""
        now = time.time()
        for name, value in held.items():
            if type(value) is not float:
                value = _number(value)
                if value is None:
                    continue
            series = self._series.get(name) or self._begin(name)
            series.add((step, now, value))

    def report(self, names: Iterable[str] | None, points: int) -> dict[str, list[list[float]]]:
        """Return ``[step, time, value]`` of each metric, at most so many for each. On any thread.

        Args:
            names: of the metrics; one without numbers has no points. None given: all that have some.
        """
        known = {name: series for name, series in self._series.copy().items() if series.logged}
        wanted = known if names is None else names
        return {name: known[name].report(points) if name in known else [] for name in wanted}

    def _begin(self, name: str) -> _Series:
        if len(self._series) >= limits.MAX_NAMES:  # the one that was not logged for the longest time goes
            del self._series[min(self._series, key=lambda name: self._series[name].last[1])]
        new = self._series[name] = _Series(self._capacity)
        while self._capacity * len(self._series) > limits.HISTORY_POINTS:
            self._capacity //= 2
        if new.capacity != self._capacity:
            for series in self._series.values():
                series.reduce(self._capacity)
        return new


def _number(value: Any) -> float | None:
    """Return a number of the host as a double; ``None`` if it is none, or too large for one."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value)
    except OverflowError:
        return None
