"""The results of a benchmark: rows with an aim beside each figure, one table per part, one JSON file for all.

A figure is a median of many single measurements; variants that are compared take turns within one run, and a ratio is
the median of the ratios of the turns, so that a machine whose speed drifts slows both sides of it.
"""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any


class Samples:
    """One variant's measurements, round by round."""

    def __init__(self, rounds: Iterable[Iterable[float]] = ()) -> None:
        self.rounds = [list(each) for each in rounds]

    def add(self, values: Iterable[float]) -> None:
        """Add one more round."""
        self.rounds.append(list(values))

    @property
    def values(self) -> list[float]:
        """All values in order."""
        return sorted(value for each in self.rounds for value in each)

    @property
    def median(self) -> float:
        """The median of all values."""
        return statistics.median(self.values)

    def quantile(self, share: float) -> float:
        """Return the value that this share of all does not exceed."""
        values = self.values
        return values[min(len(values) - 1, math.ceil(share * len(values)) - 1)]

    def over(self, other: Samples) -> float:
        """Return the ratio to another one: the median over the rounds of both."""
        pairs = zip(self.rounds, other.rounds, strict=True)
        return statistics.median(_times(statistics.median(mine), statistics.median(its)) for mine, its in pairs)


def _times(one: float, other: float) -> float:
    return one / other if other else math.inf  # a server beside which training came to a halt, say


class Rounds(defaultdict[str, Samples]):
    """Samples by the name of the variant."""

    def __init__(self) -> None:
        super().__init__(Samples)


@dataclass(frozen=True)
class Aim:
    """A limit of a figure, or of its ratio where it is compared with something.

    ``slack`` is what the ends of the window in which something was counted can make of it, and no more.
    """

    limit: float
    at_least: bool = False
    slack: float = 0.0

    def __str__(self) -> str:
        return f"{'>=' if self.at_least else '<='} {self.limit:g}" + (f" (+{self.slack:.2g})" if self.slack else "")

    def is_met(self, figure: float) -> bool:
        """Return whether the figure meets the aim."""
        return figure >= self.limit - self.slack if self.at_least else figure <= self.limit + self.slack


@dataclass(frozen=True)
class Row:
    """One row: a figure, and its ratio to another one of the same run.

    ``ratio`` is this figure over the other one; with ``faster`` the other one over this.
    """

    part: str
    group: str
    row: str
    figure: float
    unit: str
    p99: float | None = None
    least: float | None = None
    count: int | None = None
    than: str | None = None
    ratio: float | None = None
    faster: bool = False
    aim: Aim | None = None

    @property
    def met(self) -> bool | None:
        """Whether the aim is met; ``None`` where there is none."""
        return None if self.aim is None else self.aim.is_met(self.figure if self.ratio is None else self.ratio)

    def to_json(self) -> dict[str, Any]:
        """Return the object for the JSON file."""
        return {**asdict(self), "aim": None if self.aim is None else str(self.aim), "met": self.met}

    def cells(self) -> tuple[str, ...]:
        """Return the cells of the table."""
        ratio = "" if self.ratio is None else f"{shown(self.ratio)} x{' faster' if self.faster else ''}"
        met = {None: "", True: "yes", False: "NO"}[self.met]
        figures = [shown(number) for number in (self.figure, self.p99, self.least)]
        return self.row, *figures, self.unit, self.than or "", ratio, "" if self.aim is None else str(self.aim), met


