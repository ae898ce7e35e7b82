"""Completion in real shells: the scripts that the verb prints, with real jobs."""

from __future__ import annotations

import os
import pty
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from forgather_control.cli import completion, parser, verbs

from ..support.harness import MS, ROOT, SOON, Process, cli, job_process, needs, running_loop

PROG = "forgather-control"
#: Lines that are typed, and what a shell must offer for the last word; nothing else, where the line ends with a blank.
LINES = {
    "sta": {"status", "stacks"},
    "--json sta": {"status", "stacks"},
    "--ssh gpu7 sta": {"status", "stacks"},
    "dial": set(),
    "help sta": {"status", "stacks"},
    "completion ": {"bash", "zsh", "fish"},
    "save --wa": {"--wait"},
    "save run-1 --rea": {"--reason"},
    "save --evaluate ": {"auto", "yes", "no"},
    "list --sort st": {"state", "step"},
    "stop ": {"run-1", "other.2"},
    "status run-1 oth": {"other.2"},
    "save --timeout 5 ru": {"run-1"},
    "rpc run-1 pi": {"ping"},
    "run run-1 ": {"sample", "reset"},
    "run --reason 'a b' run-1 sa": {"sample"},
    "run nobody ": set(),
}


def sample(prompt: str) -> str:
    return prompt


def reset() -> None:
    pass


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a script like the one that pip installs."""
    folder = tmp_path_factory.mktemp("bin")
    call = "from forgather_control.__main__ import control; control()"
    script = folder / "forgather-control"
    script.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -c "{call}" "$@"\n')
    script.chmod(0o755)
    return folder


@pytest.fixture
def shell_jobs(program: Path, jobs_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two live jobs, of which one has commands of its own; a shell finds the program."""
    with running_loop("run-1", commands=[sample, reset]), running_loop("other.2"):
        monkeypatch.setenv("PATH", f"{program}:{os.environ['PATH']}")
        monkeypatch.setenv("PYTHONPATH", str(ROOT))
        yield


def bash(lines: list[str], folder: Path) -> list[set[str]]:
    """Call the function that is registered, as bash does; each line's words are split as bash reads them."""
    asked = [
        f"""
        COMP_WORDS=({PROG} {line}{" ''" if line.endswith(" ") else ""}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
        COMPREPLY=(); $function; printf '%s\\n' "${{COMPREPLY[@]}}"; echo =
        """
        for line in lines
    ]
    find = f'[[ $(complete -p {PROG}) =~ -F\\ ([^ ]+) ]] && function="${{BASH_REMATCH[1]}}"'
    return answers(["bash", "--norc"], f"source <({PROG} completion bash)\n{find}\n" + "".join(asked))


def fish(lines: list[str], folder: Path) -> list[set[str]]:
    """Ask fish itself, as its reader does at the key Tab."""
    asked = [f"complete -C {shlex.quote(f'{PROG} {line}')} | string split -f1 \\t\necho =\n" for line in lines]
    return answers(["fish", "--no-config"], f"{PROG} completion fish | source\n" + "".join(asked))


def answers(shell: list[str], program: str) -> list[set[str]]:
    """Run a program that prints the words that are offered, one in a line, and = behind those of each line typed."""
    done = subprocess.run([*shell, "-c", program], capture_output=True, text=True, timeout=3 * SOON)
    assert (done.returncode, done.stderr) == (0, "")
    return [set(part.split()) for part in done.stdout.split("=\n")[:-1]]


#: Write what the completion system of zsh would offer into the file $OUT.
ZSH = """
PS1='ready> '; LISTMAX=0; OUT={folder}/0
autoload -Uz compinit; compinit -D -u
source <({prog} completion zsh)
compadd() {{ local -a fits; builtin compadd -O fits "$@"; print -rl -- $fits >>$OUT; builtin compadd "$@" }}
"""


