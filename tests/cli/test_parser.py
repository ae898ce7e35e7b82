"""The words of the command line: where they may stand, and which do not go together."""

from __future__ import annotations

import pytest

from forgather_control.cli import parser
from forgather_control.client.api import connect
from forgather_control.errors import InvalidParams
from forgather_control.wire import builtin

from ..support.harness import Process


def parse(*words: str):
    return parser.parse(words, "forgather control")


def test_every_verb_of_the_table_is_there():
    """Each with its method, and those that the table does not know beside them."""
    for method in builtin.BUILTIN:
        if method.verb is not None:
            args = parse(method.verb)
            assert (args.verb, args.method, args.json, args.ssh) == (method.verb, method.name, False, None)
    assert parse("cleanup").verb == "cleanup" and parse("rpc", "job", "ping").params == "{}"


def test_a_bare_wait_does_not_swallow_the_job():
    """``save --wait JOB`` waits without end for JOB."""
    assert (parse("save", "--wait", "job").wait, parse("save", "--wait", "job").job) == (None, "job")
    assert parse("save", "job", "--wait=5").wait == 5.0 and not hasattr(parse("save"), "wait")


def test_ssh_may_stand_before_the_verb_and_behind_it():
    """Both say the same; where both are there, the one behind counts."""
    for words in (
        ["--ssh", "me@gpu7", "status", "job"],
        ["status", "job", "--ssh", "me@gpu7"],
        ["--ssh=me@gpu7", "list"],
    ):
        assert parse(*words).ssh == "me@gpu7"
    assert parse("--ssh", "one", "status", "--ssh", "two").ssh == "two"


@pytest.mark.parametrize(
    "words, said",
    [
        (["status", "--connect=tcp://h:1"], "--connect"),
        (["list", "--remote=h:1"], "--remote"),
        (["status", "--token-file=/dev/stdin"], "--token-file"),
        (["abort", "--kill-after=5"], "--kill-after"),
        (["cleanup"], "ssh -t gpu7"),
        (["cleanup", "--force", "--ssh", "gpu7"], "ssh -t gpu7"),
        (["dial-stdio"], "the other side"),
    ],
)
def test_what_does_not_go_with_ssh(words, said, capsys, tmp_path):
    """A usage error that names it, before anything is done."""
    (tmp_path / "token").write_text("secret\n")
    words = [word.replace("/dev/stdin", str(tmp_path / "token")) for word in words]
    with pytest.raises(SystemExit) as ended:
        parse("--ssh", "gpu7", *words)
    assert ended.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize("host", ["-oProxyCommand=touch x", "me@-v", "a b", "", "a;b", "$(x)"])
def test_a_host_that_is_none_is_a_usage_error(host, capsys):
    """It is refused before an ssh could read it as an option, or a shell as a command."""
    with pytest.raises(SystemExit) as ended:
        parse(f"--ssh={host}", "status")
    assert ended.value.code == 2 and "[USER@]HOST" in capsys.readouterr().err


def test_python_refuses_two_ways_as_well():
    """``connect(at=, ssh=)`` and ``connect(token=, ssh=)`` cannot both be meant."""
    for other in ({"at": "unix:/x"}, {"token": "x"}):
        with pytest.raises(InvalidParams):
            connect("job", ssh="gpu7", **other)


def test_the_end_of_an_ssh_is_documented_but_not_listed(capsys):
    """``dial-stdio --help`` tells all; the list of verbs is for persons."""
    with pytest.raises(SystemExit):
        parse("--help")
    assert "dial-stdio" not in capsys.readouterr().out
    with pytest.raises(SystemExit):
        parse("dial-stdio", "--help")
    assert "--ssh runs on the other side" in capsys.readouterr().out


def test_a_narrow_terminal_gets_its_help():
    """Forty columns, where the usage line has to be broken (argparse fails there on brackets in a name)."""
    source = """
    import os
    os.get_terminal_size = lambda *_: os.terminal_size((20, 20))
    from forgather_control.cli import parser as arguments
    from forgather_control.wire import builtin as commands
    for verb in [method.verb for method in commands.BUILTIN if method.verb] + ["cleanup", "rpc", "dial-stdio"]:
        try:
            arguments.parse([verb, "--help"], "forgather control")
        except SystemExit as err:
            assert err.code == 0
    print("helped", flush=True)
    """
    with Process(source) as process:
        while (line := process.line()) != "helped":
            assert process.popen.poll() is None or line, process.errors


def test_one_verb_is_parsed_as_among_all(capsys):
    """Only the verb that comes first is made ready; its help, and what is said of a wrong one, are the same."""
    for verb in parser._VERBS:
        alone, among = parser._parser("x", verb), parser._parser("x")
        assert alone.format_usage() == among.format_usage()
        for each in (alone, among):
            with pytest.raises(SystemExit):
                each.parse_args([verb, "--help"])
        told = capsys.readouterr().out
        assert told[: len(told) // 2] == told[len(told) // 2 :]
    with pytest.raises(SystemExit):
        parse("nosuch", "status")
    assert "save-stop" in capsys.readouterr().err
