"""The words of a command line: what they mean, and which do not go together.

Options may stand before or after the verb and the JOB: the words are sorted first, then argparse sees one verb.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from typing import Any, Final, NoReturn

from ..client.target import suggestion
from ..errors import ControlError
from ..wire import conditions
from ..wire.builtin import BUILTIN
from . import exit_codes, job_words, options, verbs

#: What cannot be combined with --ssh, and why.
_NOT_OVER_SSH: Final = {
    "connect": "--connect: both say where the job is",
    "remote": "--remote: both say where the jobs are",
    "token": "--token-file: ssh needs no token",
    "kill_after": "--kill-after, which ends processes of this host: run it there",
}


def parse(words: Sequence[str], prog: str) -> argparse.Namespace:
    """Parse one command line.

    ``verb`` names what to do, ``method`` the row of the table behind it, if any, and ``params`` its parameters.

    Raises:
        SystemExit: the words are wrong (2), or asked for help or the version (0).
    """
    given, others = options.split(words)
    if others[:1] == ["help"] and {"-h", "--help"}.isdisjoint(given):
        given, others = ["--help"], others[1:2]
    if not others or others[0] not in verbs.texts():
        _without_verb(prog, given, others[0] if others else None)
    verb = others.pop(0)
    inner: list[str] = []
    if verb == "when":
        given, others, inner = _split_rule(given, others)
    parser = verbs.one(prog, verb)
    if any(word.startswith("--wait=") for word in given):
        parser.error("--wait takes no value; --timeout SECONDS gives up waiting")
    is_odd = any(word.startswith("-") for word in others)
    args, unknown = parser.parse_known_args([*given, *(["--"] if is_odd else []), *others])
    if unknown:
        _unknown(parser, unknown, verbs.listed_options(parser))
    args.verb, args.is_many = verb, False
    if verb in job_words.SEVERAL:
        job_words.read(parser, args)
    if verb == "when":
        _read_rule(parser, args, inner, prog)
    _check(parser, args)
    args.params = _params(args)
    return args


def _unknown(parser: argparse.ArgumentParser, words: list[str], known: list[str]) -> NoReturn:
    """Refuse words that no option or argument takes; suggest an option that is known."""
    hint = suggestion(words[0].partition("=")[0], known, f"{parser.prog} --help shows all")
    parser.error(f"unrecognized arguments: {' '.join(words)}; {hint}")


def _without_verb(prog: str, given: list[str], word: str | None) -> NoReturn:
    """Print what was asked for, or say what is wrong with the verb."""
    parser, listed = verbs.whole(prog)
    if word is not None:
        hint = suggestion(word, listed, f"choose from {', '.join(listed)}")
        parser.error(f"no verb {ascii(word)[:140]}; {hint}")
    known = [option for one in listed.values() for option in verbs.listed_options(one)]
    unknown = [option for option in given if option.startswith("-") and option.partition("=")[0] not in known]
    asks = [option for option in given if option in ("-h", "--help", "--version")]
    if unknown and not asks:
        _unknown(parser, unknown, known)
    parser.parse_args(asks)
    parser.print_help(sys.stderr)
    parser.exit(exit_codes.USAGE, f"\n{prog}: error: a verb is missing\n")


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse options that cannot be meant together."""
    given = vars(args)
    if given.get("kill_after") is not None and (given["wait"] or given["timeout"] is not None):
        parser.error("--kill-after waits by itself: it cannot be combined with --wait or --timeout")
    if args.verb == "completion":
        from . import completion

        completion.check(parser, args)
    if args.verb == "run":
        _check_run(parser, args)
    if args.verb == "set":
        _check_set(parser, args)
    if args.verb == "list" and args.ended and (args.remote is not None or args.sort is not None):
        parser.error(f"--ended cannot be combined with --{'sort' if args.remote is None else 'remote'}")
    if given.get("ssh") is None:
        return
    if args.verb == "cleanup":
        parser.error(f"cleanup asks about what it shows: run ssh -t {args.ssh} forgather-control cleanup")
    if args.verb == "mcp":
        parser.error(f"the server runs on the host of the jobs: run ssh {args.ssh} forgather-control mcp")
    if args.verb == "dial-stdio":
        parser.error("dial-stdio is what --ssh runs on the other side")
    for name, other in _NOT_OVER_SSH.items():
        if given.get(name) is not None:
            parser.error(f"--ssh cannot be combined with {other}")


