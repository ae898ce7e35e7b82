"""Each clause of docs/promises.md names the tests that check it."""

from __future__ import annotations

import re

import pytest

from ..support.harness import ROOT
from .test_security import REFERENCE, names_in

PAGE = (ROOT / "docs" / "promises.md").read_text()
SECTIONS = re.findall(r"^## (.+)$", PAGE, re.MULTILINE)
CLAUSES = [
    " ".join(item.split()) for item in re.split(r"^(?:\* |## .*$)", PAGE, flags=re.MULTILINE)[1:] if item.strip()
]


def test_the_readme_makes_the_same_promises():
    """In the same words and order."""
    promised = re.findall(r"^\d\. \*\*(.+?)\.\*\*", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert promised == SECTIONS and len(CLAUSES) > 15


@pytest.mark.parametrize("clause", CLAUSES, ids=[clause[:40] for clause in CLAUSES])
def test_each_clause_names_its_tests(clause):
    """At least one, which exists under that name in that file."""
    named = REFERENCE.findall(clause)
    assert named and len(named) == clause.count("::test_")
    assert [f"{path}::{name}" for path, name in named if name not in names_in(path)] == []