class Table:
    """The rows of one part, in groups; within a group rows are compared by their names."""

    def __init__(self, part: str) -> None:
        self.part, self._group = part, ""
        self.rows: list[Row] = []
        self._samples: dict[str, Samples] = {}

    def group(self, name: str) -> None:
        """Begin a group of rows."""
        self._group, self._samples = name, {}

    def figure(self, row: str, figure: float, unit: str, aim: Aim | None = None, **more: Any) -> None:
        """Add a row of a single number."""
        self.rows.append(Row(self.part, self._group, row, figure, unit, aim=aim, **more))

    def samples(self, row: str, samples: Samples, unit: str, aim: Aim | None = None) -> None:
        """Add a row of many measurements."""
        self._samples[row] = samples
        values = samples.values
        more = {"p99": samples.quantile(0.99), "least": values[0], "count": len(values)}
        self.figure(row, samples.median, unit, aim, **more)

    def compare(self, row: str, than: str, aim: Aim | None = None, faster: bool = False) -> None:
        """Add a row with the ratio of one row of samples to another."""
        mine, its = self._samples[row], self._samples[than]
        ratio = its.over(mine) if faster else mine.over(its)
        unit = next(each.unit for each in self.rows if each.row == row and each.group == self._group)
        self.figure(row, mine.median, unit, aim, than=than, ratio=ratio, faster=faster)

    def print(self) -> None:
        """Print the rows, each aim beside its figure; a row that is compared again shows only what is new."""
        heads = (self.part, "median", "p99", "least", "", "beside", "ratio", "aim", "met")
        cells = [row.cells() for row in self.rows]
        widths = [max(len(line[place]) for line in (heads, *cells)) for place in range(len(heads))]
        lines, group, before = ["", _line(heads, widths)], "", ""
        for row, line in zip(self.rows, cells, strict=True):
            if row.group != group:
                lines.append(f"-- {row.group} ".ljust(sum(widths) + 2 * len(widths) - 2, "-"))
            is_more = row.row == before and row.group == group and row.p99 is None
            lines.append(_line(("", "", "", "", "", *line[5:]) if is_more else line, widths))
            group, before = row.group, row.row
        print("\n".join(lines), flush=True)


def _line(cells: Iterable[str], widths: list[int]) -> str:
    left = (0, 4, 5)  # the others are numbers
    pairs = enumerate(zip(cells, widths, strict=True))
    return "  ".join(
        cell.ljust(width) if place in left else cell.rjust(width) for place, (cell, width) in pairs
    ).rstrip()


def shown(number: float | None) -> str:
    """Return a number with three significant digits."""
    if number is None:
        return ""
    if not math.isfinite(number) or number == 0:
        return f"{number:g}"
    return f"{number:,.{max(0, 2 - math.floor(math.log10(abs(number))))}f}"


# The file...


def machine() -> dict[str, Any]:
    """Return the machine and the versions of the programs."""
    info = Path("/proc/cpuinfo").read_text() if os.path.exists("/proc/cpuinfo") else ""
    models = [line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("model name")]
    return {
        "processor": models[0] if models else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "python": platform.python_version(),
        **{name: _version(name) for name in ("forgather_control", "torch", "aiohttp", "requests")},
        "load": os.getloadavg()[0],
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def write(path: Path, about: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Write all rows of all parts, and the machine."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": about, "rows": rows}, indent=1) + "\n")


# Measuring...


def in_turns(
    variants: dict[str, Callable[[], Any]], rounds: int, calls: int, pause: float = 0.0, unit: float = 1e6
) -> Rounds:
    """Call the variants in turns: ``calls`` times in each round; the first round warms up.

    Args:
        pause: seconds that a round lasts at least, so that budgets that calls use up fill again.
        unit: one second in the unit of the result.
    """
    found = Rounds()
    for number in range(rounds + 1):
        end = time.perf_counter() + pause
        for name, call in variants.items():
            values = [seconds(call) * unit for _ in range(calls)]
            if number:
                found[name].add(values)
        time.sleep(max(0.0, end - time.perf_counter()))
    return found


def seconds(call: Callable[[], Any]) -> float:
    """Return how long one call takes."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def each_of(call: Callable[[], Any], calls: int, clock: Callable[[], float] = time.perf_counter) -> float:
    """Return seconds per call, for calls that are too short to be timed alone."""
    begin = clock()
    for _ in range(calls):
        call()
    return (clock() - begin) / calls
