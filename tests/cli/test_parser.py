"""The words of the command line: where they may stand, and which do not go together."""

from __future__ import annotations

import pytest

from forgather_control.cli import parser, verbs
from forgather_control.client.api import connect
from forgather_control.errors import InvalidParams
from forgather_control.version import VERSION
from forgather_control.wire.builtin import BUILTIN

from ..support.harness import Process


def parse(*words: str):
    return parser.parse(words, "forgather control")


def test_every_verb_of_the_table_is_there():
    """Each with its method, and those that the table does not know beside them."""
    for method in BUILTIN.values():
        if method.verb is not None:
            special = {"set": ["a=1"], "when": ["step > 1", "stop"]}
            words = special.get(method.verb) or [param.name for param in method.params if param.required]
            args = parse(method.verb, *words)
            assert (args.verb, args.method, args.json, args.ssh) == (method.verb, method.name, False, None)
    assert parse("cleanup").verb == "cleanup" and parse("rpc", "job", "ping").json_params == "{}"


def test_wait_is_a_flag_and_swallows_no_job():
    """``save --wait JOB`` waits without end for JOB, and so does ``--wait 30`` for the job named 30."""
    for words in (["save", "--wait", "job"], ["save", "job", "--wait"], ["--wait", "save", "job"]):
        args = parse(*words)
        assert (args.job, args.params) == ("job", {"wait": "finished"})
    assert parse("save", "--wait", "30").job == "30"
    assert parse("save", "job").params == {}


def test_a_time_out_implies_waiting(capsys):
    """``--timeout`` alone waits until finished or for so many seconds; a value for ``--wait`` is refused, naming it."""
    for words in (["--timeout=5"], ["--timeout", "5"], ["--wait", "--timeout=5"]):
        assert parse("save", "job", *words).params == {"wait": "finished", "timeout": 5.0}
    with pytest.raises(SystemExit):
        parse("save", "--wait=5")
    assert "--timeout SECONDS" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ("--json", "--connect", "unix:/s", "save", "job", "--reason", "a b"),
        ("save", "--reason", "a b", "--connect", "unix:/s", "job", "--json"),
        ("--reason=a b", "save", "job", "--connect=unix:/s", "--json"),
        ("--connect", "unix:/s", "--reason", "a b", "--json", "save", "--", "job"),
    ],
)
def test_options_stand_anywhere(words):
    """Before the verb, behind it, behind the job; with their values behind them or after an equals sign."""
    args = parse(*words)
    assert (args.verb, args.job, args.json, args.connect) == ("save", "job", True, "unix:/s")
    assert args.params == {"reason": "a b"}


def test_words_between_options_keep_their_order():
    """``rpc JOB --json METHOD PARAMS``: options may stand between words, and a double dash ends them."""
    args = parse("rpc", "job", "--json", "status", "--connect", "unix:/s", '{"a":1}')
    assert (args.job, args.method, args.json_params) == ("job", "status", '{"a":1}')
    assert parse("cancel", "job", "--", "-id").params == {"command_id": "-id"}
    assert (parse("cancel", "id").job, parse("cancel", "id").params) == (None, {"command_id": "id"})


def test_the_version(capsys):
    """``--version`` needs no verb, and does nothing beside one."""
    for words in (["--version"], ["--version", "stop", "job"], ["stop", "job", "--version"]):
        with pytest.raises(SystemExit) as ended:
            parse(*words)
        assert ended.value.code == 0 and VERSION in capsys.readouterr().out


@pytest.mark.parametrize(
    "verb, said",
    [("statsu", "did you mean status?"), ("save-stpo", "did you mean save-stop?"), ("zzz", "choose from"),
     ("x\x1b[2J" + "y" * 999, "choose from"), ("dial-stdi", "choose from")],
)  # fmt: skip
def test_a_mistyped_verb_gets_a_suggestion(verb, said, capsys):
    """Exit code 2 and a similar verb, else all that are for persons; nothing of it reaches the terminal raw."""
    for words in ([verb, "job"], ["help", verb], [verb, "--help"]):
        with pytest.raises(SystemExit) as ended:
            parse(*words)
        shown = capsys.readouterr().err
        assert ended.value.code == 2 and said in shown and "\x1b" not in shown and len(shown) < 800
        assert "dial-stdio" not in shown


