"""Functions of the training script as commands: their parameters, what is refused, and how they run."""

from __future__ import annotations

import functools
import json
import sys
import threading
import typing
from concurrent.futures import Future
from typing import Any, Literal, Optional

import jsonschema
import pytest

from forgather_control import InvalidParams, TrainingJob
from forgather_control.errors import CommandFailed
from forgather_control.training import own_commands
from forgather_control.training.own_commands import Context, parse, parse_all
from forgather_control.wire.methods import COMMON

Style = Literal["plain", "code"]


def sample(context, prompt: str, n: int = 1, temperature: float = 1, stop: list[str] = (), style: Style = "plain"):
    """Sample text from the model.

    It is printed nowhere.

    Args:
        prompt: what the text begins with
        n (int): how many texts.
    """
    return [context.step, prompt, n, temperature, stop, style]


def method(function, name=None, objects=None, is_main=True):
    """The row of the method table that a function becomes."""
    return parse(function, name).method(lambda: Context(objects or {"step": 7}), lambda: is_main)


def run(function, given=None, **options):
    """What a function returns for these parameters of a client."""
    row = method(function, **options)
    return row.run(object(), **row.own_params(row.bind(given or {})))


def schema(function):
    """The schema of a function's only parameter."""
    (param,) = parse(function).params
    return {name: value for name, value in param.schema.items() if name != "default"}


# The signature...


def test_a_function_becomes_a_method():
    """Name, help, parameters in order, defaults and their help come from the function; the context is no parameter."""
    row = method(sample)
    assert row.name == "user.sample" and row.summary == "Sample text from the model." and "nowhere" in row.doc
    assert row.params[: len(COMMON)] == COMMON and row.is_command and row.finishes_when == {"applied"}
    own = {param.name: (param.schema, param.doc) for param in row.params[len(COMMON) :]}
    assert own == {
        "prompt": ({"type": "string"}, "what the text begins with"),
        "n": ({"type": "integer", "default": 1}, "how many texts."),
        "temperature": ({"type": "number", "default": 1.0}, ""),
        "stop": ({"type": "array", "items": {"type": "string"}, "default": []}, ""),
        "style": ({"type": "string", "enum": ["plain", "code"], "default": "plain"}, ""),
    }
    for facts, _ in own.values():
        jsonschema.Draft7Validator.check_schema(facts)
    json.dumps(row.describe())


def test_a_function_runs_with_checked_values():
    """A whole number becomes a float where the function wants one; what is left out has its default."""
    given = {"prompt": "x", "temperature": 2, "stop": ["a"]}
    assert run(sample, given) == [7, "x", 1, 2.0, ["a"], "plain"]
    assert type(run(sample, given)[3]) is float and run(sample, ["accepted", None, None, None, None, "y", 3.0])[2] == 3


@pytest.mark.parametrize(
    ("kind", "expected", "fits", "fails"),
    [
        (int, {"type": "integer"}, [1, -5, 2.0], [True, "1", 1.5, None]),
        (float, {"type": "number"}, [1, 1.5], [True, "1", None, float("nan")]),
        (str, {"type": "string"}, ["", "x"], [1, None]),
        (bool, {"type": "boolean"}, [True, False], [0, 1, "true"]),
        (list[int], {"type": "array", "items": {"type": "integer"}}, [[], [1, 2.0]], [1, [1.5], [None], [[1]]]),
        (typing.List[bool], {"type": "array", "items": {"type": "boolean"}}, [[True]], [[1]]),  # noqa: UP006
        (Literal["a", 1], {"type": ["string", "integer"], "enum": ["a", 1]}, ["a", 1], ["b", True, 2]),
        (Literal[True, 1], {"type": ["boolean", "integer"], "enum": [True, 1]}, [True, 1], [False, 0]),
        (list[Style], {"type": "array", "items": {"type": "string", "enum": ["plain", "code"]}}, [["code"]], ["code"]),
        (Optional[int], {"type": ["integer", "null"]}, [None, 1], ["1"]),  # noqa: UP045
        (str | None, {"type": ["string", "null"]}, [None, ""], [1]),
        (None | Style, {"type": ["string", "null"], "enum": ["plain", "code", None]}, [None, "code"], ["x"]),
        (typing.Annotated[int, "documented"], {"type": "integer"}, [1], ["1"]),
    ],
    ids=str,
)
def test_types(kind, expected, fits, fails):
    """Each type has a schema, and takes what fits it and nothing else."""

    def f(value): ...

    f.__annotations__["value"] = kind
    assert schema(f) == expected
    f.__defaults__ = None
    row = method(f)
    for value in fits:
        assert row.bind({"value": value})["value"] == value
    for value in fails:
        with pytest.raises(InvalidParams, match="value must be"):
            row.bind({"value": value})


