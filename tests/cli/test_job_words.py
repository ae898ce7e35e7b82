"""Which words are JOB where a verb takes several, and which are settings, conditions and options."""

from __future__ import annotations

import pytest

from forgather_control.cli import job_words, parser
from forgather_control.wire.builtin import BUILTIN


def parse(*words: str):
    return parser.parse(words, "forgather-control")


@pytest.mark.parametrize("verb", sorted(job_words.SEVERAL))
def test_verbs_that_take_several(verb):
    """None, one, several, a pattern, all."""
    tail = {"set": ["a=1"], "when": ["loss > 1", "stop"]}.get(verb, [])
    for jobs, many in (([], False), (["run1"], False), (["run1", "run2"], True), (["run*"], True), (["12"], True)):
        args = parse(verb, *jobs, *tail)
        assert (args.jobs, args.is_many, args.job) == (jobs, many, jobs[0] if len(jobs) == 1 else None)
    args = parse(verb, *tail, "--all", *(["--parallel", "3"] if verb != "watch" else []))
    assert (args.jobs, args.is_many, args.all, getattr(args, "parallel", 3)) == ([], True, True, 3)


def test_verbs_that_take_one(capsys):
    """``cancel JOB ID``, ``run JOB NAME`` and the others are for one job."""
    verbs = {method.verb for method in BUILTIN.values() if method.verb} - job_words.SEVERAL - {"list"}
    for verb in verbs:
        words = ["id"] if verb == "cancel" else []
        assert parse(verb, "run*", *words).is_many is False
        with pytest.raises(SystemExit):
            parse(verb, "--all", *words)
    args = parse("run", "run1", "run2")
    assert (args.job, args.name, args.is_many) == ("run1", "run2", False)
    assert "--all" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "jobs", "changes"),
    [
        (["run*", "a=1", "b=x0.5"], ["run*"], {"a": 1, "b": "x0.5"}),
        (["run1", "run2", "a=1"], ["run1", "run2"], {"a": 1}),
        (["--all", "a=1"], [], {"a": 1}),
        (["run[!1]", "a=*"], ["run[!1]"], {"a": "*"}),
    ],
)
def test_jobs_and_settings(words, jobs, changes):
    """The first word with an equals sign ends the jobs."""
    args = parse("set", *words)
    assert (args.jobs, args.method, args.params) == (jobs, "change_settings", {"changes": changes})


@pytest.mark.parametrize(
    ("words", "jobs", "when"),
    [
        (["run*", "loss is nan", "abort"], ["run*"], "loss is nan"),
        (["run1", "run[!2]", "loss>2", "abort"], ["run1", "run[!2]"], "loss>2"),
        (["--all", "loss!=2", "abort"], [], "loss!=2"),
        (["run1", "run2", "step >= 5", "set", "a=1"], ["run1", "run2"], "step >= 5"),
        (["run?", "loss > 1", "run", "sample", "n=1"], ["run?"], "loss > 1"),
    ],
)
def test_jobs_and_conditions(words, jobs, when):
    """The first word that contains a space or a comparison is EXPR, and ends the jobs."""
    args = parse("when", *words)
    assert (args.jobs, args.is_many, args.method) == (jobs, True, "add_rule") and args.params["when"] == when
    assert args.command.verb in ("abort", "set", "run")


@pytest.mark.parametrize(
    ("words", "method"),
    [(["run1", "run2"], "list_rules"), (["run*", "--remove", "1"], "remove_rule"), (["--all"], "list_rules")],
)
def test_jobs_without_a_condition(words, method):
    """Their rules are listed, or one of each is removed."""
    args = parse("when", *words)
    assert (args.method, args.is_many, args.when) == (method, True, None)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["save", "--all", "run1"], "--all means all live jobs: it cannot be combined with 'run1'"),
        (["save", "run1", "run2", "--connect", "unix:/s"], "--connect is the address of one job"),
        (["status", "--all", "--connect", "tcp://h:1"], "--connect is the address of one job"),
        (["save", "--all", "--parallel", "0"], "'0' is not a number of jobs from 1 to 1000"),
        (["save", "--all", "--parallel", "many"], "'many' is not a number of jobs"),
        (["save", "--all", "--parallel", "9" * 5000], "is not a number of jobs"),
        (["save", "--all", "--paralel=2"], "did you mean --parallel?"),
        (["when", "run*", "loss > 1", "stop", "run1"], "unrecognized arguments: 'run1'"),
        (["when", "loss > 1", "stop", "run*", "run1"], "unrecognized arguments: 'run* run1'"),
        (["set", "run*", "a=1", "run1"], "a setting is NAME=VALUE, not 'run1'"),
        (["abort", "--all", "--kill-after", "3", "--wait"], "--kill-after waits by itself"),
    ],
)
def test_wrong_words(words, said, capsys):
    """A usage error that names the word."""
    with pytest.raises(SystemExit) as ended:
        parse(*words)
    assert ended.value.code == 2 and said in capsys.readouterr().err


def test_a_number_may_be_an_array_only_here():
    """Over ssh and with an address the name is looked up elsewhere."""
    assert parse("save", "12").is_many
    assert not parse("save", "12", "--ssh", "gpu7").is_many
    assert not parse("save", "12", "--connect", "unix:/s").is_many


def test_verbs_that_end_jobs_ask():
    """They have --force, and no other command has."""
    for verb in job_words.SEVERAL - {"set", "when"}:
        if verb in job_words.ENDING:
            assert parse(verb, "run*", "--force").force
        else:
            with pytest.raises(SystemExit):
                parse(verb, "run*", "--force")
