"""Verbs for several jobs, as users and scripts see them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import pytest

from forgather_control import connect
from forgather_control.cli import main as command_line
from forgather_control.cli import many
from forgather_control.client.many import Calls
from forgather_control.errors import InternalError

from ..support.harness import ROOT, SOON, Process, cli, job_process, running_loop, until
from .test_main import on_terminal


def run(capsys, *words: str) -> tuple[int, str, str]:
    """Run the command line in this process: its exit code, its output, its complaints."""
    code = command_line.main(words)
    return code, *capsys.readouterr()


def impatient(*words: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process that waits a tenth of the usual time for jobs that do not answer."""
    source = (
        "import sys; from forgather_control.client import limits; "
        "limits.CALL_TIMEOUT, limits.REPLY_GRACE, limits.KILL_GRACE = 1.0, 0.5, 1.0; "
        "from forgather_control.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", source, *words]
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=3 * SOON, cwd=ROOT)


@contextmanager
def three(**options) -> Iterator[list]:
    """Jobs run1, run2 and other."""
    with ExitStack() as stack:
        yield [stack.enter_context(running_loop(name, **options)) for name in ("run1", "run2", "other")]


def test_a_save_of_several(capsys):
    """One line for each as it finishes, a summary, and every checkpoint on disk."""
    with three() as (one, two, other):
        code, out, err = run(capsys, "save", "run*", "--timeout", "20", "--reason", "all")
        lines = out.splitlines()
        assert (code, err) == (0, "") and lines[-1] == "save of 2 jobs: 2 finished"
        assert sorted(line.partition(" at ")[0] for line in lines[:-1]) == ["run1: saved", "run2: saved"]
        paths = [line.rpartition(": ")[2] for line in lines[:-1]]
        assert sorted(paths) == sorted(one.saves + two.saves) and all(map(os.path.isdir, paths))
        assert other.saves == []
        code, out, _ = run(capsys, "save", "--all")
        assert code == 0 and out.splitlines()[-1] == "save of 3 jobs: 3 accepted"
        code, out, _ = run(capsys, "save", "other", "run1", "--json", "--timeout=20")
        found = {line["job_id"]: line["result"] for line in map(json.loads, out.splitlines())}
        assert code == 0 and {name: record["state"] for name, record in found.items()} == dict.fromkeys(
            ("other", "run1"), "finished"
        )


def test_the_other_verbs(capsys):
    """Each says for each job what it says for one."""
    heat = {"t": 1.0}
    settings = {"t": {"get": lambda: heat["t"], "set": lambda value: heat.update(t=value)}}
    with three(settings=settings) as runs:
        until(lambda: all(each.steps for each in runs))
        for words, said in (
            (["status"], "run1: training, step "),
            (["ranks"], "run1:\nRANK"),
            (["set"], "run1:\nNAME  VALUE"),
            (["set", "t=2", "--timeout=20"], "run1: set at step "),
            (["when", "loss > 1e9", "abort"], "run1: added rule 1: when loss > 1000000000, abort"),
            (["when"], "run1:\n1: when loss > 1000000000, abort"),
            (["when", "--remove", "1"], "run1: removed rule 1: when loss > 1000000000, abort"),
            (["pause", "--timeout=20"], "run1: pause finished at step "),
            (["status"], "run1: paused, step "),
            (["resume", "--timeout=20"], "run1: resume finished at step "),
        ):
            code, out, err = run(capsys, words[0], "run1", "run2", *words[1:])
            assert (code, err) == (0, "") and said in out and said.replace("run1", "run2") in out, words
            assert out.splitlines()[-1].startswith(f"{words[0]} of 2 jobs: 2 "), words
        code, out, err = run(capsys, "evaluate", "run*")
        assert (code, out) == (1, "evaluate of 2 jobs: 2 refused\n")
        assert sorted(err.splitlines())[0].startswith("run1: evaluate was refused")
        code, out, _ = run(capsys, "status", "run*", "--json")
        assert code == 0 and {json.loads(line)["result"]["job_id"] for line in out.splitlines()} == {"run1", "run2"}


def test_the_scripts_own_command_in_a_rule(capsys):
    """It is looked up in each job: one that has none is an error of its own."""
    with running_loop("run1", commands=[sample]), running_loop("run2"):
        code, out, err = run(capsys, "when", "run*", "loss > 1e9", "run", "sample", "n=3")
        assert code == 1 and "run1: added rule 1: when loss > 1000000000, user.sample n=3" in out
        assert err.startswith("run2: run2 has no commands of its own") and out.endswith("1 answered, 1 refused\n")


def sample(n: int = 1) -> int:
    return n


