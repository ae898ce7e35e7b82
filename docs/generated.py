"""Write the files that are made from the parser: the completion scripts and the man page.

Run it after a change of verbs, options or their help: ``python -m docs.generated``. It needs shtab and
argparse-manpage; the installed package needs neither. ``tests/system/test_generated.py`` compares the files.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import shtab
from argparse_manpage.manpage import Manpage

from forgather_control.cli import completion, exit_codes, options, verbs
from forgather_control.version import VERSION
from forgather_control.wire.builtin import BUILTIN

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / "forgather_control" / "cli" / "completions"
MAN_PAGE = ROOT / "docs" / "forgather-control.1"
PROG = "forgather-control"
DESCRIPTION = "control a running PyTorch training job"

#: Functions of each shell that run the verb ``completion`` for the words that only this machine knows. Of what they
#: pass for own commands, it needs ``run`` and what follows.
PREAMBLE = {
    "bash": """\
_forgather_control_jobs() {
  compgen -W "$(forgather-control completion jobs 2>/dev/null)" -- "$1"
}
_forgather_control_own() {
  compgen -W "$(forgather-control completion commands -- "${COMP_WORDS[@]:1:COMP_CWORD-1}" 2>/dev/null)" -- "$1"
}""",
    "zsh": """\
_forgather_control_jobs() {
  local -a found=(${(f)"$(forgather-control completion jobs 2>/dev/null)"})
  compadd "$@" -a found
}
_forgather_control_own() {
  local -a found=(${(f)"$(forgather-control completion commands -- "${(@Q)words[1,CURRENT-1]}" 2>/dev/null)"})
  compadd "$@" -a found
}""",
    "fish": """\
function _forgather_control_jobs
  forgather-control completion jobs 2>/dev/null
end
function _forgather_control_own
  forgather-control completion commands -- (commandline -opc)[2..-1] 2>/dev/null
end""",
}


def dynamic(function: str) -> dict[str, str]:
    """Return what completes an argument: one of the functions above."""
    return {"bash": function, "zsh": function, "fish": f"({function})"}


#: What completes an argument, by the name under which argparse keeps it.
COMPLETERS = {
    **dict.fromkeys(("job", "jobs"), dynamic("_forgather_control_jobs")),
    "name": dynamic("_forgather_control_own"),
    "token": shtab.FILE,
}


def script(shell: str) -> str:
    """Return the completion script for a shell."""
    whole, listed = verbs.whole(PROG)
    options.add(whole, "--connect", "--token-file", "--ssh")  # which may stand before the verb, too
    for one in (whole, *listed.values()):
        one.description = None  # the sentence in the list of verbs is enough
        for action in one._actions:
            prepare(action, [*listed])
    made = shtab.complete(whole, shell, preamble=PREAMBLE[shell])
    made = corrected(made) if shell == "zsh" else made
    return "\n".join(line.rstrip() for line in made.splitlines()) + "\n"


#: What shtab 1.13 gets wrong for zsh, and what it should be.
ZSH = {
    "$zsh_eval_context[-1] == eval": "$zsh_eval_context[-1] == (eval|file)",  # it is sourced, not evaluated
    '"(*)::': '"*:',  # an argument that may be given several times
}


def corrected(made: str) -> str:
    """Return a script for zsh without these errors; each must be there, else this function has done its time."""
    for wrong, right in ZSH.items():
        assert wrong in made, wrong
        made = made.replace(wrong, right)
    return made


def prepare(action: argparse.Action, listed: list[str]) -> None:
    """Say what completes an argument; the parser itself needs to know less."""
    metavar = str(action.metavar)
    if action.dest in COMPLETERS:
        action.complete = COMPLETERS[action.dest]  # type: ignore[attr-defined]
        action.help = {"job": "job", "jobs": "job", "name": "command"}.get(action.dest, action.help)
    elif "|" in metavar:
        action.choices = metavar.split("|")
    elif metavar == "SHELL":
        action.choices = completion.SHELLS
    elif metavar == "VERB" and action.dest == "of":
        action.choices = listed
    elif metavar == "METHOD":
        action.choices = list(BUILTIN)


def man_page() -> str:
    """Return the man page, in troff."""
    whole, listed = verbs.whole(PROG, width=10_000)  # a line for each usage: man fills it
    for verb in listed.values():
        verb.description = (verb.description or "").partition("\n\n")[2]  # the page shows its first sentence anyway
        for action in verb._actions:
            if action.dest in ("json", "version"):  # they are described once, for all verbs
                action.help = argparse.SUPPRESS
    whole.epilog = None
    page = Manpage(whole, format="single-commands-section")
    page.synopsis, page.date = [PROG, "[OPTIONS]", "VERB", "..."], ""
    page.description, page.source, page.manual = DESCRIPTION, f"forgather_control {VERSION}", "User Commands"
    page.add_section("jobs", "=", troff(verbs.EPILOG.removesuffix(exit_codes.HELP).strip()))
    page.add_section("exit status", "=", troff(exit_codes.HELP.partition(": ")[2]))
    page.add_section("environment", "=", "\n".join(environment()))
    return str(page)


def environment() -> list[str]:
    """Return the environment variables as ``docs/command-line.md`` describes them, which a test compares."""
    page = (ROOT / "docs" / "command-line.md").read_text("utf-8")
    rows = re.findall(r"^\| `([A-Z_]+)` \| (.*) \|$", page, re.MULTILINE)
    return [line for name, doc in rows for line in (".TP", rf"\fB{name}\fR", troff(doc.replace("`", "")))]


def troff(text: str) -> str:
    """Return a text as troff shows it literally."""
    return re.sub(r"^(?=[.'])", r"\\&", text.replace("\\", r"\e").replace("-", r"\-"), flags=re.MULTILINE)


def files() -> dict[Path, str]:
    """Return the content of each file."""
    scripts = {SCRIPTS / f"{PROG}.{shell}": script(shell) for shell in completion.SHELLS}
    return {**scripts, MAN_PAGE: man_page()}


if __name__ == "__main__":
    for path, text in files().items():
        path.write_text(text, "utf-8")
        print(path.relative_to(ROOT))
