"""The verb ``run``: what it lists, how words become values, and what it prints."""

from __future__ import annotations

import json
import threading
from typing import Literal

import pytest

from forgather_control.cli import parser, run
from forgather_control.cli.main import main
from forgather_control.cli.terminal import Refusal
from forgather_control.errors import InternalError, MethodNotFound
from forgather_control.training.own_commands import parse
from forgather_control.wire import discovery
from forgather_control.wire.builtin import BUILTIN
from forgather_control.wire.methods import MethodTable

from ..support.harness import SOON, running_loop


def sample(
    prompt: str,
    n: int = 1,
    rate: float = 1,
    on: bool = False,
    tags: list[str] = (),
    sizes: list[int] = (),
    mode: Literal["a", 1, True] = "a",
    seed: int | None = None,
    note: str | None = None,
):
    """Sample \x1b[2J text.

    Args:
        n: how many texts.
    """
    return {name: value for name, value in locals().items() if value not in (None, [])}


def methods(*functions):
    """The script's commands, as the client finds them in what the job sent."""
    table = MethodTable(BUILTIN)
    for function in functions:
        table.add(parse(function).method(dict, lambda: True))
    return run.own(json.loads(json.dumps(discovery.document(table))))


# Words...


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], {}),
        (["prompt=a=b c"], {"prompt": "a=b c"}),
        (["prompt=5", "n=5", "rate=5"], {"prompt": "5", "n": 5, "rate": 5.0}),
        (["prompt=", "n=-3", "rate=1e-4"], {"prompt": "", "n": -3, "rate": 1e-4}),
        (["prompt=null", "seed=null", "note=null"], {"prompt": "null", "seed": None, "note": "null"}),
        (["n=2.0", "seed=1e3"], {"n": 2, "seed": 1000}),
        (["on=yes"], {"on": True}),
        (["on=False"], {"on": False}),
        (["tags=a,b", "sizes=1,2"], {"tags": ["a", "b"], "sizes": [1, 2]}),
        (["tags=a", "tags=b,c"], {"tags": ["a", "b", "c"]}),
        (['tags=["a,b", "c"]', "sizes=[1, 2.0]"], {"tags": ["a,b", "c"], "sizes": [1, 2]}),
        (["tags=", "sizes=[]"], {"tags": [], "sizes": []}),
        (["mode=a"], {"mode": "a"}),
        (["mode=1"], {"mode": 1}),
        (["mode=true"], {"mode": True}),
    ],
    ids=str,
)
def test_words_become_values(words, expected):
    """By the schemas of the job; text stays text, whatever it looks like."""
    found = run.values(methods(sample)["sample"], words)
    assert found == expected and list(map(type, found.values())) == list(map(type, expected.values()))


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["n=x"], "n must be a whole number, not 'x'"),
        (["n=1.5"], "n must be a whole number"),
        (["n="], "n must be a whole number"),
        (["n=null"], "n must be a whole number"),
        (["n=" + "9" * 5000], "n must be a whole number"),
        (["rate=nan"], "rate must be a number"),
        (["on=maybe"], "on must be true or false"),
        (["mode=b"], 'mode must be "a" or 1 or true'),
        (["sizes=1,x"], "sizes must be a whole number"),
        (['sizes=["x"]'], "sizes must be a whole number"),
        (["tags=[a"], "tags must be words between commas, or a JSON array"),
        (["n=1", "n=2"], "n is given twice"),
        (["prmpt=x"], "no parameter 'prmpt'; did you mean prompt"),
        (["xyzzy\x1b=x"], "it takes prompt, n, rate"),
        (["wait=applied"], "wait is no parameter of the command; the options are --wait"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_wrong_words(words, why):
    """The refusal names the parameter, and nothing is sent."""
    with pytest.raises(Refusal, match=why) as caught:
        run.values(methods(sample)["sample"], words)
    assert caught.value.args[1] == 2 and len(caught.value.args[0]) < 300 and caught.value.args[0].isprintable()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], (None, None, [])),
        (["job"], ("job", None, [])),
        (["job", "sample"], ("job", "sample", [])),
        (["job", "sample", "a=b", "c=d=e"], ("job", "sample", ["a=b", "c=d=e"])),
        (["sample", "a=b", "c=d"], (None, "sample", ["a=b", "c=d"])),
        (["sample", "a=--b", "--json"], (None, "sample", ["a=--b"])),
    ],
)
def test_the_words_of_the_verb(words, expected):
    """JOB may be left out in front of a name with parameters."""
    args = parser.parse(["run", *words], "")
    assert (args.job, args.name, args.values) == expected


@pytest.mark.parametrize(
    "words",
    [["a=b"], ["a=b", "c=d"], ["job", "sample", "x"], ["job", "s", "a=b", "x"], ["--no-wait", "--timeout", "3"]],
)
def test_words_that_do_not_fit(words):
    """A usage error."""
    with pytest.raises(SystemExit) as caught:
        parser.parse(["run", *words], "")
    assert caught.value.code == 2