@pytest.mark.once
def test_every_kind_of_trouble_at_once():
    """Each word its line, the worst exit code, and the jobs that live are saved."""
    with ExitStack() as stack:
        found = {name: stack.enter_context(job_process(name)) for name in ("run1", "run2", "dead", "stuck")}
        found["dead"].kill()
        os.kill(found["stuck"].pid, signal.SIGSTOP)
        done = impatient("save", "no-such", "*", "zzz?", "--timeout", "1")
        as_json = impatient("save", "no-such", "*", "--timeout", "1", "--json")
        os.kill(found["stuck"].pid, signal.SIGCONT)
    assert done.returncode == as_json.returncode == 4
    told = dict(line.split(": ", 1) for line in done.stderr.splitlines())
    assert [*told] == ["no-such", "zzz?", "dead", "stuck"]
    assert "No job 'no-such'" in told["no-such"] and "No job matches" in told["zzz?"]
    assert "is dead" in told["dead"] and "did not answer within" in told["stuck"]
    lines = done.stdout.splitlines()
    assert len(lines) == 3 and all(Path(line.rpartition(": ")[2]).name.startswith("checkpoint-") for line in lines[:2])
    assert lines[-1] == "save of 6 jobs: 2 finished, 2 not found, 1 dead, 1 without answer"
    rows = {row["job_id"]: row for row in map(json.loads, as_json.stdout.splitlines())}
    assert {name: row["error"]["code"] for name, row in rows.items() if "error" in row} == {
        "no-such": -31021,
        "dead": -31023,
        "stuck": -31024,
    }
    assert {name for name, row in rows.items() if "result" in row} == {"run1", "run2"}


@pytest.mark.once
def test_status_of_jobs_that_do_not_answer(capsys):
    """What is left of them: of one that has ended how, of one that is dead or silent what it wrote last."""
    root = Path(os.environ["FORGATHER_JOBS_DIR"])
    with running_loop("done") as run_, job_process("dead") as dead, job_process("stuck") as stuck:
        until(lambda: run_.steps and (root / "dead/status.json").exists() and (root / "stuck/status.json").exists())
        assert run(capsys, "stop", "done", "--timeout=20")[0] == 0
        run_.thread.join(SOON)
        dead.kill()
        os.kill(stuck.pid, signal.SIGSTOP)
        words = ["status", "done", "dead", "stuck", "never"]
        done, as_json = impatient(*words), impatient(*words, "--json")
        os.kill(stuck.pid, signal.SIGCONT)
    assert done.returncode == as_json.returncode == 4
    told = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert told["done"].startswith("has ended: ") and ", step " in told["done"]
    assert told["dead"].startswith("is dead; it was ") and told["stuck"].startswith("does not answer; it was ")
    assert told["status of 4 jobs"] == "1 ended, 1 not found, 1 dead, 1 without answer"
    assert sorted(line.partition(":")[0] for line in done.stderr.splitlines()) == ["dead", "never", "stuck"]
    rows = {row["job_id"]: row for row in map(json.loads, as_json.stdout.splitlines())}
    assert rows["done"]["result"]["ended"]["how"] and rows["dead"]["last_status"]["job_id"] == "dead"
    assert {name for name, row in rows.items() if "error" in row} == {"dead", "stuck", "never"}


@pytest.mark.once
def test_ranks_of_one_that_does_not_answer():
    """What its records tell is shown, and counted as no answer."""
    with job_process("run1"), job_process("stuck") as stuck:
        os.kill(stuck.pid, signal.SIGSTOP)
        done = cli("ranks", "*", "--timeout", "0.2")
        os.kill(stuck.pid, signal.SIGCONT)
    assert done.returncode == 4 and "stuck:\nRANK" in done.stdout and "silent" in done.stdout
    assert done.stdout.endswith("ranks of 2 jobs: 1 answered, 1 without answer\n")
    assert done.stderr.startswith("stuck: ") and "what can be seen from here" in done.stderr


@pytest.mark.once
def test_thirty_jobs_some_at_a_time(capsys):
    """With --parallel 1 to 30 every checkpoint is on disk, each job's own."""
    with ExitStack() as stack:
        runs = [stack.enter_context(running_loop(f"run{number:02}", step_seconds=0.05)) for number in range(30)]
        for count, parallel in enumerate(("1", "30"), 1):
            code, out, err = run(capsys, "save", "run*", "--timeout", "60", "--parallel", parallel)
            assert (code, err) == (0, "") and out.endswith("save of 30 jobs: 30 finished\n")
            assert {len(each.saves) for each in runs} == {count}
            assert {line.partition(":")[0] for line in out.splitlines()[:-1]} == {f"run{n:02}" for n in range(30)}


