"""README.md and docs/ are true: their blocks run, their tables are those of the code, their links lead somewhere.

The HTML comment before a code block says what runs it: ``test: KIND`` or ``not run: REASON``. Shell lines run against
a job that trains with the README's own loop.
"""

from __future__ import annotations

import ast
import configparser
import dataclasses
import io
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

import forgather_control
from forgather_control import errors, states
from forgather_control.cli import exit_codes, parser
from forgather_control.jobs.record import JobRecord
from forgather_control.mcp import limits, tools
from forgather_control.mcp.allowed import ACTING, Allowed
from forgather_control.training.options import ControlOptions
from forgather_control.wire import conditions, discovery, methods
from forgather_control.wire.builtin import BUILTIN

from ..support.harness import (
    ROOT,
    SOON,
    Process,
    needs,
    needs_lightning,
    needs_torch,
    needs_transformers,
    strict,
    until,
)

PAGES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in (ROOT / "docs").glob("*.md")}
PAGES["README.md"] = (ROOT / "README.md").read_text()


class Block(NamedTuple):
    """A code block, and the comment before it."""

    page: str
    line: int
    mark: str
    language: str
    text: str

    @property
    def kind(self) -> str:
        """What the mark says first: ``shell``, ``python``, ...; empty for a block that is not run."""
        return self.mark.removeprefix("test: ").partition(",")[0] if self.mark.startswith("test: ") else ""


def blocks() -> Iterator[Block]:
    for page, text in sorted(PAGES.items()):
        for found in re.finditer(r"(?:^<!-- (.*?) -->\n)?^```(\w*)\n(.*?)\n^```$", text, re.DOTALL | re.MULTILINE):
            yield Block(page, text[: found.start()].count("\n") + 1, found[1] or "", found[2], found[3])


BLOCKS = list(blocks())
#: The schemas of results, by method.
RESULTS = {method["name"]: method["result"]["schema"] for method in discovery.document(BUILTIN)["methods"]}


def of_kind(*kinds: str) -> pytest.MarkDecorator:
    """Run a test with each block of these kinds."""
    wanted = [block for block in BLOCKS if block.kind in kinds]
    return pytest.mark.parametrize("block", wanted, ids=[f"{block.page}:{block.line}" for block in wanted])


