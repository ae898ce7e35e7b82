"""The layout is a test: a module imports from lower floors only, and says on which floor it stands."""

from __future__ import annotations

import ast
import re
import sys

import pytest

from .world import ROOT

FLOORS = {
    0: "errors clock version connection progress metrics process rounds line polled launch tls stacks vitals bridge",
    1: "jsonrpc commands endpoint record dump",
    2: "roster mailbox jobs exchange signals snapshot world gate listener ssh letters",
    3: "server directory screen ranks census ledger offer caller arguments files by_file",
    4: "client controller",
    5: "rescue adapter",
    6: "cli hf plain lightning",
}
DOOR = {"__init__", "__main__"}
#: What is not in the standard library, and who may import it inside a function.
INSIDE = {"psutil": {"process", "vitals"}}
#: The client's tower, which never meets the training side.
TRAINING = {"adapter", "controller", "directory", "exchange", "connection", "hf", "mailbox", "metrics", "plain",
            "progress", "ranks", "server", "signals", "lightning",
            "world", "rounds", "line", "polled", "census", "ledger", "offer", "gate", "listener",
            "stacks", "vitals", "files", "snapshot"}  # fmt: skip

FLOOR = {name: floor for floor, names in FLOORS.items() for name in names.split()}
SOURCES = {path.stem: path.read_text() for path in (ROOT / "forgather_control").glob("*.py")}
TREES = {name: ast.parse(source) for name, source in SOURCES.items()}

every_module = pytest.mark.parametrize("name", sorted(FLOOR))


def imports(tree):
    """All imports of a tree as (own, name): ``own`` for a module of this package."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name.startswith("forgather_control"), alias.name.removeprefix("forgather_control.")
        elif isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("forgather_control")):
            module = (node.module or "").removeprefix("forgather_control").lstrip(".")
            yield from [(True, module)] if module else [(True, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            yield False, node.module


def ours(name):
    return {module for own, module in imports(TREES[name]) if own}


def others(tree):
    """The packages that are not in the standard library."""
    found = {module.partition(".")[0] for own, module in imports(tree) if not own}
    return found - set(sys.stdlib_module_names) - {"__future__"}


def at_module_level(tree):
    """The tree without the bodies of its functions, which run later."""

    class Cut(ast.NodeTransformer):
        def visit(self, node):
            return None if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) else self.generic_visit(node)

    return Cut().visit(ast.parse(ast.unparse(tree)))


def reached(name):
    """Everything that loading a module loads."""
    found, rest = set(), {name}
    while rest:
        module = rest.pop()
        found.add(module)
        rest |= ours(module) - found
    return found


def test_every_module_has_its_floor():
    """No module stands outside the house, and none is listed that is not there."""
    assert len(FLOOR) == sum(len(names.split()) for names in FLOORS.values()), "a module stands on two floors"
    assert FLOOR.keys() | DOOR == SOURCES.keys()


@every_module
def test_imports_go_down(name):
    """A module imports from strictly lower floors, so there are no cycles, and never through the door."""
    assert ours(name) <= FLOOR.keys(), "only modules are imported, not the door"
    assert {module: FLOOR[module] for module in ours(name) if FLOOR[module] >= FLOOR[name]} == {}


@every_module
def test_floor_is_no_higher_than_needed(name):
    """A module stands above something it imports; the ground floor imports nothing of ours."""
    assert bool(ours(name)) == (FLOOR[name] > 0)


@every_module
def test_docstring_names_the_floor(name):
    """Each file says at its top on which floor it stands, and what it imports of ours where it lists it."""
    doc = " ".join((ast.get_docstring(TREES[name]) or "").split())
    assert re.findall(r"Floor (\d)", doc) == [str(FLOOR[name])]
    assert ("mports nothing" in doc) == (FLOOR[name] == 0)
    listed = re.search(r"[Ii]mports ((?:\w+, )*\w+(?: and \w+)?)(?: only)?[;.,:]", doc)
    if listed and FLOOR[name] > 0:
        said = set(re.split(r", | and ", listed[1])) & FLOOR.keys()
        assert said == ours(name) - {"version"} or said == ours(name)


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_nothing_foreign_at_module_level(name):
    """Loading a module loads the standard library and us: no torch, no psutil, no trainer."""
    assert others(at_module_level(TREES[name])) == set()


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_foreign_inside_functions(name):
    """torch is nowhere imported by name; psutil only by those who must ask the operating system."""
    assert others(TREES[name]) == {package for package, users in INSIDE.items() if name in users}


@pytest.mark.parametrize("name", ["client", "cli", "rescue", "screen", "jobs"])
def test_client_never_meets_training(name):
    """The client's tower and the training tower share the ground floors only."""
    assert reached(name) & TRAINING == set()


@pytest.mark.parametrize("name", ["hf", "lightning", "plain", "controller", "server"])
def test_training_never_meets_the_client(name):
    """A training job loads neither the client nor the CLI."""
    assert reached(name) & {"client", "cli", "rescue", "screen"} == set()


def test_server_knows_nothing_of_training():
    """Below the controller nothing but the table knows a command, and the server knows no table."""
    assert reached("server") & {"commands", "mailbox", "progress", "metrics", "ranks", "controller"} == set()