def test_a_slurm_array(capsys, monkeypatch):
    """Its id means all tasks; where it has one only, that is one job, as before; and so is a job named by a number."""
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "1200")
    monkeypatch.setenv("SLURM_JOB_ID", "1201")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    with running_loop("alpha"):
        assert run(capsys, "save", "1200")[:2] == (0, "alpha: save accepted\n")
        monkeypatch.setenv("SLURM_JOB_ID", "1202")
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
        with running_loop("beta"):
            code, out, _ = run(capsys, "save", "1200", "--timeout=20")
            assert code == 0 and out.endswith("save of 2 jobs: 2 finished\n")
            assert run(capsys, "save", "1200_2")[1] == "beta: save accepted\n"
            code, _, err = run(capsys, "profile", "1200")
            assert code == 2 and "'1200' names several jobs" in err
    with running_loop("30"):
        assert run(capsys, "save", "30")[1] == "30: save accepted\n"
    code, out, err = run(capsys, "save", "--wait", "30")
    assert (code, out) == (3, "") and err.endswith("To give up waiting after 30 s, use --timeout 30\n")


def test_one_that_a_pattern_matches_is_told_as_several(capsys):
    """A script need not know how many there are."""
    with running_loop("run1"):
        assert run(capsys, "save", "run*")[:2] == (0, "run1: save accepted\nsave of 1 job: 1 accepted\n")
        code, _, err = run(capsys, "save", "run1", "--wait", "30")
        assert code == 3 and err.endswith("To give up waiting after 30 s, use --timeout 30\n")


def test_no_jobs(capsys):
    """Exit code 3, for all and for a pattern."""
    code, out, err = run(capsys, "stop", "--all", "--force")
    assert (code, out) == (3, "") and err.startswith("No live job in ")
    assert run(capsys, "save", "x*")[:2] == (3, "")
    code, out, err = run(capsys, "stop", "x*", "--json")
    assert code == 3 and json.loads(out)["error"]["code"] == -31021 and err.startswith("x*: No job matches")


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize("verb", ["stop", "save-stop", "abort"])
def test_one_question_before_more_than_one_ends(verb):
    """It shows the list; no leaves all alone, yes ends those and no others."""
    with three() as runs:
        code, shown = on_terminal([verb, "run*"], "n\n")
        assert code == 1 and shown.count("[y/N]") == 1 and f"{verb} these 2 jobs?" in shown
        assert "run1" in shown and "run2" in shown and "other" not in shown and "nothing was done" in shown
        assert not any(each.job.should_stop for each in runs)
        code, shown = on_terminal([verb, "run1", "run2", "--timeout", "20"], "y\n")
        assert code == 0 and f"{verb} of 2 jobs: 2 finished" in shown
        assert [each.job.should_stop for each in runs] == [True, True, False]


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_what_needs_no_question(capsys):
    """One that ends, or --force; jobs that are dead do not count. An abort asks for one, too."""
    with three() as (one, two, _other), job_process("dead") as dead:
        dead.kill()
        code, out, _ = run(capsys, "stop", "dead", "other")
        assert code == 4 and "other: stop accepted" in out and not one.job.should_stop
        code, shown = on_terminal(["abort", "run1", "dead"], "no\n")
        assert code == 1 and "abort run1? Progress since the last checkpoint is lost." in shown
        assert cli("stop", "run*").returncode == 2 and not one.job.should_stop and not two.job.should_stop
        code, shown = on_terminal(["abort", "run*", "--kill-after", "5"], "no\n")
        assert "abort these 2 jobs?" in shown and "get SIGTERM after 5 s, and SIGKILL 10 s later" in shown
        code, out, _ = run(capsys, "stop", "run*", "--force", "--timeout=20")
        assert code == 0 and out.endswith("stop of 2 jobs: 2 finished\n")
        assert run(capsys, "stop", "dead", "dead", "--force")[0] == 4


@pytest.mark.once
def test_an_abort_that_kills():
    """Each job that does not end is killed; the lines say which."""
    with job_process("run1"), job_process("stuck") as stuck, job_process("dead") as dead:
        dead.kill()
        os.kill(stuck.pid, signal.SIGSTOP)
        words = ["abort", "*", "--force", "--kill-after", "0.5"]
        done = impatient(*words)
        assert stuck.end() == -signal.SIGKILL
        told = dict(line.split(": ", 1) for line in done.stdout.splitlines())
        assert done.returncode == 4 and "ended at step" in told["run1"] and "killed by SIGKILL" in told["stuck"]
        assert told["abort of 3 jobs"] == "1 finished, 1 killed, 1 dead"
    with job_process("stuck") as stuck:
        os.kill(stuck.pid, signal.SIGSTOP)
        (line,) = impatient("abort", "stuc*", "--force", "--kill-after", "0.5", "--json").stdout.splitlines()
        row = json.loads(line)
        assert row["job_id"] == "stuck" and row["processes"][0]["outcome"] == "killed" and "error" in row