def table(page: str, head: str) -> list[list[str]]:
    """The rows of the table on a page whose head begins with ``head``."""
    lines = PAGES[page][PAGES[page].index(f"\n| {head} |") + 1 :].splitlines()[2:]
    rows = lines[: next(i for i, line in enumerate([*lines, ""]) if not line.startswith("|"))]
    return [[cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", row.strip("|"))] for row in rows]


def first_words(page: str, head: str) -> list[str]:
    """Everything in backquotes in the first column of a table."""
    return re.findall(r"`([^`]+)`", " ".join(row[0] for row in table(page, head)))


# Blocks...


def test_every_block_is_run_or_says_why_not():
    """Each shell, Python and YAML block has a mark, and each mark is one of those that a test here knows."""
    kinds = {"demo", "shell", "python", "loop", "options", "hugging face", "lightning", "record", "event", "rule"}
    kinds |= {"data loader", "stack"}
    for block in BLOCKS:
        known = block.kind in kinds or re.match(
            r"not run: .{10}|run line$|test line$|transcript$|output of: ", block.mark
        )
        assert known or (not block.mark and block.language == "text"), block


def test_the_site_has_every_page():
    """Each page of docs/ has its place in the navigation, under its own name or that of the index."""
    from docs import site

    places = [name for names in site.NAVIGATION.values() for name in names]
    assert {path.stem for path in (ROOT / "docs").glob("*.md")} - {"README"} <= {*places}
    assert len(places) == len({*places}) and {"index", "pages", "verbs", "methods"} <= {*places}


def test_the_reference_pages_of_the_site_are_whole():
    """Each verb with its options, and each method with its parameters."""
    from docs import site

    pages = {"verbs": "\n".join(site.verbs()), "methods": "\n".join(site.methods())}
    sections = {page: re.split(r"^## ", text, flags=re.MULTILINE)[1:] for page, text in pages.items()}
    shown = {text.split()[0]: set(re.findall(r"^  (?:-\w, )?(--[a-z-]+)", text, re.M)) for text in sections["verbs"]}
    assert shown == {verb: options_of(verb) for verb in verbs()}
    first, *rest = sections["methods"]
    rows = {text.split()[0]: re.findall(r"^\| `(\w+)` \|.*\|.*\|.*\|$", text, re.MULTILINE) for text in rest}
    common = [param.name for param in methods.COMMON]
    assert first.startswith("Commands") and re.findall(r"^\| `(\w+)` \|.*\|.*\|.*\|$", first, re.MULTILINE) == common
    for name, method in BUILTIN.items():
        assert rows[name] == [param.name for param in method.params if not (method.is_command and param.name in common)]


def test_the_run_and_test_lines_are_one_line_each():
    """A newcomer pastes one line; .ci/run takes the test line from the README."""
    run, test = ([block.text for block in BLOCKS if block.mark == mark] for mark in ("run line", "test line"))
    assert len(run) == len(test) == 1 and "\n" not in run[0] + test[0]
    assert "tour.py" in run[0] and test[0].endswith("tox")
    script = (ROOT / ".ci" / "run").read_text()
    line = re.search(r"^line=\$\((.*)\)$", script, re.MULTILINE)[1]
    printed = subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, text=True)
    assert printed.stdout.strip() == test[0]


def test_a_newcomer_reads_the_readme_in_three_minutes():
    """At 300 words a minute, code included."""
    assert len(PAGES["README.md"].split()) <= 900


#: What the README's loop needs; it prints "ready" once two steps are done. Request files are read at once.
SCRIPT = """
import json, sys, time
from pathlib import Path
from forgather_control.server import limits

limits.TICK_PERIOD = 0.05
options, folder, steps = json.loads(sys.argv[1]), Path(sys.argv[2]), 0

def train_step():
    global steps
    steps += 1
    if steps == 3:
        print("ready", flush=True)
    time.sleep(0.005)
    return 1 / steps

def validate():
    return {"eval_loss": 0.5}

def sample(prompt: str, n: int = 1, temperature: float = 1.0) -> list[str]:
    return [f"{prompt} ... at {temperature:g}" for _ in range(n)]

heat = {"temperature": 1.0}
setting = {"get": lambda: heat["temperature"], "set": lambda value: heat.update(temperature=value)}
options |= {"commands": [sample], "settings": {"temperature": setting}}

def save(step):
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True, exist_ok=True)
    return path
"""


@contextmanager
def my_experiment(folder: Path, **options: Any) -> Iterator[Process]:
    """A job that trains with the loop of the README, in a process of its own."""
    loop = next(block.text for block in BLOCKS if block.kind == "loop" and block.page == "README.md")
    loop = loop.replace("1001", "10**9").replace('job_id="my_experiment"', 'job_id="my_experiment", **options')
    with Process(SCRIPT + loop, json.dumps(options), str(folder)) as process:
        assert process.line() == "ready", "".join(process.errors)
        yield process


@contextmanager
def shell_of(jobs_dir: Path) -> Iterator[dict[str, str]]:
    """The environment of a user whose jobs are here, and who has installed both console scripts."""
    with tempfile.TemporaryDirectory(prefix="fg") as home:  # short, as sockets want it
        (Path(home) / ".config" / "forgather").mkdir(parents=True)
        (Path(home) / ".config" / "forgather" / "jobs").symlink_to(jobs_dir)
        for name, function in (("forgather-control", "control"), ("forgather", "forgather")):
            script = Path(home) / name
            call = f"from forgather_control.__main__ import {function}; {function}()"
            script.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -c "{call}" "$@"\n')
            script.chmod(0o755)
        yield {**os.environ, "HOME": home, "PATH": f"{home}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}


def run(text: str, env: dict[str, str], cwd: Path) -> str:
    """What a shell prints; it must succeed."""
    words = ["bash", "-euo", "pipefail", "-c", text]
    done = subprocess.run(words, env=env, cwd=cwd, capture_output=True, text=True, timeout=3 * SOON)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs("socat")
@needs("nc")
@needs("openssl")
@pytest.mark.once
@of_kind("shell")
def test_shell_blocks(block, jobs_dir, tmp_path, pem):
    """Each line succeeds as it is typed; replies are strict JSON without an error, and checkpoints exist."""
    options: dict[str, Any] = {"port": 0} if "port" in block.mark or "TLS" in block.mark else {}
    if "TLS" in block.mark:
        options |= {"certfile": pem.cert, "keyfile": pem.key}
    with my_experiment(tmp_path, **options), shell_of(jobs_dir) as env:
        home = jobs_dir / "my_experiment"
        port = json.loads((home / "endpoint.json").read_text())["port"]
        text = block.text.replace("8900", str(port)).replace("cert.pem", pem.cert)
        printed = run(text, env, home if "in the job's directory" in block.mark else tmp_path)
    replies = [strict(line.encode() + b"\n") for line in printed.splitlines() if line.startswith('{"jsonrpc"')]
    assert printed and not any("error" in reply for reply in replies)
    assert bool(replies) == ("jsonrpc" in block.text or "requests/" in block.text)
    for reply in replies:
        result = reply.get("result", {}).get("result")
        if result is not None:
            assert Path(result["path"]).is_dir()


@needs_torch
@pytest.mark.once
def test_the_tutorial(jobs_dir, tmp_path):
    """Its blocks run one after the other against the demo that the first one starts."""
    first, *others = (block for block in BLOCKS if block.kind == "demo")
    with shell_of(jobs_dir) as env:
        env = {**env, "OMP_NUM_THREADS": "1"}
        words = [sys.executable, str(ROOT / first.text.split()[1]), *first.text.split()[2:]]
        with subprocess.Popen(words, cwd=tmp_path, env=env, stderr=subprocess.DEVNULL) as demo:
            try:
                until(lambda: (jobs_dir / "demo" / "endpoint.json").exists(), 6 * SOON)
                for block in others:
                    end = ' || test "$?" = 1' if "exit code 1" in block.mark else ""
                    printed = run(f"{block.text}{end}", env, tmp_path)
                    assert printed or end, block
                assert demo.wait(SOON) == 0
            finally:
                demo.kill()


@pytest.mark.once
@pytest.mark.parametrize("block", [block for block in BLOCKS if block.mark.startswith("output of: ")], ids=str)
def test_printed_blocks(block, jobs_dir, tmp_path):
    """What a command prints begins as shown, numbers and widths aside."""
    with my_experiment(tmp_path), shell_of(jobs_dir) as env:
        printed = run(block.mark.removeprefix("output of: "), env, tmp_path)
    shape = [re.sub(r"[\d.]+|/\S+", "#", " ".join(text.split("\n", 1)[0].split())) for text in (printed, block.text)]
    assert shape[0] == shape[1]


@of_kind("python")
def test_python_blocks(block, tmp_path):
    """Each program runs against a job, and prints something unless it only shows how errors are caught."""
    with my_experiment(tmp_path), redirect_stdout(io.StringIO()) as printed:
        exec(compile(block.text, block.page, "exec"), {"__name__": "docs"})
    assert printed.getvalue() or "except" in block.text


@of_kind("options")
def test_options_blocks(block):
    """Each object can be made as shown."""
    exec(compile(block.text, block.page, "exec"), {"__name__": "docs"})


@of_kind("loop")
def test_loop_blocks(block, tmp_path):
    """Each loop trains to its end, with functions of ours."""
    optimizer = SimpleNamespace(param_groups=[{"lr": 0.1}], step=lambda: None)
    scheduler = SimpleNamespace(optimizer=optimizer, step=lambda: None)
    space = {"train_step": lambda: 0.5, "validate": dict, "save": lambda step: tmp_path, "__name__": "docs"}
    space |= {"optimizer": optimizer, "scheduler": scheduler}
    exec(compile(block.text, block.page, "exec"), space)
    assert space["step"] == 1000 and not space["job"].aborted


#: A script around a loader, in a process group of its own: the group gets SIGTERM, as from torchrun.
GROUP = """
import os, torch
from forgather_control import TrainingJob

data = torch.arange(10**6).float()
{block}
with TrainingJob(signals={{"SIGTERM": "save_and_stop"}}) as job:
    for step, batch in enumerate(loader, 1):
        if step == 2:
            os.killpg(0, signal.SIGTERM)
        job.step(step)
        if job.should_save:
            job.saved(os.getcwd())
            print("saved", flush=True)
        if job.should_stop and step > 50:  # long after the first batches that the workers had made
            break
print("ended", flush=True)
"""


@needs_torch
@pytest.mark.once
@of_kind("data loader")
def test_data_loader_blocks(block):
    """A signal to the process group ends no worker; without the block's function it does."""
    texts = (block.text, block.text.replace(", worker_init_fn=ignore_sigterm", ""))
    with ExitStack() as stack:
        runs = [stack.enter_context(Process(GROUP.format(block=text), start_new_session=True)) for text in texts]
        assert [run.end(3 * SOON) for run in runs] == [0, 1]
        assert [runs[0].line(), runs[0].line()] == ["saved", "ended"]
        assert re.search("DataLoader worker|dataloader.py", "".join(runs[1].errors))  # or its connection has broken


def lines_of_code(block: Block) -> int:
    return len([line for line in block.text.splitlines() if line])


def test_ten_lines_are_enough():
    """The README has at most ten lines of code for each framework."""
    shown = [block for block in BLOCKS if block.page == "README.md" and block.language in ("python", "yaml")]
    assert len(shown) == 4 and max(map(lines_of_code, shown)) <= 10


@needs_torch
@needs_transformers
@pytest.mark.once
@of_kind("hugging face")
def test_hugging_face_blocks(block, tmp_path, monkeypatch):
    """The real Trainer trains to its end with the callback, and the script saves its model."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    monkeypatch.chdir(tmp_path)
    config = GPT2Config(vocab_size=8, n_positions=4, n_embd=4, n_layer=1, n_head=1, bos_token_id=0, eos_token_id=0)
    data = [{"input_ids": torch.tensor([1, 2, 3]), "labels": torch.tensor([1, 2, 3])}] * 8
    text = block.text.replace("max_steps=1000", "max_steps=3, report_to=[], use_cpu=True, disable_tqdm=True")
    exec(compile(text, block.page, "exec"), {"model": GPT2LMHeadModel(config), "data": data, "__name__": "docs"})
    assert (tmp_path / "runs" / "my_experiment" / "config.json").exists()


@needs_torch
@needs_lightning
@pytest.mark.filterwarnings("ignore")  # what Lightning itself does is not tested here
@pytest.mark.once
@of_kind("lightning")
def test_lightning_blocks(block, tmp_path, monkeypatch):
    """The real Trainer trains to its end with the callback."""
    import lightning
    import torch

    class Model(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)

        def training_step(self, x, batch_idx):
            return self.layer(x).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    monkeypatch.chdir(tmp_path)
    quiet = "max_epochs=2, logger=False, enable_progress_bar=False, enable_model_summary=False, accelerator='cpu'"
    space = {"model": Model(), "data": torch.utils.data.DataLoader(torch.ones(4, 1)), "__name__": "docs"}
    exec(compile(block.text.replace("max_epochs=100", quiet), block.page, "exec"), space)
    assert space["trainer"].global_step == 8 and not space["control"].aborted


@of_kind("record")
def test_record_blocks(block):
    """Each record that is shown has the members of a record."""
    shown = json.loads(block.text)
    record = shown.get("result", {}) if "jsonrpc" in shown else shown
    properties = RESULTS["save_checkpoint"]["properties"]
    assert record.keys() == {*RESULTS["save_checkpoint"]["required"]}
    assert record["requested_by"].keys() == properties["requested_by"]["properties"].keys()
    assert record["result"].keys() < properties["result"]["properties"].keys()


@of_kind("rule")
def test_rule_blocks(block):
    """Each rule that is shown has the members of a rule, and a condition as a job shows it."""
    shown = json.loads(block.text)
    assert list(shown) == RESULTS["add_rule"]["required"] and str(conditions.parse(shown["when"])) == shown["when"]


@of_kind("event")
def test_event_blocks(block):
    """Each event that is shown has the facts of its kind."""
    params = json.loads(block.text)["params"]
    (facts,) = (row[2] for row in table("docs/wire.md", "kind") if row[0] == f"`{params['kind']}`")
    assert ["seq", "time", "kind", *facts.strip("`").split()] == list(params)


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.mark.startswith("not run")], ids=str)
def test_blocks_that_cannot_run_here_are_parsed(block, tmp_path, monkeypatch):
    """Shell lines by the shell, and commands of ours by our own parser."""
    monkeypatch.chdir(tmp_path)
    Path("token").write_text("secret")
    if block.language == "sh":
        subprocess.run(["bash", "-n", "-c", block.text], check=True)
        for line in block.text.splitlines():
            words = re.split(r"&&|[|;]", line)[0]
            if words.startswith("forgather-control "):
                assert parser.parse(shlex.split(words)[1:], "forgather-control").verb


# Tables...


def verbs() -> dict[str, str]:
    """How each verb is called, as the table has it."""
    return {cell.split()[0]: cell for cell in first_words("docs/command-line.md", "verb")}


def test_the_table_of_verbs():
    """All verbs, each with its words: it can be called without those in brackets, and not without the others."""
    assert list(verbs()) == sorted(verbs(), key=list(verbs()).index)
    assert verbs().keys() == {method.verb for method in BUILTIN.values() if method.verb} | {
        "cleanup",
        "completion",
        "events",
        "help",
        "mcp",
        "rpc",
        "run",
        "wait",
        "watch",
    }
    for verb, usage in verbs().items():
        if verb == "help":
            continue  # it only prints
        words = usage.replace("SHELL", "bash").split()[1:]
        required = [word for word in words if not word.startswith("[")]
        every = [word.strip("[]") for word in words]
        for words in (required, every):
            assert parser.parse([verb, *words], "").verb == verb
        for words in (required[:-1], [*every, "more"]):
            if usage.endswith("[JOB...]") and words[-1:] == ["more"]:
                continue  # any number of jobs
            if len(words) != len(required):
                with pytest.raises(SystemExit):
                    parser.parse([verb, *words], "")


def options_of(verb: str) -> set[str]:
    """All options that a verb has, as its help lists them."""
    with redirect_stdout(io.StringIO()) as printed, pytest.raises(SystemExit):
        parser.parse([verb, "--help"], "")
    return set(re.findall(r"^  (?:-\w, )?(--[a-z-]+)", printed.getvalue(), re.MULTILINE))


def test_the_table_of_options():
    """Each option with the verbs that have it, none more, none less."""
    commands = {method.verb for method in BUILTIN.values() if method.is_command and method.verb}
    groups = {
        "commands": commands,
        "all": {*verbs()},
        "those with JOB": {verb for verb, usage in verbs().items() if "JOB" in usage},
        "those with JOB...": {verb for verb, usage in verbs().items() if "JOB..." in usage},
        "those with JOB... but `watch`": {verb for verb, usage in verbs().items() if "JOB..." in usage} - {"watch"},
        "those with JOB, `list`": {verb for verb, usage in verbs().items() if "JOB" in usage} | {"list"},
    }
    documented: dict[str, set[str]] = {verb: {"--help"} for verb in verbs()}
    for option, where, _ in table("docs/command-line.md", "option"):
        for verb in groups.get(where, set(re.findall(r"`([\w-]+)`", where))):
            documented[verb].add(option.strip("`").split()[0])
    assert documented == {verb: options_of(verb) for verb in verbs()}


def test_the_table_of_tools():
    """All tools of assistants, those that read, act, and are marked as destructive."""
    found = tools.of_table(Allowed(dict.fromkeys(ACTING)))
    kinds = {True: "reads", False: "acts"}
    marks = {
        tool.name: kinds[tool.reads_only] + ("" if tool.is_harmless else ", marked as destructive") for tool in found
    }
    rows = table("docs/assistants.md", "tool")
    documented = {name: row[1] for row in rows for name in re.findall(r"`([\w-]+)`", row[0])}
    assert documented == {**marks, "run_NAME": "acts, marked as destructive"}
    waits = re.findall(r"(\d+) seconds", PAGES["docs/assistants.md"])
    assert waits == [f"{limits.DEFAULT_WAIT:g}", f"{limits.MAX_WAIT:g}"]
    assert f"after {limits.MAX_QUOTED} characters" in PAGES["docs/assistants.md"]


def test_what_assistants_may_be_allowed():
    """Each word of the table is one of --allow; each command to register is one of ours."""
    for row in table("docs/assistants.md", "`--allow`")[1:]:
        assert Allowed.parse(row[0].strip("`")).names
    commands = re.findall(r'"args": (\[.*?\])', PAGES["docs/assistants.md"])
    assert len(commands) == 2
    for words in [*map(json.loads, commands), *(line.split()[1:] for line in registered())]:
        assert parser.parse(words, "").verb == "mcp"


def registered() -> list[str]:
    """The command lines that are registered with a host's own command."""
    found = re.findall(r"^claude mcp add .* -- .*?(forgather-control .*)$", PAGES["docs/assistants.md"], re.MULTILINE)
    assert len(found) == 2
    return found


def test_the_tables_of_the_wire():
    """Methods, commands, parameters, members, kinds of events and errors are those of the code."""
    page = "docs/wire.md"
    assert {*first_words(page, "method")} == {*BUILTIN} | {"rpc.discover", "user.NAME"}
    assert first_words(page, "command") == [method.name for method in BUILTIN.values() if method.is_command]
    assert first_words(page, "parameter") == [param.name for param in methods.COMMON]
    record, status = (table(page, "member"), PAGES[page][PAGES[page].index("## Status") :])
    assert {row[0].strip("`") for row in record} == {*RESULTS["save_checkpoint"]["required"]}
    members = re.findall(r"^\| (`.*?`) \|", status[: status.index("## Events")], re.MULTILINE)
    assert set(re.findall(r"`(\w+)`", " ".join(members))) == RESULTS["status"]["properties"].keys()
    assert set(states.TRAINING_STATUSES) == set(re.search(r"one of `(.*?)`", status)[1].split())
    assert first_words(page, "kind") == sorted(states.EVENT_KINDS, key=first_words(page, "kind").index)
    assert {*first_words(page, "kind")} == {*states.EVENT_KINDS}


def test_events_have_the_facts_of_the_table(tmp_path):
    """Every kind of event of a job that is saved and stopped."""
    facts = {row[0].strip("`"): set(row[2].strip("`").split()) for row in table("docs/wire.md", "kind")}
    facts |= {"command": {*RESULTS["save_checkpoint"]["required"]}, "rank": {"state", "ranks"}}
    with my_experiment(tmp_path), forgather_control.connect("my_experiment") as client:
        events = client.events(since=0)
        forgather_control.save_checkpoint("my_experiment", wait="finished")
        forgather_control.graceful_stop("my_experiment")
        seen = {event["kind"]: event.keys() - {"seq", "time", "kind", "lost"} for event in events}
    assert seen == facts


def test_the_table_of_errors():
    """Every class that a caller can meet, with its code and what else it is."""
    rows = table("docs/wire.md", "code")
    assert [row[1].strip("`") for row in rows if row[1].strip("`") not in errors.__dict__] == []
    classes = {name for name, value in vars(errors).items() if name.endswith("Error") or hasattr(value, "code")}
    assert {row[1].strip("`") for row in rows} == classes
    for code, name, meaning in rows:
        cls = getattr(errors, name.strip("`"))
        also = {base.__name__ for base in cls.__bases__ if not issubclass(base, errors.ControlError)} - {"Exception"}
        assert (int(code), set(re.findall(r"also an? `(\w+)`", meaning))) == (cls.code, also)
        assert getattr(forgather_control, cls.__name__) is cls


def test_the_tables_of_states_and_exit_codes():
    """The words of the code, in its order."""
    assert tuple(first_words("docs/command-line.md", "state")) == states.JOB_STATES
    assert tuple(first_words("docs/command-line.md", "state of a command")) == states.COMMAND_STATES
    assert tuple(first_words("docs/command-line.md", "how it ended")) == states.ENDINGS
    assert tuple(first_words("docs/ranks.md", "state of a rank")) == states.RANK_STATES
    codes = {value for name, value in vars(exit_codes).items() if name.isupper() and isinstance(value, int)}
    assert {int(row[0]) for row in table("docs/command-line.md", "exit code")} == codes


def test_the_table_of_environment_variables():
    """All that the package reads, and NO_COLOR, which is not ours."""
    source = "".join(path.read_text() for path in (ROOT / "forgather_control").rglob("*.py"))
    read = set(re.findall(r"FORGATHER_[A-Z_]*[A-Z]", source)) | {"NO_COLOR"}
    assert set(first_words("docs/command-line.md", "variable")) == read


def test_the_tables_of_the_python_page():
    """Options with their defaults, functions, members and methods; and every public name is somewhere in docs/."""
    page = "docs/python.md"
    options = {row[0].strip("`"): row[1].strip("`").replace('"', "'") for row in table(page, "option")}
    assert options == {field.name: repr(field.default) for field in dataclasses.fields(ControlOptions)}
    functions = {name for name in forgather_control.__all__ if name[0].islower()}
    assert {cell.partition("(")[0] for cell in first_words(page, "function")} == functions
    for head, cls in (("member", forgather_control.TrainingJob), ("method", forgather_control.Client)):
        names = {cell.partition("(")[0] for cell in first_words(page, head)}
        assert names == {name for name in dir(cls) if not name.startswith("_")} - UNDOCUMENTED
    names = {cell.partition("(")[0] for cell in first_words(page, "method of `Jobs`")}
    assert names == {name for name in dir(forgather_control.jobs("x")) if not name.startswith("_")}
    for name in set(forgather_control.__all__) - {"__version__"}:
        assert f"`{name}" in PAGES[page] + PAGES["docs/wire.md"], name


#: Public attributes that serve the package itself.
UNDOCUMENTED = {"call_raw", "give", "job_id", "name", "enabled"}


def test_the_tables_for_developers():
    """Packages and tox environments, none more, none less."""
    packages = {path.parent.name for path in (ROOT / "forgather_control").glob("*/__init__.py")}
    assert set(first_words("docs/developing.md", "package")) == packages
    tox = configparser.ConfigParser(interpolation=None)
    tox.read(ROOT / "tox.ini")
    listed = set(tox["tox"]["env_list"].replace(" ", "").split(","))
    sections = {name.removeprefix("testenv:") for name in tox.sections() if name.startswith("testenv:")}
    assert set(re.findall(r"`(\w+)`", " ".join(row[0] for row in table("docs/developing.md", "tox environment")))) == (
        listed | sections
    )


def test_the_members_of_endpoint_json():
    """The record has what the page lists."""
    (row,) = (row for row in table("docs/wire.md", "file") if row[0] == "`endpoint.json`")
    listed = set(re.findall(r"`([a-z_ 0-9]+)`", row[1]))
    assert {name for names in listed for name in names.split()} - {"0"} <= set(JobRecord._fields)


def sentences() -> Iterator[str]:
    """All texts in the source of the package that are no docstrings, with an ellipsis for what is filled in."""
    for path in (ROOT / "forgather_control").rglob("*.py"):
        nodes = [*ast.walk(ast.parse(path.read_text()))]
        docs = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        for node in nodes:
            if id(node) in docs:
                continue
            if isinstance(node, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else "..." for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield re.sub(r"%[a-z]", "...", node.value)


def test_the_messages_of_troubleshooting():
    """Each message with a remedy is one of the code: its words in this order, and something for each ellipsis."""
    page, known = "docs/troubleshooting.md", "\n".join(sentences())
    tables = re.findall(r"^\| message \|.*\n\|[-|]+\n((?:\|.*\n)+)", PAGES[page], re.MULTILINE)
    messages = re.findall(r"`([^`]+)`", "\n".join(row.split(" | ")[0] for rows in tables for row in rows.splitlines()))
    assert len(messages) > 50
    for message in messages:
        parts = [re.escape(part.strip()) for part in message.split("...")]
        assert re.search(".*".join(parts), known), message


# Names and links...


def test_the_names_that_are_shown_exist():
    """Every name that is imported from the package is public."""
    for block in BLOCKS:
        for names in re.findall(r"from forgather_control import ([\w, ]+)", block.text):
            assert {name.strip() for name in names.split(",")} <= {*forgather_control.__all__}, block


def anchors(text: str) -> set[str]:
    """The anchors that GitHub makes of the headings of a page."""
    heads = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", sorted(PAGES))
def test_links(page):
    """Each link leads to a file, and to a heading in it; each page can be found from the README and the index."""
    for target in re.findall(r"\]\(([^)]+)\)", PAGES[page]):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        found = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        assert found.exists(), target
        assert not anchor or anchor in anchors(found.read_text()), target
    if page.startswith("docs/") and page != "docs/README.md":
        assert f"]({page})" in PAGES["README.md"] and f"]({page.removeprefix('docs/')})" in PAGES["docs/README.md"]
