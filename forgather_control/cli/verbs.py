"""The verbs: what each is for, and the words and options that argparse reads behind it.

Most are rows of the method table, from which their help and options are taken.
"""

import argparse
import os
from functools import partial
from typing import Any, Final

from ..wire.builtin import BUILTIN
from . import exit_codes, job_words, options

SUMMARY: Final = "Find, watch, save, stop and abort running training jobs."
EPILOG: Final = f"""\
JOB is the exact id of a job, or what SLURM or torchrun call it; leave it out where exactly one job is live.
Where a verb takes several, JOB may also be a quoted pattern, such as 'run*'.
Options may stand before or after the verb.
{exit_codes.HELP}"""

#: The help of the verbs that stand for no method.
_OTHER_VERBS: Final = {
    "watch": """\
Show one job, or several, and follow them: progress, speed, metrics with their curves, commands, events.

In a pipe it prints one line of JSON for each event, until the jobs have ended. Ctrl-C ends it.""",
    "wait": """\
Return when a condition on the job holds, or the job has ended.

EXPR is NAME OP NUMBER or NAME is nan, each perhaps with "for N" for N values in a row, joined by and or by or.
NAME is a metric, step, epoch or hours. ended, dead and stalled stand alone; stalled > SECONDS gives a time.
Exit code 0: it holds; 1: the job ended without it; 4: the job died; 5: --timeout has passed.""",
    "cleanup": "Remove what dead jobs of this host left; list it and ask first.",
    "events": """\
Show the event log of a job, of one that has ended, too: phases, commands, checkpoints, the end.

With --follow, show what happens from now on, until the job ends.""",
    "rpc": "Call any method of the job and print its result.",
    "run": """\
Run a command of the job's training script and print its value; without NAME, list them with their parameters.

Values are read as the types of the parameters. A list is words between commas, a JSON array, or KEY=VALUE for
each item. It waits until the command is finished.""",
    "mcp": """\
Serve the Model Context Protocol on standard input and output, so that an AI assistant can watch jobs.

The assistant's host starts it. It only reads, unless --allow names verbs that act: save,stop,set:learning_rate.
set and run can be limited to one setting or command behind a colon; abort is allowed only by its name, too.
It needs the extra: pip install 'forgather_control[mcp]'.""",
    "help": "Show what a verb does, or all verbs; the same as VERB --help.",
    "completion": """\
Print the script that completes verbs, options, job ids and own commands in a shell: bash, zsh or fish.

In bash and zsh: eval "$(forgather-control completion bash)", in fish: forgather-control completion fish | source.
Instead of a shell, jobs prints the ids that are completed: those of all jobs that are not dead.""",
    "dial-stdio": """\
Copy between standard input and output and a job's socket. This is what --ssh runs on the other side.

The first line says that the job is reached: "forgather-control dial-stdio 1 JOB". Everything after it comes from
the job, until it closes the connection or the reader of the output goes. The end of the input is passed on to
the job, and its replies still come.""",
}
#: The options of the verbs that do not reach one job.
_OWN_OPTIONS: Final = {
    "list": ("--remote", "--token-file", "--ssh", "--ended", "--sort", "--quiet"),
    "events": ("--connect", "--token-file", "--ssh", "--follow", "--since"),
    "cleanup": ("--force",),
    "mcp": ("--allow", "--job"),
    "completion": (),
    "help": (),
    "dial-stdio": ("--until-input-ends",),
}
#: The verbs for programs: documented, but in no list and no suggestion.
_HIDDEN: Final = frozenset(("dial-stdio",))


def texts() -> dict[str, str]:
    """Return the help of each verb: first those of the method table, then the others."""
    return {method.verb: method.doc for method in BUILTIN.values() if method.verb is not None} | _OTHER_VERBS


def one(prog: str, verb: str) -> argparse.ArgumentParser:
    """Return the parser of one verb, for a command line that names it."""
    parser = argparse.ArgumentParser(prog=f"{prog} {verb}", **_look(texts()[verb]))
    _add_words(parser, verb)
    return parser


def whole(prog: str, width: int | None = None) -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """Return a parser of all verbs that are listed, for help, completion and the man page, and that of each verb.

    Args:
        prog: how the program is called.
        width: columns of its help; those of the terminal unless given.
    """
    parser = argparse.ArgumentParser(prog=prog, **_look(SUMMARY, width))
    options.add(parser, "--json", "--version")
    group = parser.add_subparsers(title="verbs", metavar="VERB", prog=prog)
    parser.usage = f"{prog} [OPTIONS] VERB ..."
    for verb, doc in texts().items():
        if verb not in _HIDDEN:
            sentence = options.plain(doc.partition("\n\n")[0])
            _add_words(group.add_parser(verb, help=sentence, **_look(doc, width)), verb)
    return parser, group.choices


def listed_options(parser: argparse.ArgumentParser) -> list[str]:
    """Return the options that the help of a parser lists."""
    return [name for action in parser._actions if action.help != argparse.SUPPRESS for name in action.option_strings]


def _add_words(parser: argparse.ArgumentParser, verb: str) -> None:
    """Add what may follow a verb: JOB, the parameters of its method, options."""
    options.add(parser, "--json", "--version")
    if verb == "rpc":
        parser.add_argument("job", metavar="JOB")
        parser.add_argument("method", metavar="METHOD")
        parser.add_argument("json_params", metavar="PARAMS-JSON", nargs="?", default="{}", help="an object or an array")
    elif verb in job_words.SEVERAL:
        job_words.add(parser, verb)
    elif verb == "help":
        parser.add_argument("of", metavar="VERB", nargs="?", help="nothing for all verbs")
    elif verb == "completion":
        from . import completion

        completion.add(parser)
    elif verb not in ("list", "cleanup", "mcp"):
        parser.add_argument("job", metavar="JOB", nargs="?", help="exact id, or nothing where one job is live")
    if verb == "watch":
        options.add(parser, "--once", "--interval")
    if verb == "wait":
        options.add(parser, "--until", "--timeout")
    if verb == "run":
        parser.add_argument("name", metavar="NAME", nargs="?", help="of the command")
        parser.add_argument("values", metavar="KEY=VALUE", nargs="*", help="a parameter of the command")
        options.add(parser, "--wait", "--timeout", "--no-wait", "--reason")
    if verb == "when":
        options.add(parser, "--remove")
    method = next((method for method in BUILTIN.values() if method.verb == verb), None)
    if method is not None:
        parser.set_defaults(method=method.name)
        for param in options.own_params(method):
            if verb not in ("set", "when") or param.name == "not_before":
                options.add_param(parser, param)
    options.add(parser, *_OWN_OPTIONS.get(verb, ("--connect", "--token-file", "--ssh")))
    if verb in ("cleanup", "mcp", "dial-stdio"):  # only to say why it cannot be
        options.add(parser, "--ssh", help=argparse.SUPPRESS)
    if method is not None and method.is_command:
        options.add(parser, "--wait", "--timeout", "--reason")
    if verb == "abort":
        options.add(parser, "--kill-after")


def _look(doc: str, width: int | None = None) -> dict[str, Any]:
    """Return what the parsers of all verbs have in common."""
    as_written = partial(argparse.RawDescriptionHelpFormatter, width=width or _width())
    return {"description": options.plain(doc), "epilog": EPILOG, "formatter_class": as_written, "allow_abbrev": False}


def _width() -> int:
    """Return the columns for help. argparse would ask shutil, which imports compressors, for each argument."""
    try:
        return max(40, os.get_terminal_size().columns - 2)
    except OSError:
        return 78
