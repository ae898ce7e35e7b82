"""The files that are made from the parser are those of this parser: completion scripts and man page."""

from __future__ import annotations

import subprocess

import pytest

from forgather_control.cli import verbs
from forgather_control.version import VERSION

from ..support.harness import ROOT, needs

MAN_PAGE = ROOT / "docs" / "forgather-control.1"


@pytest.mark.once
def test_the_files_are_up_to_date():
    """``python -m docs.generated`` would change none of them."""
    from docs import generated

    old = [path.name for path, text in generated.files().items() if path.read_text() != text]
    assert not old, "run python -m docs.generated"


def test_the_man_page_describes_each_verb():
    """And no hidden one; its version is that of the package."""
    text = MAN_PAGE.read_text().replace("\\-", "-")
    assert all(f".SS \\fBforgather-control {verb}\\fR" in text for verb in verbs.whole("")[1])
    assert "dial-stdio" not in text and VERSION in text.partition("\n")[0]


@needs("mandoc")
@pytest.mark.once
def test_the_man_page_is_well_formed():
    """mandoc warns of nothing but the date, which the page leaves out, as it is made anew with each change."""
    done = subprocess.run(["mandoc", "-T", "lint", "-W", "warning", MAN_PAGE], capture_output=True, text=True)
    assert [line for line in done.stdout.splitlines() if "missing date" not in line] == []
    shown = subprocess.run(["mandoc", "-T", "ascii", MAN_PAGE], capture_output=True, text=True, check=True).stdout
    assert "forgather-control - control a running" in shown