@pytest.mark.parametrize(
    "document",
    [
        *(None, [], {}, {"methods": None}, {"methods": [None]}, {"methods": [{"name": 5}]}),
        {"methods": [{"name": "user.x"}]},
        {"methods": [{"name": "user.x", "params": [{"name": "a"}]}]},
        {"methods": [{"name": "user.x", "params": [{"name": "a", "schema": 5}]}]},
        {"methods": [{"name": "user.x", "params": [{"name": "a", "schema": {"type": "spam"}}]}]},
    ],
    ids=str,
)
def test_a_document_that_is_none(document):
    """Another program, or a job of another version."""
    with pytest.raises(InternalError):
        run.own(document)


def test_an_unknown_name():
    """The error lists what there is, with the nearest name; and how to have any."""
    known = methods(sample, test_an_unknown_name)
    assert run.find(known, "user.sample", "job") is run.find(known, "sample", "job")
    with pytest.raises(MethodNotFound, match="only sample, test_an_unknown_name; did you mean sample"):
        run.find(known, "smaple", "job")
    with pytest.raises(MethodNotFound, match="job has no commands of its own; its script registers"):
        run.find({}, "sample", "job")


# What it prints...


def test_the_list():
    """Name, summary and parameters with types, defaults and help; nothing reaches the terminal raw."""
    text = run.listing(methods(sample), "job")
    assert text.isascii() and "\x1b" not in text
    assert text.splitlines()[:4] == [
        "sample",
        "  Sample \\x1b[2J text.",
        "  prompt  a string",
        "  n       a whole number, 1 unless given: how many texts.",
    ]
    assert "no commands of its own" in run.listing({}, "job\x1b")


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("a\nb\x1b", "a\nb\\x1b"),
        (["a", "b\nc"], "a\nb\nc"),
        (["a", 1], '["a", 1]'),
        ([], "[]"),
        ({"ä": [1, None]}, '{"ä": [1, null]}'),
        (True, "true"),
        (0, "0"),
        ("", ""),
        (None, "job: user.f finished at step 5"),
    ],
)
def test_values_are_printed_for_people_and_scripts(value, shown):
    """Text as it is, but harmless; a list of texts by line; the rest as JSON."""
    record = {"command": "user.f", "state": "finished", "applied_at_step": 5, "result": {"value": value}}
    assert run.outcome("job", record) == shown


def test_run_waits_and_prints_the_value(capsys):
    """In a real job: the list, the value, JSON, a failure, a wrong word, an unknown name, a wait that is over."""
    go = threading.Event()

    def hang():
        go.wait(SOON)

    def fail(why: str):
        raise ValueError(why)

    with running_loop(commands=[sample, hang, fail]):
        assert main(["run"]) == 0 and capsys.readouterr().out.startswith("sample\n")
        assert main(["run", "sample", "prompt=x", "n=2"]) == 0
        assert json.loads(capsys.readouterr().out) == {"prompt": "x", "n": 2, "rate": 1.0, "on": False, "mode": "a"}
        assert main(["run", "job", "sample", "prompt=x", "--json", "--reason", "why", "--wait"]) == 0
        record = json.loads(capsys.readouterr().out)
        assert record["reason"] == "why" and record["result"]["value"]["prompt"] == "x"
        assert main(["run", "job", "fail", "why=no", "--timeout", "20"]) == 1
        assert capsys.readouterr().err == "job: user.fail failed: ValueError: no\n"
        assert main(["run", "job", "fail", "why=no", "--json"]) == 1
        assert json.loads(capsys.readouterr().out)["state"] == "failed"
        for words, code in ((["sample"], 1), (["sample", "n=x"], 2), (["smaple"], 1)):
            assert main(["run", "job", *words]) == code
        assert "did you mean sample" in capsys.readouterr().err
        try:
            assert main(["run", "job", "hang", "--no-wait"]) == 0
            assert capsys.readouterr().out == "job: user.hang accepted\n"
            assert main(["run", "job", "hang", "--timeout", "0.01"]) == 5
        finally:
            go.set()
        assert main(["run", "job", "hang", "--json"]) == 0
        capsys.readouterr()
        assert main(["run", "job", "--json"]) == 0
        assert [method["name"] for method in json.loads(capsys.readouterr().out)] == [
            *("user.sample", "user.hang", "user.fail")
        ]


def test_a_job_without_commands(capsys):
    """That is no error of the list, and one of a name."""
    with running_loop():
        assert main(["run", "job"]) == 0 and "job has no commands of its own" in capsys.readouterr().out
        assert main(["run", "job", "sample"]) == 1 and "no commands of its own" in capsys.readouterr().err