@pytest.mark.parametrize(
    "kind",
    [
        *(list, dict, tuple, set, object, Any, None, bytes, complex, dict[str, int], tuple[int, ...], list[list[int]]),
        *(list[Any], int | str, int | str | None, Literal[1.5], Literal[b"x"], typing.Callable, "Nowhere", "1 +", 5),
        *(list[int, str], type("Own", (int,), {}), TrainingJob, typing.TypeVar("T"), Literal[None], list[None]),
    ],
    ids=str,
)
def test_types_that_no_command_can_have(kind):
    """The error names the parameter and the types that there are."""

    def f(value): ...

    f.__annotations__["value"] = kind
    with pytest.raises(InvalidParams) as caught:
        parse(f)
    assert "value" in str(caught.value) and caught.value.data == {"parameter": "value"}
    assert "type" in str(caught.value) and len(str(caught.value)) < 400


def refused():
    """Functions that cannot be commands, each with a part of the reason."""

    def arguments(*args: int): ...
    def keywords(**options: int): ...
    def positional(a: int, /): ...
    def untyped(a, b: int): ...
    def behind(a: int, context): ...
    def context_last(context, /): ...
    def wrong_default(a: int = "x"): ...  # type: ignore[assignment]
    def none_default(a: int = None): ...  # type: ignore[assignment]  # noqa: RUF013
    def bool_default(a: int = True): ...
    def infinite(a: float = float("inf")): ...
    def object_default(a: str = object()): ...  # type: ignore[assignment]
    def many(context, *context_s: int): ...
    async def asynchronous(): ...
    def generator():
        yield 1

    async def both():
        yield 1

    yield from (
        (arguments, r"\*args: 'int' takes any arguments"),
        (keywords, "takes any arguments"),
        (positional, "a is positional-only"),
        (untyped, "a has no type; write a: int"),
        (behind, "context must be the first"),
        (context_last, "context is positional-only"),
        (wrong_default, "default of a must be a whole number, not 'x'"),
        (none_default, "default of a must be a whole number, not None"),
        (bool_default, "default of a must be a whole number, not True"),
        (infinite, "default of a must be a finite number"),
        (object_default, "default of a must be a string"),
        (many, "takes any arguments"),
        (asynchronous, "async or a generator"),
        (generator, "async or a generator"),
        (both, "async or a generator"),
        (lambda: 1, "a lambda has none"),
        (functools.partial(sample, n=2), "needs a name"),
        (dict, "must be a function"),
        (5, "must be a function, not 5"),
        ("sample", "must be a function"),
        (None, "must be a function"),
        (max, "has no signature|takes any arguments"),
    )
    for name in ("wait", "timeout", "command_id", "expires_at", "reason"):
        space: dict[str, Any] = {}
        exec(f"def f({name}: int): ...", space)
        yield space["f"], f"{name} is a parameter of every command"


@pytest.mark.parametrize(("function", "why"), list(refused()), ids=lambda value: getattr(value, "__name__", "-"))
def test_what_cannot_be_a_command(function, why):
    """It is refused where it is registered, and the error says what to change."""
    with pytest.raises(InvalidParams, match=why):
        parse(function)


@pytest.mark.parametrize("name", ["", "a b", "a.b", "ä", "x" * 65, "a\n", 5, "\x1b[2J", "../x"])
def test_names(name):
    """A name is typed on a command line and becomes a file's, so it has few characters."""
    with pytest.raises(InvalidParams, match="needs a name"):
        parse(sample, name)
    assert parse(sample, "sample-2").name == "user.sample-2"


def test_a_parameter_may_have_any_other_name():
    """Names that the code behind uses for its own arguments."""

    def f(loop: int, self: int, params: int, name: int, method: int, function: int, given: int): ...

    names = ("loop", "self", "params", "name", "method", "function", "given")
    assert run(f, dict.fromkeys(names, 1)) is None


def test_functions_in_other_clothes():
    """A method, a partial object with a name, decorated functions and objects that can be called."""

    class Sampler:
        calls = 0

        def sample(self, n: int = 1):
            self.calls += n
            return self.calls

        def __call__(self, n: int):
            return -n

    @functools.wraps(sample)
    def wrapped(*args, **options):
        return sample(*args, **options)

    one = Sampler()
    assert run(one.sample, {"n": 2}) == 2 == one.calls
    assert run(one, {"n": 2}, name="object") == -2
    assert run(functools.partial(sample, n=5), {"prompt": "x"}, name="some")[2] == 5
    assert run(wrapped, {"prompt": "x"})[1] == "x" and parse(wrapped).doc.startswith("Sample text")


