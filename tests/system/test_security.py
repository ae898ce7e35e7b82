"""Each statement of SECURITY.md names the tests that check it."""

from __future__ import annotations

import ast
import functools
import re

import pytest

import forgather_control

from ..support.harness import ROOT

TEXT = (ROOT / "SECURITY.md").read_text()
#: The text below each second-level heading.
SECTIONS = dict(re.findall(r"^## (.+)\n((?:(?!## ).*\n)*)", TEXT, re.MULTILINE))
#: Here an item may say instead why there is no test.
OPEN = "What is not protected"
REFERENCE = re.compile(r"`(tests/\w+/test_\w+\.py)::(test_\w+)`")


def items(section: str) -> list[str]:
    """Return the statements of a section, each as one line."""
    return [" ".join(item.split()) for item in re.split(r"^\* ", SECTIONS[section], flags=re.MULTILINE)[1:]]


ITEMS = [(section, item) for section in SECTIONS for item in items(section)]


@functools.cache
def names_in(path: str) -> set[str]:
    """Return the names of the tests in a file."""
    nodes = ast.parse((ROOT / path).read_text()).body
    return {node.name for node in nodes if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def test_it_has_its_sections():
    """All ways to a job, the limits, what is not protected, and how to report a problem."""
    ways = ["Over a TCP port", "Over ssh", "By files", "By signals"]
    assert list(SECTIONS) == ["Who can do what", *ways, "Limits", OPEN, "How to report a problem"]
    assert [section for section in SECTIONS if not items(section)] == ["How to report a problem"]
    assert len(ITEMS) > 30


@pytest.mark.parametrize(("section", "item"), ITEMS, ids=[item[:40] for _, item in ITEMS])
def test_each_statement_names_its_tests(section, item):
    """Each names at least one; where something is not protected, a reason is enough."""
    assert REFERENCE.search(item) or (section == OPEN and "(No test: " in item), item


def test_every_test_that_is_named_exists():
    """Under that name, in that file; and what looks like a reference is written as one."""
    named = REFERENCE.findall(TEXT)
    assert len(named) > 50 and len(named) == TEXT.count("::test_")
    assert [f"{path}::{name}" for path, name in named if name not in names_in(path)] == []


def test_the_version_to_report_is_where_it_says():
    """Readers can find out which version they have."""
    assert "`forgather_control.__version__`" in TEXT and forgather_control.__version__
