"""The tests mirror the source: one test file for each module, in the same folder; the exceptions are listed."""

from __future__ import annotations

import ast
import re

import pytest

from ..support.harness import ROOT

#: Modules without a test file of their own, and where they are tested.
ELSEWHERE = {
    "__init__": "system/test_exports",
    "__main__": "cli/test_main",
    "version": "system/test_exports",
    "server/limits": "system/test_limits",
    "wire/limits": "system/test_limits",
    "training/limits": "system/test_limits",
    "cli/verbs": "cli/test_parser",
    "cli/watch_screen": "cli/test_watch",
    "notebook": "wire/test_job_status",
    "client/past": "cli/test_status",
    "client/event_history": "cli/test_events",
    "mcp/limits": "mcp/test_tools",
    "cli/command_output": "cli/test_output",
    "training/applied_command": "training/test_command_tracker",
    "training/open_runs": "training/test_controller",
    "training/job_server": "training/test_controller",
    "server/connections": "server/test_server",
    "jobs/limits": "system/test_limits",
    "client/limits": "client/test_connection",
    "ranks/participant": "ranks/test_consensus",
    "ranks/tally": "ranks/test_consensus",
    "ranks/polling_group": "ranks/test_group",
    "ranks/coordinator_group": "ranks/test_store_group",
    "ranks/limits": "ranks/test_consensus",
}
#: Test files that belong to no single module.
WITHOUT_MODULE = {"system", "stacks"}

SOURCE = ROOT / "forgather_control"
MODULES = {str(path.relative_to(SOURCE).with_suffix("")) for path in SOURCE.rglob("*.py")}
MODULES = {name for name in MODULES if not name.endswith("/__init__")}
TESTS = sorted((ROOT / "tests").rglob("test_*.py"))


def home(module):
    """The test file of a module, relative to ``tests`` and without its suffix."""
    folder, _, name = module.rpartition("/")
    return ELSEWHERE.get(module, f"{folder}/test_{name}".lstrip("/"))


@pytest.mark.parametrize("module", sorted(MODULES))
def test_module_has_its_tests(module):
    """Each module is tested in the file of its name, or in the one that the list names."""
    assert (ROOT / "tests" / f"{home(module)}.py").is_file()


def test_every_test_file_has_its_module():
    """A test file outside ``system`` is the mirror of a module."""
    found = {str(path.relative_to(ROOT / "tests").with_suffix("")) for path in TESTS}
    assert {name for name in found if name.split("/")[0] not in WITHOUT_MODULE} <= {home(name) for name in MODULES}


def test_exceptions_are_needed():
    """The list of exceptions names modules that exist and have no file of their own."""
    assert ELSEWHERE.keys() <= MODULES
    own = {module: f"{module.rpartition('/')[0]}/test_{module.rpartition('/')[2]}".lstrip("/") for module in ELSEWHERE}
    assert not [module for module, name in own.items() if (ROOT / "tests" / f"{name}.py").exists()]


@pytest.mark.parametrize("path", TESTS, ids=lambda path: str(path.relative_to(ROOT / "tests")))
def test_every_test_says_what_it_tests(path):
    """Each test has a docstring whose first line is a sentence, and a name that is unique in its file."""
    tests = [node for node in ast.parse(path.read_text()).body if getattr(node, "name", "").startswith("test_")]
    names = [node.name for node in tests]
    assert names and len(names) == len(set(names))
    for node in tests:
        assert (ast.get_docstring(node) or "").split("\n\n")[0].endswith("."), node.name


@pytest.mark.parametrize("path", TESTS, ids=lambda path: str(path.relative_to(ROOT / "tests")))
def test_no_test_is_skipped_silently(path):
    """No test is marked as an expected failure, or skipped without a reason."""
    source = path.read_text()
    assert not re.search(r"pytest\.mark\.(xfail|skip)\b|pytest\.(xfail|skip)\(\)", source) or path.stem == "test_mirror"