def test_help_with_a_verb(capsys):
    """``help VERB`` prints what ``VERB --help`` does, and ``help`` what ``--help`` does."""
    for words, other in ((["help"], ["--help"]), (["help", "save"], ["save", "--help"])):
        shown = []
        for each in (words, other):
            with pytest.raises(SystemExit) as ended:
                parse(*each)
            shown.append((ended.value.code, capsys.readouterr()))
        assert shown[0] == shown[1] and shown[0][0] == 0 and shown[0][1].out


@pytest.mark.parametrize(
    "words, said",
    [
        (["save", "--wiat"], "--wiat; did you mean --wait?"),
        (["--timeot=5", "save"], "--timeot=5; did you mean --timeout?"),
        (["stop", "--kill-after", "5"], "--kill-after; forgather control stop --help shows all"),
        (["profile", "one", "two"], "two; forgather control profile --help shows all"),
        (["set", "--wiat", "a=1"], "--wiat; did you mean --wait?"),
        (["--verison"], "--verison; did you mean --version?"),
        (["--timeot=5"], "--timeot=5; did you mean --timeout?"),
    ],
)
def test_a_mistyped_option_gets_a_suggestion(words, said, capsys):
    """One of the verb's own, else where they are listed."""
    with pytest.raises(SystemExit) as ended:
        parse(*words)
    assert ended.value.code == 2 and f"unrecognized arguments: {said}\n" in capsys.readouterr().err


def test_options_are_not_abbreviated(capsys):
    """``--js`` is no ``--json``: what a later version adds would change its meaning."""
    with pytest.raises(SystemExit):
        parse("status", "--js")
    assert "unrecognized arguments: --js" in capsys.readouterr().err


def test_ssh_may_stand_before_the_verb_and_behind_it():
    """Both say the same; where both are there, the last one counts."""
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
    import contextlib, io, os
    os.get_terminal_size = lambda *_: os.terminal_size((20, 20))
    from forgather_control.cli import parser as arguments
    from forgather_control.wire import builtin as commands
    for verb in [method.verb for method in commands.BUILTIN.values() if method.verb] + ["cleanup", "rpc", "dial-stdio"]:
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                arguments.parse([verb, "--help"], "forgather control")
        except SystemExit as err:
            assert err.code == 0
    print("helped", flush=True)
    """
    with Process(source) as process:
        assert process.line() == "helped", process.errors


def test_every_verb_has_its_help(capsys):
    """It names the exit codes and says what JOB is; a percent sign in a method's text does no harm."""
    for verb in verbs.texts():
        with pytest.raises(SystemExit) as ended:
            parse(verb, "--help")
        told = capsys.readouterr().out
        assert ended.value.code == 0 and f"forgather control {verb}" in told
        assert "exit codes: 0 done" in told and "exact id of a job" in told


def test_the_list_of_verbs(capsys):
    """``--help`` shows each verb with its sentence; so does a missing verb name the usage."""
    with pytest.raises(SystemExit) as ended:
        parse("--help")
    told = capsys.readouterr().out
    listed = verbs.texts().keys() - {"dial-stdio"}
    assert ended.value.code == 0 and all(f"\n    {verb}" in told for verb in listed)
    with pytest.raises(SystemExit) as ended:
        parse()
    assert ended.value.code == 2 and "a verb is missing" in (shown := capsys.readouterr().err)
    assert "save-stop" in shown  # the verbs to choose from


@pytest.mark.parametrize(
    ("words", "changes"),
    [
        (["a=1"], {"a": 1}),
        (["a=1e-4", "b=x0.5"], {"a": 1e-4, "b": "x0.5"}),
        (["a=true", "b=no"], {"a": True, "b": False}),
        (['a="5"', "b=", "c=x=y"], {"a": "5", "b": "", "c": "x=y"}),
    ],
)
def test_the_words_of_set(words, changes):
    """With JOB and without; numbers and booleans are what they look like."""
    for job in ([], ["job"]):
        args = parse("set", *job, *words)
        assert (args.job, args.method, args.params) == ((job or [None])[0], "change_settings", {"changes": changes})