@pytest.mark.once
def test_interrupted():
    """Ctrl-C ends at once, and says which jobs have not answered, and which were not asked."""
    with ExitStack() as stack:
        for name in ("run1", "run2", "run3"):
            os.kill(stack.enter_context(job_process(name)).pid, signal.SIGSTOP)
        quick = stack.enter_context(job_process("run0"))
        source = """
        import signal, sys
        from forgather_control.cli.main import main
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it in the background
        sys.exit(main(sys.argv[1:]))
        """
        with Process(source, "save", "run*", "--wait", "--parallel", "2") as process:
            assert process.line().startswith("run0: saved") and quick.popen.poll() is None
            client = psutil.Process(process.pid)
            until(lambda: len(client.net_connections("unix")) == 2)  # the next job has been asked in its place
            process.popen.send_signal(signal.SIGINT)
            assert process.end() == 130
        assert "".join(process.errors) == (
            "interrupted; a command that was accepted is still carried out; "
            "without an answer yet: run1, run2; not asked: run3\n"
        )


def test_a_reader_that_goes_stops_no_command():
    """``save --all | head -1`` saves all."""
    with three() as runs:
        line = f"{sys.executable} -m forgather_control save --all --timeout 20 --parallel 1 | head -c 1"
        done = subprocess.run(line, shell=True, capture_output=True, text=True, timeout=3 * SOON, cwd=ROOT)
        assert done.stderr == "" and all(len(each.saves) == 1 for each in runs)
    if os.path.exists("/dev/full"):
        with three() as runs:
            line = f"{sys.executable} -m forgather_control save --all --timeout 20 >/dev/full"
            done = subprocess.run(line, shell=True, capture_output=True, text=True, timeout=3 * SOON, cwd=ROOT)
            assert done.returncode == 1 and done.stderr.startswith("the output is lost")
            assert all(len(each.saves) == 1 for each in runs)


def test_an_answer_that_cannot_be_shown(capsys):
    """A hostile job is one error; the others are shown."""
    args = command_line.parser.parse(["status", "a", "b"], "")
    report = many._Report(args)
    report.add("a", {"job_id": "a"})
    report.add("b", {"job_id": "b", "status": "\x1b[2J", "global_step": 1})
    report.sum_up("status")
    out, err = capsys.readouterr()
    assert err == f"a: {InternalError('the other side sent an answer that cannot be shown; --json prints it')}\n"
    assert out.startswith("b: \\x1b[2J, step 1, ") and "\x1b" not in out and report.code == 1
    args = command_line.parser.parse(["save", "a", "b"], "")
    report = many._Report(args)
    for answer in (None, [], {"state": 1}):
        report.add("a", answer)
    assert report.code == 1 and capsys.readouterr().err.count("sent no command record") == 3


def test_failed_and_cancelled_commands(capsys):
    """They are problems, with the record for --json."""
    with running_loop("run1", step_seconds=0.5), connect("run1") as job:
        record = job.command("save_checkpoint").to_json()
    for state in ("failed", "cancelled"):
        record |= {"state": state, "error": {"code": -32002, "message": "disk full"}}
        for words, out in ((["save", "run*"], ""), (["save", "run*", "--json"], "{")):
            report = many._Report(command_line.parser.parse(words, ""))
            report.add("run1", record)
            told = capsys.readouterr()
            assert report.code == 1 and told.err.startswith(
                f"run1: save {'failed: disk full' if state == 'failed' else 'was'}"
            )
            assert told.out.startswith(out) and bool(told.out) == bool(out)


def test_many_names_in_one_sentence(capsys):
    """At most eight, and how many more."""
    report = many._Report(command_line.parser.parse(["save", "--all"], ""))
    from forgather_control.client.target import Target

    calls = Calls([Target(f"run{number}") for number in range(20)], lambda target: None, 2)
    assert many._interrupted(report, calls) == 130
    assert capsys.readouterr().err.endswith("not asked: run0, run1, run2, run3, run4, run5, run6, run7 and 12 more\n")


def test_a_job_of_another_host_is_told(jobs_dir, capsys):
    """--all names what it leaves out."""
    with running_loop("run1"):
        (jobs_dir / "far").mkdir()
        known = {"job_id": "far", "host": "elsewhere", "port": None, "pid": 1, "started_at": 1.0}
        (jobs_dir / "far" / "endpoint.json").write_text(json.dumps(known))
        code, out, err = run(capsys, "status", "--all")
        assert code == 0 and out.endswith("status of 1 job: 1 answered\n")
        assert err == "left out far: it is on elsewhere and does not answer here\n"
