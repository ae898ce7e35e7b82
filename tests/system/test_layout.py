"""The layout is a test: which package may import which, and where torch and psutil may be imported."""

from __future__ import annotations

import ast
import sys

import pytest

from ..support.harness import ROOT

#: For each package the packages that it may import; "" is the root modules, which all may import.
MAY_IMPORT = {
    "": {""},
    "wire": {""},
    "processes": {""},
    "jobs": {"", "wire", "processes"},
    "server": {"", "wire", "jobs"},
    "ranks": {"", "wire"},
    "training": {"", "wire", "processes", "jobs", "server", "ranks"},
    "integrations": {"", "training"},
    "client": {"", "wire", "processes", "jobs"},
    "mcp": {"", "wire", "client"},
    "cli": {"", "wire", "jobs", "client", "mcp"},
}
#: What is not in the standard library, and the packages that may import it inside a function.
THIRD_PARTY = {
    "psutil": {"processes"},
    "lightning": {"integrations"},
    "pytorch_lightning": {"integrations"},
    "transformers": {"integrations"},
    "rich": {"cli"},
    "mcp": {"mcp"},
    "mcp_types": {"mcp"},
    "anyio": {"mcp"},
    "typing_extensions": {"client"},  # for type checkers alone
}
#: Modules that load other packages of ours on demand: lazy public names, and the console scripts.
ENTRY_POINTS = {"forgather_control", "forgather_control.__main__"}

PATHS = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in (ROOT / "forgather_control").rglob("*.py")
}
TREES = {name: ast.parse(path.read_text()) for name, path in PATHS.items()}

every_module = pytest.mark.parametrize("name", sorted(PATHS))


def package(module):
    """The package of a module, "" for a root module."""
    parts = module.split(".")[1:]
    return parts[0] if parts and "forgather_control." + parts[0] in PACKAGES else ""


PACKAGES = {name for name, path in PATHS.items() if path.name == "__init__.py"}


def imports(name, tree):
    """The full names of all modules that a tree imports, ours and others."""
    here = name.split(".") if name in PACKAGES else name.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = here[: len(here) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield full if full in PATHS else base


def ours(name):
    return {module for module in imports(name, TREES[name]) if module in PATHS} - {name}


def others(name, tree):
    """The imported packages that are neither ours nor in the standard library."""
    found = {module.partition(".")[0] for module in imports(name, tree)}
    return found - set(sys.stdlib_module_names) - {"__future__", "forgather_control"}


def at_module_level(tree):
    """The tree without the bodies of its functions, which run later, and without what only type checkers read."""

    class Cut(ast.NodeTransformer):
        def visit(self, node):
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                return list(map(self.visit, node.orelse))
            return None if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) else self.generic_visit(node)

    return Cut().visit(ast.parse(ast.unparse(tree)))


def reached(name):
    """All modules of ours that importing a module can load."""
    found, rest = set(), {name}
    while rest:
        module = rest.pop()
        found.add(module)
        rest |= ours(module) - found
    return found


def test_every_package_is_listed():
    """The table names the packages that exist, and no others."""
    assert {package(name) for name in PATHS} == set(MAY_IMPORT)


@every_module
def test_imports_follow_the_table(name):
    """A module imports only from its own package and from those that the table allows."""
    if name not in ENTRY_POINTS:
        allowed = MAY_IMPORT[package(name)] | {package(name)}
        assert {module for module in ours(name) if package(module) not in allowed} == set()


@every_module
def test_no_cycles(name):
    """No module can reach itself through its imports."""
    assert not any(name in reached(module) for module in ours(name))


@every_module
def test_nothing_third_party_at_module_level(name):
    """Loading a module loads the standard library and this package: no torch, no psutil, no trainer."""
    assert others(name, at_module_level(TREES[name])) == set()


@every_module
def test_third_party_inside_functions(name):
    """torch is never imported by name; the rest only inside the packages that the table names."""
    allowed = {library for library, users in THIRD_PARTY.items() if package(name) in users}
    assert others(name, TREES[name]) <= allowed