def test_set_without_a_value_lists():
    """As a query, which cannot be waited for."""
    args = parse("set", "job")
    assert (args.job, args.method, args.params) == ("job", "list_settings", {})


@pytest.mark.parametrize("words", [["job", "=1"], ["a=1", "a=2"], ["job", "--wait"], ["a=1", "job"]])
def test_wrong_words_of_set(words, capsys):
    """One line says which word."""
    with pytest.raises(SystemExit):
        parse("set", *words)
    assert "NAME=VALUE" in capsys.readouterr().err


def test_pause_for():
    """The option of the contract."""
    assert parse("pause", "--for", "30").params == {"seconds": 30.0}


@pytest.mark.parametrize(
    ("words", "job", "params"),
    [
        (["run1", "loss > 2", "save-stop"], "run1", {"when": "loss > 2", "do": "save_and_stop", "params": {}}),
        (["loss>2 for 3", "abort", "--reason", "no"], None,
         {"when": "loss>2 for 3", "do": "abort", "params": {"reason": "no"}}),
        (["--not-before", "5", "run1", "loss is nan", "save", "--evaluate", "yes"], "run1",
         {"when": "loss is nan", "not_before": 5, "do": "save_checkpoint", "params": {"evaluate": True}}),
        (["run1", "step >= 5", "set", "a=x0.1", "b=2"], "run1",
         {"when": "step >= 5", "do": "change_settings", "params": {"changes": {"a": "x0.1", "b": 2}}}),
        (["step >= 5", "set", "a=1"], None,
         {"when": "step >= 5", "do": "change_settings", "params": {"changes": {"a": 1}}}),
        (["run1", "step >= 5", "pause", "--for", "60"], "run1",
         {"when": "step >= 5", "do": "pause", "params": {"seconds": 60.0}}),
    ],
)  # fmt: skip
def test_the_words_of_when(words, job, params):
    """JOB may be left out; the command has its own words and options."""
    args = parse("when", *words)
    assert (args.job, args.method, args.params) == (job, "add_rule", params)


@pytest.mark.parametrize(
    ("words", "method", "params"),
    [([], "list_rules", {}), (["run1"], "list_rules", {}), (["run1", "--remove", "3"], "remove_rule", {"id": 3})],
)
def test_when_lists_and_removes(words, method, params):
    """Without EXPR."""
    args = parse("when", *words)
    assert (args.method, args.params) == (method, params)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["run1", "loss >", "stop"], "needs a number, at the end"),
        (["run1", "loss > 1"], "after EXPR comes what to do: save, stop"),
        (["run1", "loss > 1", "status"], "after EXPR comes what to do"),
        (["run1", "loss > 1", "save-stpo"], "did you mean save-stop?"),
        (["run1", "loss > 1", "save", "--wait"], "it cannot wait"),
        (["run1", "loss > 1", "abort", "--kill-after", "3"], "it cannot wait"),
        (["run1", "loss > 1", "stop", "--remove", "3"], "--remove stands without EXPR"),
        (["run1", "--not-before", "3"], "the EXPR of the rule is missing"),
        (["run1", "--remove", "x"], "is not the number of a rule"),
        (["run1", "loss > 1", "save", "--evaluate", "perhaps"], "perhaps"),
        (["run1", "loss > 1", "stop", "now"], "now"),
        (["run1", "loss > 1", "set"], "set needs NAME=VALUE in a rule"),
        (["run1", "loss > 1", "set", "rate"], "a setting is NAME=VALUE"),
        (["run1", "loss > 1", "run"], "run needs the NAME of a command"),
        (["run1", "loss > 1", "run", "sample", "n"], "a parameter is KEY=VALUE"),
        (["run1", "loss > 1", "set", "--timeout", "3", "a=1"], "it cannot wait"),
        (["run1", "loss >> 1", "stop"], "not '>' (character 7)"),
        (["run1", "loss", "is", "nan", "stop"], "EXPR is one word in quotes, behind JOB"),
        (["run1", "loss", "2", "abort"], "EXPR is one word in quotes, behind JOB"),
    ],
)
def test_wrong_words_of_when(words, text, capsys):
    """One line says what is wrong."""
    with pytest.raises(SystemExit):
        parse("when", *words)
    assert text in capsys.readouterr().err