def zsh(lines: list[str], folder: Path) -> list[set[str]]:
    """Type each line and the key Tab into an interactive zsh on a terminal."""
    (folder / ".zshrc").write_text(ZSH.format(prog=PROG, folder=folder))
    pid, terminal = pty.fork()
    if pid == 0:
        os.execvpe("zsh", ["zsh", "-i"], {**os.environ, "ZDOTDIR": str(folder), "TERM": "dumb"})
    try:
        for after, line in enumerate(lines, 1):
            read_prompt(terminal)  # before it, the terminal would edit the line, not zsh
            os.write(terminal, f"{PROG} {line}\t\x15OUT={folder}/{after}\n".encode())
        read_prompt(terminal)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(terminal)
    found = (folder / str(at) for at in range(len(lines)))
    return [set(path.read_text().split()) if path.exists() else set() for path in found]


def read_prompt(terminal: int) -> None:
    """Read what is on the terminal up to the next prompt."""
    shown = b""
    while b"\x1b[?2004h" not in shown:  # the line editor waits for a key
        shown += os.read(terminal, 4096)


@pytest.mark.once
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize(
    "shell", [bash, pytest.param(zsh, marks=needs("zsh")), pytest.param(fish, marks=needs("fish"))]
)
def test_a_shell_completes(shell: Callable[[list[str], Path], list[set[str]]], shell_jobs, tmp_path):
    """Verbs, options and their values, ids of jobs that are not dead, own commands; anywhere on the line."""
    assert dict(zip(LINES, shell([*LINES], tmp_path), strict=True)) == LINES


@pytest.mark.once
def test_the_scripts_know_the_parser():
    """Each verb and each option that is listed, and nothing that is hidden."""
    root, listed = verbs.whole(PROG)
    names = {name.lstrip("-") for one in (root, *listed.values()) for name in verbs.listed_options(one)}
    for shell in completion.SHELLS:
        done = cli("completion", shell)
        assert done.returncode == 0 and "dial-stdio" not in done.stdout
        assert {*listed, *names} <= {word.lstrip("-") for word in re.findall(r"[\w-]+", done.stdout)}


#: Print what the verb prints; then whether it connected anywhere, and the modules of torch that it loaded.
PROBE = """
import sys
connected = []
sys.addaudithook(lambda event, args: connected.append(args) if event == "socket.connect" else None)
from forgather_control.cli import main as cli
cli.main(["completion", "jobs"])
print(len(connected), "torch" in sys.modules, flush=True)
"""


@pytest.mark.once
def test_ids_are_found_without_connecting():
    """Those of live jobs and of silent ones, which no dead job is among; even where none would answer."""
    with job_process("dead") as dead, job_process("stopped") as stopped, running_loop("live"):
        dead.kill()
        os.kill(stopped.pid, signal.SIGSTOP)
        with Process(PROBE) as probe:
            assert ({probe.line(), probe.line()}, probe.line()) == ({"stopped", "live"}, "0 False"), probe.errors


@pytest.mark.once
def test_own_commands_are_asked_for_a_short_time(monkeypatch):
    """A job that does not answer has none, and neither has one that is missing; no error reaches the line typed."""
    monkeypatch.setattr(completion, "_TIMEOUT", 100 * MS)
    with job_process("stopped") as stopped:
        os.kill(stopped.pid, signal.SIGSTOP)
        for words in (["run", "stopped"], ["run", "nobody"], ["run"], []):
            assert completion.own_commands(words) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["bsh"], "no shell 'bsh'; did you mean bash?"),
        (["tcsh"], "no shell 'tcsh'; choose from bash, zsh, fish"),
        (["bash", "zsh"], "unrecognized arguments: zsh"),
        ([], "the following arguments are required: SHELL"),
    ],
)
def test_what_is_no_shell(words, said, capsys):
    """Exit code 2, and one line that says what there is."""
    with pytest.raises(SystemExit) as ended:
        parser.parse(["completion", *words], PROG)
    assert ended.value.code == 2 and capsys.readouterr().err.endswith(f"error: {said}\n")