def _check_run(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Find out which word is JOB, which may be left out, and which NAME."""
    if args.name is not None and "=" in args.name:
        args.job, args.name, args.values = None, args.job, [args.name, *args.values]
    for word in args.values:
        if "=" not in word:
            parser.error(f"a parameter is KEY=VALUE, not {ascii(word)[:140]}")
    if "=" in (args.name or args.job or ""):
        parser.error("the NAME of the command is missing before its parameters")
    if args.no_wait and (args.wait or args.timeout is not None):
        parser.error("--no-wait cannot be combined with --wait or --timeout")


def _check_set(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Read the settings; without one, list them."""
    try:
        setattr(args, f"{options.PARAM}changes", options.settings(args.values) or None)
    except ValueError as err:
        parser.error(str(err))
    if not args.values:
        if args.wait or args.timeout is not None:
            parser.error("--wait and --timeout need a setting to change")
        args.method = "list_settings"


#: The options of ``when`` itself; all others belong to its command.
_OF_RULES: Final = (
    "--not-before",
    "--remove",
    "--all",
    "--parallel",
    "--json",
    "--connect",
    "--token-file",
    "--ssh",
    "--version",
    "-h",
    "--help",
)


def _split_rule(given: list[str], others: list[str]) -> tuple[list[str], list[str], list[str]]:
    """Return the options and words of ``when``, and the words of its command."""
    at = next((at for at, word in enumerate(others) if re.search(job_words.IN_CONDITION, word)), len(others))
    own: list[str] = []
    inner = others[at + 1 :]
    with_values, rest = options.with_values(), iter(given)
    for word in rest:
        value = [each for each in [next(rest, None)] if each is not None] if word in with_values else []
        (own if word.partition("=")[0] in _OF_RULES else inner).extend([word, *value])
    return own, others[: at + 1], inner


def _read_rule(parser: argparse.ArgumentParser, args: argparse.Namespace, inner: list[str], prog: str) -> None:
    """Read JOB, EXPR and the command; without EXPR, list or remove."""
    args.command, given = None, vars(args)
    commands = [method.verb for method in BUILTIN.values() if method.is_command and method.verb] + ["run"]
    if args.when is None:
        if not {*commands}.isdisjoint(args.jobs[1:]):
            parser.error("EXPR is one word in quotes, behind JOB: when run1 'eval_loss > 2.0 for 3' save-stop")
        if inner or given[f"{options.PARAM}not_before"] is not None:
            parser.error("the EXPR of the rule is missing, such as 'eval_loss > 2.0 for 3'")
        args.method = "list_rules" if args.remove is None else "remove_rule"
        if args.remove is not None:
            setattr(args, f"{options.PARAM}id", args.remove)
        return
    if args.remove is not None:
        parser.error("--remove stands without EXPR")
    try:
        conditions.parse(args.when)
    except ControlError as err:
        parser.error(str(err))
    if not inner or inner[0] not in commands:
        hint = suggestion(inner[0], commands, "") if inner else ""
        parser.error("; ".join(filter(None, (f"after EXPR comes what to do: {', '.join(commands)}", hint))))
    verb, *words = inner
    args.command = parse([verb, args.job or "job", *words], prog)  # a job id stands before its other words
    more = vars(args.command).get("jobs", [])[1:]
    if more:
        what = "a setting is NAME=VALUE, not" if verb == "set" else "unrecognized arguments:"
        parser.error(f"{what} {ascii(' '.join(more))[:140]}")
    if args.command.params.keys() & {"wait", "timeout"} or vars(args.command).get("kill_after") is not None:
        parser.error("a rule gives its command later: it cannot wait for it")
    if args.command.verb == "set" and not args.command.values:
        parser.error("set needs NAME=VALUE in a rule")
    if args.command.verb == "run" and args.command.name is None:
        parser.error("run needs the NAME of a command in a rule")
    setattr(args, f"{options.PARAM}when", args.when)
    if verb != "run":
        setattr(args, f"{options.PARAM}do", args.command.method)
        setattr(args, f"{options.PARAM}params", args.command.params)


def _params(args: argparse.Namespace) -> dict[str, Any]:
    """Return the parameters of the call."""
    given = vars(args)
    params = {name.removeprefix(options.PARAM): given[name] for name in given if name.startswith(options.PARAM)}
    if given.get("wait") or given.get("timeout") is not None:
        params |= {"wait": "finished", "timeout": given["timeout"]}
    return {name: value for name, value in params.items() if value is not None}
