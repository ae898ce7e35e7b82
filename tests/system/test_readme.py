"""The README is true: its commands run, its tables are the code's own, its links lead somewhere."""

from __future__ import annotations

import configparser
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import forgather_control
from forgather_control.server import limits
from forgather_control.wire import builtin

from ..support.harness import MS, ROOT, SOON, job_process, needs, running_loop, strict, until

README = (ROOT / "README.md").read_text()


def block(mark: str) -> str:
    """The code block behind ``<!-- mark -->``."""
    found = re.search(rf"<!-- {mark} -->\n```\w+\n(.*?)\n```", README, re.DOTALL)
    assert found, mark
    return found[1]


def table(head: str) -> list[list[str]]:
    """The rows of the table whose head begins with ``head``."""
    lines = README[README.index(f"| {head}") :].splitlines()[2:]
    rows = lines[: next(i for i, line in enumerate([*lines, ""]) if not line.startswith("|"))]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_the_run_and_test_lines_are_one_line_each():
    """A newcomer pastes one line; .ci/run takes the test line from here."""
    assert "\n" not in block("run line") and "tour.py" in block("run line")
    assert "\n" not in block("test line") and block("test line").endswith("tox")
    printed = subprocess.run(
        ["bash", "-c", "sed -n '/<!-- test line -->/,/```$/p' README.md | grep -v -e '^```' -e '<!--'"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert printed.stdout.strip() == block("test line")
    assert "<!-- test line -->" in (ROOT / ".ci" / "run").read_text()


def test_the_ten_lines_train(tmp_path):
    """The plain loop of the README, with a train_step and a save of our own."""
    assert len(block("plain loop").splitlines()) <= 10
    space = {"train_step": lambda: 0.5, "save": lambda step: tmp_path, "__name__": "readme"}
    exec(compile(block("plain loop"), "README.md", "exec"), space)
    assert space["step"] == 1000 and not space["job"].aborted


def test_the_quick_start_runs_as_typed():
    """Four commands from another terminal; the last one ends the job."""
    with job_process("my_experiment") as job:
        for line in block("quick start").splitlines():
            words = line.split()[2:]
            done = subprocess.run(
                [sys.executable, "-m", "forgather_control", *words], capture_output=True, text=True, timeout=SOON
            )
            assert done.returncode == 0, (line, done.stderr)
        assert job.end() == 0


@needs("socat")
def test_the_socat_line_prints_the_record_with_the_path(jobs_dir):
    """As it stands there, with the path of this test's jobs directory in it."""
    with running_loop("my_experiment"):
        line = block("socat").replace("$HOME/.config/forgather/jobs", str(jobs_dir))
        done = subprocess.run(line, shell=True, capture_output=True, timeout=SOON)
        record = strict(done.stdout)["result"]
        assert Path(record["result"]["path"]).is_dir() and record["state"] == "finished"
        shown = json.loads(re.search(r"```json\n(.*?)\n```", README, re.DOTALL)[1])
        assert shown["result"].keys() == record.keys() and shown["result"]["result"].keys() == record["result"].keys()


def by_hand() -> list[str]:
    """Each line that asks, behind those that prepare it."""
    lines = [*block("by hand").splitlines(), *block("by hand over tcp").splitlines()]
    prepare = [line for line in lines if re.match(r"\w+=", line)]
    return ["\n".join([*prepare, line]) for line in lines if line not in prepare]


@needs("socat")
@needs("nc")
@needs("openssl")
@pytest.mark.once
@pytest.mark.parametrize(
    "lines", by_hand(), ids=lambda lines: re.search(r"(socat - \w+|nc -N \S+|touch|openssl)", lines)[0]
)
def test_the_lines_by_hand_say_how_far_it_is(lines, jobs_dir, pem, monkeypatch):
    """In the job's directory, with this job's port; each prints the status, and what it says before is the welcome."""
    monkeypatch.setattr(limits, "TICK_PERIOD", 20 * MS)
    tls = {"certfile": pem.cert, "keyfile": pem.key} if "cert.pem" in lines else {}
    with running_loop("my_experiment", port=0, **tls):
        port = json.loads((jobs_dir / "my_experiment" / "endpoint.json").read_text())["port"]
        lines = lines.replace("8900", str(port)).replace("cert.pem", pem.cert)
        lines = lines.replace("sleep 4", "until [ -e replies/status.json ]; do sleep 0.1; done")
        done = subprocess.run(["bash", "-c", lines], cwd=jobs_dir / "my_experiment", capture_output=True, timeout=SOON)
        *welcome, status = map(strict, done.stdout.splitlines(keepends=True))
        assert done.returncode == 0 and status["result"]["job_id"] == "my_experiment", done.stderr
        assert [reply["result"]["job_id"] for reply in welcome] == ["my_experiment"] * (f"{port}" in lines)
        assert "global_step" in status["result"]


def test_the_python_lines_run(capsys):
    """The program of the README, against a job of that name."""
    program = re.search(r"## From a Python program\n\n```python\n(.*?)\n```", README, re.DOTALL)[1]
    with running_loop("my_experiment") as run:
        until(lambda: run.steps)
        exec(compile(program, "README.md", "exec"), {"__name__": "readme"})
        assert run.saves[0] in capsys.readouterr().out


def test_the_tables_are_the_codes_own():
    """Verbs, methods, exit codes and tox environments: as the code has them, none more, none less."""
    verbs = {re.match(r"`([a-z-]+)", row[0])[1] for row in table("verb")}
    assert verbs == {method.verb for method in builtin.BUILTIN if method.verb} | {"cleanup", "rpc"}
    assert set(re.findall(r"`([\w.]+)`", " ".join(row[0] for row in table("method")))) == set(builtin.BUILTIN)
    from forgather_control.cli import main

    codes = {main.DONE, main.REFUSED, main.USAGE, main.NO_SUCH_JOB, main.NO_ANSWER, main.TOO_LATE, main.INTERRUPTED}
    assert {int(row[0]) for row in table("exit code")} == codes
    tox = configparser.ConfigParser(interpolation=None)
    tox.read(ROOT / "tox.ini")
    listed = set(tox["tox"]["env_list"].replace(" ", "").split(","))
    sections = {name.removeprefix("testenv:") for name in tox.sections() if name.startswith("testenv:")}
    assert set(re.findall(r"`(\w+)`", " ".join(row[0] for row in table("tox environment")))) == listed | sections


def test_the_names_it_shows_exist():
    """Every name imported from the package in the README is at its door, and every link leads to a file."""
    for names in re.findall(r"from forgather_control import ([\w, ]+)", README):
        for name in names.split(","):
            assert hasattr(forgather_control, name.strip()), name
    for target in re.findall(r"\]\(([\w/.]+)\)", README):
        assert (ROOT / target).exists(), target
