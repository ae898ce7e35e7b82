"""Curves in characters: by the steps, of any values, in any room."""

from __future__ import annotations

import pytest

from forgather_control.cli import curves


def points(*values):
    """One for each step from 1."""
    return [[step, 0.0, value] for step, value in enumerate(values, 1)]


def test_a_line_has_its_lowest_and_highest_value():
    """The lowest is the lowest bar, not a gap."""
    (line,) = curves.draw({"loss": points(*range(8, 0, -1))}, ["loss"], 44, 1, True)
    assert line == "loss             █▇▆▅▄▃▂▁ 1 to 8"
    (line,) = curves.draw({"loss": points(*range(8, 0, -1))}, ["loss"], 44, 1, False)
    assert line == "loss             @#*+=-._ 1 to 8"


def test_a_narrow_line_has_a_short_name():
    """Its values are whole; all lines are aligned."""
    history = {"learning_rate": points(4.8502e-05, 4.9978e-05), "loss": points(1, 2)}
    assert curves.draw(history, list(history), 40, 2, True) == [
        "learni ▁▁▁▁▁▁▁█ 4.8502e-05 to 4.9978e-05",
        "loss   ▁▁▁▁▁▁▁█ 1 to 2",
    ]


def test_a_chart_has_axes():
    """Values beside it, steps above it; each line is as long, and each column falls."""
    title, *rows = curves.draw({"loss": points(*range(100, 0, -1))}, ["loss"], 80, 7, True)
    assert title == "loss   steps 1 to 100" and len(rows) == 6 and {len(row) for row in rows} == {78}
    assert rows[0].startswith("        100 ┤█") and rows[-1].startswith("          1 ┤█")
    heights = [sum("▁▂▃▄▅▆▇█".find(row[column]) + 1 for row in rows) for column in range(13, 78)]
    assert heights == sorted(heights, reverse=True) and heights[0] == 48 and heights[-1] == 1


def test_a_curve_goes_by_steps():
    """Points that lie closer at the end, as new ones do, take no more room there."""
    found = [[0, 0.0, 0.0], [50, 0.0, 1.0], *([100 + step / 100, 0.0, 0.0] for step in range(50))]
    (line,) = curves.draw({"x": found}, ["x"], 56, 1, True)
    assert line.split()[1] == "▁" * 10 + "█" * 9 + "▁"


@pytest.mark.parametrize(
    "found",
    [None, [], points(1.0), points("NaN", "Infinity", float("nan")), [["NaN", 0, 1.0], [2, 0, 1.0]], points(10**400)],
)
def test_what_is_no_curve_is_left_out(found):
    """Fewer than two points with numbers."""
    assert curves.draw({"x": found}, ["x", "y"], 80, 24, True) == []


def test_what_is_constant_is_a_flat_line():
    """And the epoch, a straight one, is left out."""
    assert curves.draw({"epoch": points(1, 2)}, ["epoch"], 80, 24, True) == []
    (line,) = curves.draw({"x": points(5, 5)}, ["x"], 44, 1, True)
    assert line == "x                ▁▁▁▁▁▁▁▁ 5 to 5"


@pytest.mark.parametrize("height", range(-3, 60))
def test_curves_share_the_room(height):
    """In no more lines than there are, but at least one each; more lines are used."""
    history = {name: points(1, 2, 3) for name in "abc"}
    shown, lower = (curves.draw(history, list("abc"), 100, lines, True) for lines in (height, height - 1))
    assert 3 <= len(shown) <= max(3, height) and len(lower) <= len(shown)
    assert len(shown) >= max(3, height) - 3 or len(shown) == 27


def test_losses_have_axes_first():
    """What has none takes one line below them; each keeps its place among its like."""
    names = ["runtime", "loss", "rate", "eval_loss"]
    shown = curves.draw({name: points(1, 2, 3) for name in names}, names, 100, 14, True)
    titles = [line.split()[0] for line in shown if " ┤" not in line]
    assert titles == ["loss", "eval_loss", "runtime", "rate"] and len(shown) == 14