def test_several_functions():
    """They come as a list, each once."""
    assert [each.name for each in parse_all([sample])] == ["user.sample"] and parse_all(()) == []
    with pytest.raises(InvalidParams, match="registered twice"):
        parse_all([sample, sample])
    for wrong in (sample, "sample", {sample}, iter([sample]), None, 5):
        with pytest.raises(InvalidParams, match="must be a list of functions"):
            parse_all(wrong)


# Running...


def test_the_context_has_what_the_trainer_has():
    """An object that is missing is an error that names the others."""

    def f(context):
        return context.optimizer

    assert run(f, objects={"step": 7, "optimizer": 5}) == 5
    with pytest.raises(AttributeError, match="this run has no optimizer to offer; it has model, step"):
        run(f, objects={"step": 7, "model": 5})


def test_a_function_that_changes_its_arguments():
    """Neither the defaults nor the command's record change with them."""

    def f(words: list[str] = ()):
        words.append("x")
        return words

    row, given = method(f), {"words": ["a"]}
    assert row.run(object(), **given) == ["a", "x"] and given == {"words": ["a"]}
    for _ in range(2):
        assert row.run(object(), **row.own_params(row.bind({}))) == ["x"]


def test_only_rank_0_returns_its_value():
    """The others run the function, and send nothing."""
    calls = []
    assert run(lambda: calls.append(1) or 5, name="f", is_main=False) is None and calls == [1]


def test_an_exit_is_a_failure():
    """It ends no training; see ``test_script`` for others."""
    with pytest.raises(CommandFailed, match=r"user.f called sys.exit\(3\); training continues"):
        run(lambda: sys.exit(3), name="f")


def test_a_future_is_no_value():
    """Neither one of threads nor a coroutine: the function has to wait for it."""

    async def later(): ...

    def coroutine():
        found.append(later())
        return found[0]

    found = []
    for f in (Future, coroutine):
        with pytest.raises(CommandFailed, match="returned a value that is not JSON"):
            run(f if f is coroutine else lambda: Future(), name="f")
    found[0].close()


def test_a_loop_registers_its_functions(jobs_dir, caplog):
    """Outside the with statement for all runs, inside it for that run; nothing after the first step, and no error."""
    job = TrainingJob("job", commands=[sample])

    @job.command
    def outside(): ...

    for again in range(2):
        with job:

            @job.command(name="inside-2")
            def inside(): ...

            assert callable(inside) and callable(outside)
            assert [name for name in job._run.methods if name.startswith("user.")] == [
                *("user.sample", "user.outside", "user.inside-2")
            ]
            for twice in (outside, sample):
                with pytest.raises(InvalidParams, match="registered twice"):
                    job.command(twice)
            with pytest.raises(InvalidParams):
                job.command(lambda x: 1)
            job.step(1)
            caplog.clear()
            assert [job.command(each) for each in (inside, 5)] == [inside, 5], again
            assert caplog.text.count("commands are fixed at the first step") == 2
    with pytest.raises(InvalidParams, match="registered twice"):
        job.command(outside)


def test_wrong_functions_are_refused_by_the_constructor():
    """As every other wrong option."""
    with pytest.raises(InvalidParams, match="async"):

        async def f(): ...

        TrainingJob(commands=[f])
    with pytest.raises(InvalidParams):
        TrainingJob(commands=sample)


def test_control_that_is_off_takes_functions_all_the_same():
    """Checked as otherwise, and called by no client."""
    with TrainingJob("job", enabled=False) as job:
        assert job.command(sample) is sample
        with pytest.raises(InvalidParams):
            job.command(print)
        job.step(1)


def test_a_job_with_commands_is_collected(jobs_dir):
    """The server keeps the methods; they must not keep the job, whose end by garbage collection ends control."""
    import gc
    import weakref

    job = TrainingJob("job", commands=[sample])
    job.__enter__()
    ended, known = job._run.ended, weakref.ref(job)
    del job
    gc.collect()
    assert known() is None
    assert ended.wait(20)
    assert threading.active_count() >= 1


def test_a_module_knows_all_types():
    """Each type of a parameter that JSON has is in the table."""
    assert set(own_commands._SCALARS) == {int, float, str, bool, type(None)}
