"""The public names: lazy, complete, and cheap to import for a client."""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import subprocess
import sys

import pytest

import forgather_control
from forgather_control import errors, version

from ..support.harness import MS, ROOT, SOON, Process, job_process, needs_torch

SOURCE = ROOT / "forgather_control" / "__init__.py"


def ends_well(source, *args):
    """Run a program to its end; what it prints, parsed."""
    with Process(source, *args) as process:
        line = process.line()
        assert process.end() == 0, "".join(process.errors)
        return json.loads(line)


def module_of(name):
    """The module that defines a public name, as the package finds it."""
    return forgather_control._MODULES.get(name) or ("client.api" if name.islower() else "errors")


PUBLIC = [name for name in forgather_control.__all__ if name != "__version__"]


def test_all_is_what_the_modules_give():
    """Each public name is the object that its own module defines."""
    assert sorted(forgather_control.__all__) == forgather_control.__all__
    assert forgather_control._MODULES.keys() < set(PUBLIC)
    for name in set(PUBLIC) - {"jobs"}:
        module = importlib.import_module(f"forgather_control.{module_of(name)}")
        assert getattr(forgather_control, name) is getattr(module, name)
        assert getattr(forgather_control, name).__module__ == module.__name__


@pytest.mark.parametrize("first", ["", "registry", "record"])
def test_jobs_is_a_package_and_a_function(first):
    """``jobs`` is the package, whatever is imported first, and calling it is calling ``client.many.jobs``."""
    before = f"import forgather_control.jobs.{first}" if first else "pass"
    shown = ends_well(
        f"""
        import json
        {before}
        from forgather_control import Jobs, jobs
        import forgather_control.jobs.registry
        assert forgather_control.jobs is jobs and jobs.registry is forgather_control.jobs.registry
        assert type(jobs("run*")) is Jobs
        print(json.dumps([jobs.__name__, repr(jobs("run*", parallel=1))]))
        """
    )
    assert shown == ["forgather_control.jobs", "<Jobs run*>"]


def test_type_checkers_see_the_same():
    """What stands under TYPE_CHECKING is what is loaded when it is used."""
    block = next(node for node in ast.parse(SOURCE.read_text()).body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert seen.pop("*") == "errors"
    seen |= {name: "errors" for name in vars(errors) if name in PUBLIC}
    assert seen == {name: module_of(name) for name in PUBLIC}


def test_every_error_is_public():
    """A caller can name each class that it may want to catch."""
    defined = {
        name for name, value in vars(errors).items() if isinstance(value, type) and value.__module__ == errors.__name__
    }
    assert defined == {name for name in PUBLIC if module_of(name) == "errors"}


def test_contract():
    """The names that the documentation promises are there."""
    promised = {"TrainerControlCallback", "TrainingJob", "list_jobs", "get_job_status", "save_checkpoint"}
    promised |= {"graceful_stop", "save_and_stop", "abort", "cleanup", "connect"}
    assert promised <= set(forgather_control.__all__)
    assert all(callable(getattr(forgather_control, name)) for name in promised)


def test_dir_and_star():
    """``dir`` lists every public name before it is loaded, and ``import *`` gives them all."""
    names = ends_well(
        """
        import json, forgather_control
        before = sorted(set(dir(forgather_control)))
        from forgather_control import *
        print(json.dumps([before, sorted(name for name in forgather_control.__all__ if name not in globals())]))
        """
    )
    assert set(forgather_control.__all__) <= set(names[0])
    assert names[1] == []


@pytest.mark.parametrize("name", ["nothing", "__wrapped__", "_private", "Abort", "job", "torch"])
def test_unknown_name(name):
    """A name that is not there is an AttributeError that says so, as hasattr and copy expect."""
    with pytest.raises(AttributeError, match=rf"'forgather_control' has no attribute '{name}'"):
        getattr(forgather_control, name)


def test_name_is_looked_up_once():
    """After its first use a name is an ordinary attribute."""
    assert forgather_control.list_jobs is forgather_control.__dict__["list_jobs"]


LOADED = """
    import json, sys
    {doing}
    print(json.dumps(sorted({{name.partition(".")[0] for name in sys.modules}})))
"""
HEAVY = {"torch", "psutil", "transformers", "numpy", "lightning", "pytorch_lightning"}


@pytest.mark.parametrize(
    "doing",
    [
        "import forgather_control",
        "import forgather_control; forgather_control.list_jobs; forgather_control.Client; forgather_control.Job",
        "from forgather_control import abort, connect, get_job_status, ControlError, CommandRecord",
        "import forgather_control; assert forgather_control.list_jobs() == []",
        "import forgather_control.cli.main",
        "import forgather_control.cli.main; assert forgather_control.cli.main.main(['list']) == 0",
    ],
)
def test_client_is_light(doing):
    """Neither the client nor the CLI loads torch, or psutil while no process has to be judged."""
    quiet = "import os; out = os.dup(1); os.dup2(2, 1)\n    " + doing + "\n    sys.stdout.flush(); os.dup2(out, 1)"
    assert HEAVY.isdisjoint(ends_well(LOADED.format(doing=quiet)))


@needs_torch
@pytest.mark.parametrize("name", ["TrainingJob", "TrainerControlCallback"])
def test_training_side_brings_no_torch(name):
    """The training side takes the torch that is there and loads none itself."""
    doing = f"import forgather_control; forgather_control.{name}"
    assert "torch" not in ends_well(LOADED.format(doing=doing))


def test_client_of_a_live_job_is_light():
    """Asking a live job its status needs neither torch nor psutil in the client, nor what only other ways need."""
    with job_process("light", 10 * MS):
        doing = "import forgather_control; assert forgather_control.get_job_status('light')['pid']"
        loaded = ends_well(LOADED.format(doing=doing))
    assert {*HEAVY, "ssl", "hashlib", "subprocess", "dataclasses", "logging", "threading", "signal"}.isdisjoint(loaded)


def test_version():
    """One version: the package's, the module's, the metadata's; the protocol is a whole number."""
    assert forgather_control.__version__ == version.VERSION
    assert re.fullmatch(r"\d+\.\d+\.\d+", version.VERSION) and version.PROTOCOL == 2
    assert "version = attr: forgather_control.version.VERSION" in (ROOT / "setup.cfg").read_text()


def test_types_are_exported():
    """The package says that it is typed (PEP 561)."""
    assert (SOURCE.parent / "py.typed").read_bytes() == b""
    assert "forgather_control = py.typed" in (ROOT / "setup.cfg").read_text()


@pytest.mark.parametrize("flags", [["-O"], ["-OO"], ["-W", "error"], ["-bb"]], ids=" ".join)
def test_imports_under_any_flags(flags):
    """Every module loads without docstrings, without asserts and with warnings as errors."""
    paths = [path.relative_to(ROOT).with_suffix("") for path in SOURCE.parent.rglob("*.py") if path.stem[0] != "_"]
    modules = [".".join(path.parts) for path in paths]
    run = [sys.executable, *flags, "-c", "import " + ", ".join(modules)]
    done = subprocess.run(run, capture_output=True, text=True, timeout=SOON * 3, env=dict(os.environ), cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
