"""What is published: an sdist and a wheel that install into a fresh environment without torch, and work there.

Run by ``tox -e package``: it builds, and installs from a package index.
"""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from forgather_control.version import VERSION

from ..support.harness import JOB, ROOT, needs

pytestmark = pytest.mark.package

SHELLS = ("bash", "zsh", "fish")


def run(*words: str | Path, **options: object) -> str:
    """Return what a program prints; it must succeed."""
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist, and the wheel that is built of it."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "-o", folder, ROOT)
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def fresh(dist: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment that has the wheel and what it needs, and nothing else."""
    folder = tmp_path_factory.mktemp("fresh")
    run(sys.executable, "-m", "venv", folder)
    run(folder / "bin" / "python", "-m", "pip", "install", "-q", dist[1])
    return folder


@pytest.fixture
def user(fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which a user works who has activated that environment."""
    monkeypatch.setenv("PATH", f"{fresh / 'bin'}:{os.environ['PATH']}")
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@contextmanager
def training(fresh: Path) -> Iterator[subprocess.Popen[str]]:
    """A job that trains with the installed package."""
    words = [str(fresh / "bin" / "python"), "-u", "-c", JOB, "smoke"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as job:
        try:
            assert job.stdout is not None and job.stdout.readline() == "ready\n"
            yield job
        finally:
            job.kill()


def test_a_package_index_takes_both(dist):
    """Their names have the version, and ``twine check`` has nothing to say."""
    assert [path.name for path in dist] == [
        f"forgather_control-{VERSION}.tar.gz",
        f"forgather_control-{VERSION}-py3-none-any.whl",
    ]
    run(sys.executable, "-m", "twine", "check", "--strict", *dist)


def test_the_sdist_is_the_whole_project(dist):
    """All files of the repository but those for git."""
    listed = set(run("git", "ls-files", cwd=ROOT).split()) - {".gitignore"}
    with tarfile.open(dist[0]) as archive:
        there = {name.partition("/")[2] for name in archive.getnames()}
    assert listed - there == set()


def test_the_installed_package_works_without_torch(fresh, user):
    """List, status, save, stop of a real job."""
    with training(fresh) as job:
        assert "smoke" in run("forgather-control", "list")
        assert json.loads(run("forgather-control", "status", "smoke", "--json"))["status"] == "training"
        saved = json.loads(run("forgather-control", "save", "smoke", "--wait", "--json"))
        assert Path(saved["result"]["path"]).is_dir()
        run("forgather-control", "stop", "smoke", "--wait")
        assert job.wait() == 0
    assert run("forgather-control", "--version") == f"forgather-control {VERSION}\n"
    installed = {line.partition("==")[0] for line in run("pip", "list", "--format", "freeze").splitlines()}
    assert installed - {"pip", "setuptools"} == {"forgather_control", "psutil"}


def test_completion_is_installed(user):
    """For each shell the script of this version."""
    for shell in SHELLS:
        script = ROOT / "forgather_control" / "cli" / "completions" / f"forgather-control.{shell}"
        assert run("forgather-control", "completion", shell) == script.read_text()


@needs("man")
def test_the_man_page_is_installed(fresh, user):
    """``man`` finds it by the ``PATH``."""
    page = fresh / "share" / "man" / "man1" / "forgather-control.1"
    assert page.read_text() == (ROOT / "docs" / "forgather-control.1").read_text()
    assert Path(run("man", "-w", "forgather-control").strip()) == page


def test_no_link_of_the_description_is_dead(fresh):
    """Relative links are plain text, or lead to the address of the files, where setup.cfg knows it."""
    source = "import importlib.metadata as m; print(m.metadata('forgather_control').get_payload())"
    shown = run(fresh / "bin" / "python", "-c", source)
    assert "# forgather_control" in shown and not re.search(r"\]\((?!https://|#)", shown)
    readme = runpy.run_path(str(ROOT / "setup.py"))["readme"]
    text = (ROOT / "README.md").read_text()
    links = re.findall(r"\]\(([^)]*)\)", readme(text, "https://example.org/v1"))
    assert links == [f"https://example.org/v1/{link}" for link in re.findall(r"\]\(([^)]*)\)", text)]
