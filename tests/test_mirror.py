"""The tests mirror the source: one file a module, the exceptions by name."""

from __future__ import annotations

import ast
import re

import pytest

from .world import ROOT

#: Modules without a test file of their own, and where they are tested.
ELSEWHERE = {
    "__init__": "test_exports",
    "__main__": "test_cli",
    "version": "test_exports",
    "polled": "test_ranks",  # a collective needs ranks
}

MODULES = {path.stem for path in (ROOT / "forgather_control").glob("*.py")}
TESTS = sorted((ROOT / "tests").glob("test_*.py"))


@pytest.mark.parametrize("module", sorted(MODULES))
def test_module_has_its_tests(module):
    """Each module is tested in the file of its name, or in the one that the list names."""
    assert (ROOT / "tests" / f"{ELSEWHERE.get(module, 'test_' + module)}.py").is_file()


def test_exceptions_are_needed():
    """The list of exceptions names modules that exist and have no file of their own."""
    assert ELSEWHERE.keys() <= MODULES
    assert not [module for module in ELSEWHERE if (ROOT / "tests" / f"test_{module}.py").exists()]


@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.stem)
def test_every_test_says_what_it_tests(path):
    """Each test has a docstring whose first line is a sentence, and a name that stands once in its file."""
    tests = [node for node in ast.parse(path.read_text()).body if getattr(node, "name", "").startswith("test_")]
    names = [node.name for node in tests]
    assert names and len(names) == len(set(names))
    for node in tests:
        assert (ast.get_docstring(node) or "").split("\n\n")[0].endswith("."), node.name


@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.stem)
def test_no_test_is_forgotten(path):
    """No test is marked as a failure that is expected, or skipped without a reason."""
    source = path.read_text()
    assert not re.search(r"pytest\.mark\.(xfail|skip)\b|pytest\.(xfail|skip)\(\)", source) or path.stem == "test_mirror"
