"""The command line as users, pipes and scripts see it."""

from __future__ import annotations

import json
import os
import pty
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from forgather_control import connect
from forgather_control.cli import main as command_line
from forgather_control.errors import JobNotAnswering
from forgather_control.jobs import record
from forgather_control.jobs.rank_processes import RankRecord
from forgather_control.processes.liveness import current_process
from forgather_control.version import VERSION
from forgather_control.wire import builtin
from forgather_control.wire.addresses import MAX_PATH

from ..client.test_recovery import DEAF, KEEPS, LISTENS, WAITS, answering, impatient, publish, ranks, row
from ..support.harness import ROOT, SOON, TOKEN, Process, cli, job_process, running_loop, serving, serving_tcp, until

__all__ = ["impatient"]  # a fixture

RECORD = {"job_id": "x", "host": "elsewhere", "port": None, "pid": 1, "started_at": 1.0}


def put(jobs_dir: Path, name: str, **changes) -> None:
    """A record as another host, a hostile neighbour or a crash may have left it."""
    (jobs_dir / name).mkdir(parents=True)
    (jobs_dir / name / "endpoint.json").write_text(json.dumps({**RECORD, "job_id": name, **changes}))


def test_the_quick_start_of_forgather_works_as_typed():
    """list, status, save, stop, save-stop, abort, cleanup --force, through the console script ``forgather``."""
    script = Path(sys.executable).parent / "forgather"
    if not script.exists():
        pytest.skip("the package is not installed, only on the path")

    def forgather(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([script, "control", *words], capture_output=True, text=True, timeout=SOON)

    for stop in (("stop",), ("save-stop",), ("abort", "--force")):
        with job_process("job_one") as job:
            assert "job_one" in forgather("list").stdout
            assert "step" in forgather("status", "job_one").stdout
            assert forgather("save", "job_one").stdout == "job_one: save accepted\n"
            verb, *force = stop
            assert forgather(verb, "job_one", *force).returncode == 0
            assert job.end() == 0
    done = forgather("cleanup", "--force")
    assert (done.returncode, done.stdout) == (0, "nothing to clean up\n")


def test_every_verb_is_the_same_by_module_and_by_script():
    """``python -m`` and both scripts show the same verbs."""
    by_module = cli("--help")
    assert by_module.returncode == 0
    for method in builtin.BUILTIN.values():
        if method.verb:
            assert method.verb in by_module.stdout and method.summary.split()[0] in by_module.stdout
    script = Path(sys.executable).parent / "forgather-control"
    if script.exists():
        by_script = subprocess.run([script, "--help"], capture_output=True, text=True, timeout=SOON)
        assert by_script.stdout == by_module.stdout


@pytest.mark.parametrize(
    "words, code, shown",
    [(["train"], 2, ""), (["list"], 2, ""), ([], 2, "usage"), (["--help"], 0, "usage"), (["--version"], 0, VERSION)],
)
def test_without_forgather_its_command_shows_the_usage(words, code, shown, capsys):
    """Alone or with --help, all verbs; before any other word, what the command for the control is."""
    try:
        got = command_line.forgather(words)
    except SystemExit as ended:
        got = ended.code
    out, err = capsys.readouterr()
    assert got == code and "Forgather itself" in err and "Usage: forgather control [OPTIONS] VERB" in err
    assert shown in (out if code == 0 else err)
    assert ("save-stop" in out + err) == (shown == "usage")


def test_another_first_word_is_forgathers(capsys, monkeypatch, tmp_path):
    """``forgather train`` goes to the real Forgather where it is installed."""
    (tmp_path / "forgather").mkdir()
    (tmp_path / "forgather" / "__init__.py").touch()
    (tmp_path / "forgather" / "cli.py").write_text("def main():\n    print('the real one')\n    return 7\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert command_line.forgather(["train"]) == 7
    assert capsys.readouterr().out == "the real one\n"
    for name in ("forgather", "forgather.cli"):
        monkeypatch.delitem(sys.modules, name)


def test_waiting_verbs_say_what_happened_and_where():
    """save --wait names the path, stop --wait the step it ended at."""
    with running_loop() as run:
        saved = cli("save", "--wait", "job")
        assert saved.returncode == 0, saved.stderr
        assert saved.stdout.startswith("job: saved at step ") and saved.stdout.strip().endswith(run.saves[0])
        stopped = cli("stop", "job", "--timeout=20")
        assert stopped.returncode == 0 and stopped.stdout.startswith("job: ended at step ")


def test_json_prints_one_text_of_what_the_wire_said():
    """Every verb with --json prints one JSON text on stdout."""
    with running_loop():
        assert json.loads(cli("status", "--json").stdout)["job_id"] == "job"
        (listed,) = json.loads(cli("list", "--json").stdout)
        assert (listed["job_id"], listed["state"]) == ("job", "live") and listed["global_step"] >= 0
        assert json.loads(cli("save", "--json", "--timeout=20").stdout)["state"] == "finished"
        assert json.loads(cli("rpc", "job", "ping", "--json").stdout)["protocol"] == 2
        refused = cli("rpc", "job", "nosuch", "--json")
        assert refused.returncode == 1 and json.loads(refused.stdout)["error"]["code"] == -32601
        assert json.loads(cli("abort", "--force", "--json").stdout)["command"] == "abort"
    assert json.loads(cli("cleanup", "--json", "--force").stdout) == {"removed": []}
    missing = cli("status", "nobody", "--json")
    assert missing.returncode == 3 and json.loads(missing.stdout)["error"]["code"] == -31021


@pytest.mark.parametrize(
    "words, code",
    [
        (("status", "nobody"), 3),
        (("status",), 3),
        (("save", "nobody", "--wait"), 3),
        (("nonsense",), 2),
        ((), 2),
        (("save", "--wait=5"), 2),
        (("save", "--wait", "30"), 3),
        (("save", "--timeout=soon"), 2),
        (("save", "--timeout=-1"), 2),
        (("save", "--timeout", "nan"), 2),
        (("save", "--timeout"), 2),
        (("rpc", "x"), 2),
        (("list", "extra"), 2),
        (("status", "--wait"), 2),
        (("ranks", "nobody"), 3),
        (("stacks", "nobody"), 3),
        (("stacks", "--timeout=601"), 2),
        (("ranks", "--timeout="), 2),
        (("abort", "--force", "nobody", "--kill-after=5"), 3),
        (("abort", "--kill-after"), 2),
        (("abort", "--kill-after="), 2),
        (("abort", "--kill-after=-1"), 2),
        (("abort", "--kill-after=5", "--wait"), 2),
        (("abort", "--kill-after=5", "--timeout=5"), 2),
        (("stop", "--kill-after=5"), 2),
    ],
)
def test_exit_codes_without_any_job(words, code):
    """Usage is 2, no such job is 3; the sentence goes to stderr, nothing to stdout, no traceback."""
    done = cli(*words)
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr and "Traceback" not in done.stderr


@pytest.mark.once
def test_exit_codes_with_jobs_that_resist(jobs_dir):
    """Refused is 1, ambiguous 2, dead and silent 4, too late 5."""
    with job_process("slow-one", step_seconds=SOON) as slow, job_process("slow-two", step_seconds=SOON):
        assert cli("status").returncode == 2 and cli("status", "slow").returncode == 3
        late = cli("save", "slow-one", "--timeout=0.2")
        why = "accepted, waiting for the end of step 1"
        said = f"save is still running ({why}); forgather-control commands slow-one shows what becomes of it\n"
        assert (late.returncode, late.stderr) == (5, said)
        assert cli("rpc", "slow-one", "cancel_command", '{"command_id":"none"}').returncode == 1
        assert cli("rpc", "slow-one", "ping", "[1]").returncode == 1
        assert cli("rpc", "slow-one", "ping", "{").returncode == cli("rpc", "slow-one", "ping", "7").returncode == 2
        slow.kill()
        assert cli("status", "slow-one").returncode == 4
    put(jobs_dir, "far")
    assert cli("status", "far").returncode == 4


def test_a_command_that_fails_is_exit_code_one():
    """A job whose loop never saves: the sentence says so, on stderr."""
    source = """
    from forgather_control import TrainingJob
    with TrainingJob("deaf") as job:
        print("ready", flush=True)
        step = 0
        while not job.should_stop:
            step += 1
            job.step(step)
            job.should_save
    """
    with Process(source) as process:
        process.line()
        done = cli("save", "deaf", "--timeout=20")
        assert done.returncode == 1 and done.stdout == "" and "did not call saved()" in done.stderr
        assert cli("stop", "deaf", "--timeout=20").returncode == 0


@pytest.mark.parametrize("verb", [("abort", "job"), ("cleanup",)])
def test_without_a_terminal_nothing_dangerous_happens_unforced(verb, jobs_dir):
    """abort and cleanup refuse where they cannot ask, whatever stdin holds."""
    with job_process("dead") as dead, running_loop():
        dead.kill()
        for stdin in (None, "y\n"):
            done = cli(*verb, stdin=stdin)
            assert done.returncode == 2 and "--force" in done.stderr
        assert (jobs_dir / "dead").exists() and cli("status", "job").returncode == 0


def on_terminal(words: list[str], answer: str) -> tuple[int, str]:
    """Run the command line on a real pseudo-terminal, and type one answer at its prompt."""
    pid, terminal = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell ignores it in what it runs in the background
        os.chdir(ROOT)
        os.execv(sys.executable, [sys.executable, "-m", "forgather_control", *words])
    shown = b""
    try:
        while b"[y/N] " not in shown:
            shown += os.read(terminal, 4096)
        if answer == "^C":
            os.write(terminal, b"\x03")
        else:
            os.write(terminal, answer.encode())
        while True:
            try:
                data = os.read(terminal, 4096)
            except OSError:  # a terminal whose last process has gone (pty(7))
                break
            if not data:
                break
            shown += data
    finally:
        _, status = os.waitpid(pid, 0)
        os.close(terminal)
    return os.waitstatus_to_exitcode(status), shown.decode()


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize("answer, code", [("n\n", 1), ("\n", 1), ("\x04", 1), ("^C", 130), ("yes\n", 0)])
def test_on_a_terminal_it_asks_first(answer, code):
    """Only yes means yes; no, nothing, end of file and Ctrl-C leave the job alone."""
    with running_loop() as run:
        got, shown = on_terminal(["abort", "job"], answer)
        assert got == code, shown
        assert "lost" in shown and "Traceback" not in shown and ("nothing was done" in shown) == (code != 0)
        assert "still carried out" not in shown
        if code == 0:
            run.thread.join(SOON)
            assert run.job.aborted
        else:
            assert not run.job.aborted and cli("status", "job").returncode == 0


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_cleanup_shows_what_it_would_remove_and_asks(jobs_dir):
    """The dead one is listed and removed on yes; live, foreign and unreadable ones stay."""
    put(jobs_dir, "far")
    put(jobs_dir, "broken", pid=-5)
    with running_loop("alive"), job_process("victim") as victim:
        victim.kill()
        code, shown = on_terminal(["cleanup"], "y\n")
        assert code == 0 and "victim" in shown and "alive" not in shown
        assert sorted(path.name for path in jobs_dir.iterdir()) == [".ended", ".lock", "alive", "broken", "far"]


@pytest.mark.once
def test_the_list_says_every_state_in_words(jobs_dir):
    """live, silent, dead and foreign; broken records are named on stderr and do not end the list."""
    put(jobs_dir, "far")
    put(jobs_dir, "broken", started_at=None)
    with running_loop("alive"), job_process("gone") as gone, job_process("frozen") as frozen:
        gone.kill()
        os.kill(frozen.pid, signal.SIGSTOP)
        done = cli("list")
        until(lambda: "silent" in cli("list").stdout)
        done = cli("list")
        os.kill(frozen.pid, signal.SIGCONT)
    assert done.returncode == 0
    states = {line.split()[1]: line.split()[0] for line in done.stdout.splitlines()[1:]}
    assert states == {"far": "foreign", "alive": "live", "gone": "dead", "frozen": "silent"}
    assert "broken" in done.stderr and "started_at" in done.stderr
    assert "\x1b" not in done.stdout, "no colours into a pipe"


def test_hostile_names_reach_no_terminal_raw(jobs_dir):
    """A host name and a metric name with escapes are shown as text."""
    put(jobs_dir, "far", host="\x1b[2Jevil\u202e")
    done = cli("list")
    assert "\x1b" not in done.stdout and "\\x1b[2Jevil\\u202e" in done.stdout
    with running_loop() as run:
        run.job.log(**{"\x1b]0;title\x07": 1.0})
        assert "\x1b" not in cli("status", "job").stdout


def test_an_ascii_terminal_gets_an_ascii_bar():
    """Where the encoding has no blocks, the bar is made of #, and nothing fails."""
    with running_loop(max_steps=50, step_seconds=0.2):
        done = cli("status", env={"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C"})
        assert done.returncode == 0 and "[" in done.stdout and done.stdout.isascii()


def test_a_reader_that_leaves_early_is_no_error():
    """``forgather control rpc JOB rpc.discover | head -c 1`` ends quietly."""
    with running_loop():
        done = subprocess.run(
            f"set -o pipefail; {sys.executable} -m forgather_control rpc job rpc.discover | head -c 1",
            shell=True,
            executable="/bin/bash",
            capture_output=True,
            text=True,
            timeout=SOON,
        )
    assert (done.stdout, done.stderr) == ("{", "")


def test_interrupted_while_waiting_it_says_that_the_command_goes_on():
    """Ctrl-C during --wait is exit code 130 and one sentence, not a traceback."""
    with job_process("slow", step_seconds=SOON):
        waiting = subprocess.Popen(
            [sys.executable, "-m", "forgather_control", "save", "slow", "--wait"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        until(lambda: json.loads(cli("rpc", "slow", "list_commands").stdout))
        waiting.send_signal(signal.SIGINT)
        out, err = waiting.communicate(timeout=SOON)
        assert (waiting.returncode, out) == (
            130,
            "",
        ) and err == "interrupted; a command that was accepted is still carried out\n"


def test_a_jobs_directory_too_deep_for_sockets_still_works(monkeypatch, jobs_dir):
    """The socket lies elsewhere, and every verb finds it."""
    deep = jobs_dir / ("d" * 60) / ("e" * 60)
    monkeypatch.setenv("FORGATHER_JOBS_DIR", str(deep))
    with running_loop():
        assert len(str(deep / "job" / "control.sock")) > MAX_PATH
        assert (deep / "job" / "control.sock").is_symlink()
        assert cli("status", "job").returncode == 0


def test_the_jobs_directory_is_chosen_by_the_environment(monkeypatch, tmp_path):
    """$FORGATHER_JOBS_DIR, else $XDG_CONFIG_HOME, else ~/.config."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert record.jobs_dir() == os.environ["FORGATHER_JOBS_DIR"]
    monkeypatch.delenv("FORGATHER_JOBS_DIR")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))
    assert record.jobs_dir() == str(tmp_path / "xdg" / "forgather" / "jobs")
    monkeypatch.delenv("XDG_CONFIG_HOME")
    assert record.jobs_dir() == str(tmp_path / ".config" / "forgather" / "jobs")


@pytest.mark.once
def test_an_unreadable_jobs_directory_is_one_sentence(monkeypatch, tmp_path):
    """A file in its place is an error for every verb, without a traceback."""
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "jobs"):
        monkeypatch.setenv("FORGATHER_JOBS_DIR", str(path))
        for words in (("list",), ("status",), ("save", "job"), ("cleanup", "--force")):
            done = cli(*words)
            said = f"the jobs directory {path} cannot be read (Not a directory)\n"
            assert (done.returncode, done.stdout, done.stderr) == (1, "", said)


@pytest.mark.parametrize("where, code", [(">&-", 0), ("2>&-", 0), (">/dev/full", 1), ("<&-", 0)])
def test_streams_that_are_closed_or_full(where, code):
    """No traceback; what cannot be printed is said on stderr, and the command is done all the same."""
    with running_loop():
        done = subprocess.run(
            f"{sys.executable} -m forgather_control status job {where}",
            shell=True,
            capture_output=True,
            text=True,
            timeout=SOON,
        )
        assert done.returncode == code and "Traceback" not in done.stdout + done.stderr, done
        assert ("lost" in done.stderr) == (code == 1)


def test_complaints_go_to_stderr_or_nowhere():
    """With stderr closed they do not turn up among the results."""
    line = f"{sys.executable} -m forgather_control status nobody 2>&-"
    done = subprocess.run(line, shell=True, capture_output=True, text=True, timeout=SOON)
    assert (done.returncode, done.stdout) == (3, "")


def test_a_name_without_end_is_cut():
    """5,000 characters of JOB are not echoed whole."""
    assert len(cli("status", "x" * 5000).stderr) < 400


def test_a_process_out_of_files_says_so_and_nothing_else():
    """With no descriptor left to ask a job, the job is not called silent, nor the command done."""
    with running_loop():
        for files in range(4, 10):
            line = f"ulimit -n {files}; {sys.executable} -m forgather_control list"
            done = subprocess.run(line, shell=True, capture_output=True, text=True, timeout=SOON)
            if "live" in done.stdout:
                break
            assert done.returncode != 0 and "silent" not in done.stdout and "is done" not in done.stderr, (files, done)
        assert (
            "Too many open files"
            in subprocess.run(
                f"ulimit -n {files - 1}; {sys.executable} -m forgather_control list",
                shell=True,
                capture_output=True,
                text=True,
                timeout=SOON,
            ).stderr
        )


@pytest.mark.once
def test_commands_are_listed_and_taken_back():
    """``commands`` shows what the job keeps, ``cancel`` takes back what is not applied, once."""
    with job_process("slow", step_seconds=SOON):
        assert cli("commands", "slow").stdout == "no commands\n"
        command_id = json.loads(cli("save", "slow", "--json", "--reason", "a \x1b why").stdout)["command_id"]
        shown = cli("commands", "slow").stdout
        assert shown.splitlines()[1].startswith(f"{command_id}  save     accepted  -")
        (listed,) = json.loads(cli("--json", "commands").stdout)
        assert (listed["command_id"], listed["state"], listed["reason"]) == (command_id, "accepted", "a \x1b why")
        assert "a \\x1b why" in shown and str(os.getpid()) not in shown
        cancelled = cli("cancel", "slow", command_id)
        assert (cancelled.returncode, cancelled.stdout) == (0, "slow: save cancelled\n")
        again = cli("cancel", command_id)
        assert (again.returncode, again.stdout) == (1, "") and "cancelled" in again.stderr
        assert cli("cancel", "slow", "none").returncode == 1


def test_a_number_behind_wait_is_a_job():
    """``save --wait 30`` names the job 30; the message says how to give up after 30 s."""
    done = cli("save", "--wait", "30")
    assert done.returncode == 3 and done.stderr.endswith("To give up waiting after 30 s, use --timeout 30\n")
    assert "--timeout" not in cli("save", "--wait", "job").stderr + cli("save", "30").stderr
    with running_loop("30") as run:
        assert cli("save", "--wait", "30").stdout.strip().endswith(run.saves[-1] if run.saves else "")


def test_a_parameter_of_a_command_is_an_option():
    """``save --evaluate no`` reaches the job as the method's parameter; another word is a usage error."""
    asked = []
    record = {"command_id": "i", "command": "save_checkpoint", "state": "accepted", "requested_at": 1.0}
    with serving_tcp(
        lambda request, sink: asked.append(request) or {**record, "job_id": "x", "protocol": 2}
    ) as control:
        way = ("--connect", f"tcp://{HERE}:{control.at[1]}", "--token-file", _token_file())
        assert cli("save", "--evaluate", "no", "--reason", "a \x1b why", *way).returncode == 0
        assert cli("save", "--evaluate=maybe", *way).returncode == 2
    (saved,) = [request.params for request in asked if request.method == "save_checkpoint"]
    assert (saved["evaluate"], saved["reason"]) == (False, "a \x1b why")


ODD = [
    None,
    7,
    "x",
    [],
    [1],
    {},
    {"job_id": 7},
    {"job_id": "x", "status": [], "global_step": "\x1b[2J", "progress": "x"},
]
ODD_RECORDS = [
    {"command_id": "i", "command": command, "state": "finished", "requested_at": 1.0, "result": result}
    for command in ("save_checkpoint", "abort", "\x1b[2J", "evaluate")
    for result in (None, {}, {"metrics": 7, "step": [], "seconds": {}, "path": ["\x1b"]})
]


@pytest.mark.parametrize("answer", [*ODD, *ODD_RECORDS, [{"rank": 0}], [{"rank": "x"}], [{"command": 1}]], ids=ascii)
def test_no_answer_gets_out_as_a_traceback(answer, capsys):
    """Whatever the other side sends, each verb shows it or ends in one sentence; nothing reaches the terminal raw."""
    with serving_tcp(lambda request, sink: {"job_id": "x"} if request.method == "authenticate" else answer) as control:
        way = ("--connect", f"tcp://{HERE}:{control.at[1]}", "--token-file", _token_file())
        for words in (["status"], ["commands"], ["cancel", "i"], ["save"], ["abort", "--force"], ["ranks"], ["stacks"],
                      ["rpc", "x", "new", '{"wait":"finished"}'], ["list"]):  # fmt: skip
            there = ("--remote", *way[1:]) if words == ["list"] else way
            code, out, err = run(capsys, *words, *there)
            assert code in (0, 1, 4) and "\x1b" not in out + err and err.count("\n") <= 2, words


# Slow and stuck jobs...


def run(capsys, *words: str) -> tuple[int, str, str]:
    """The command line in this process: its code, stdout and stderr."""
    code = command_line.main(list(words))
    return code, *capsys.readouterr()


def test_ranks_shows_who_is_behind_and_who_is_gone(jobs_dir):
    """A table of what the job answered; a silent rank whose process is gone is absent; --json is one text."""
    with ranks(WAITS) as ((dead,), others):
        dead.kill()
        told = [row(0, "answering", step=7, seconds_since_step=0.5, device="cpu"), row(1), row(2, "answering", step=5)]
        with answering(jobs_dir, told, others):
            done = cli("ranks", "job")
            assert done.returncode == 0 and done.stderr == ""
            lines = done.stdout.splitlines()
            assert [line.split()[:4] for line in lines[1:4]] == [
                ["0", "node", "1", "answering"], ["1", "node", "1", "absent"], ["2", "node", "1", "answering"],
            ]  # fmt: skip
            assert lines[4:] == ["behind, by 2 at most: rank 2", "gone: rank 1"]
            told[1]["state"] = "absent"
            assert json.loads(cli("ranks", "job", "--json").stdout) == told


def test_the_time_out_reaches_the_job(jobs_dir, capsys):
    """--timeout is the job's for its ranks, and the client waits longer than that."""
    asked = []
    known = publish(jobs_dir, [RankRecord.of(0, current_process(), None)])
    with serving(known.socket, lambda request, sink: asked.append((request.method, request.params)) or []):
        assert run(capsys, "ranks", "job")[0] == 0
        assert run(capsys, "stacks", "job", "--timeout", "0.5")[0] == 4, "nothing to show"
    assert asked == [("ranks", {"timeout": 5.0}), ("stacks", {"timeout": 0.5})]


def test_stacks_of_a_rank_that_does_not_answer_are_read_from_here(jobs_dir, capsys):
    """Rank by rank, each under its name; a rank that cannot be reached is named on stderr and delays no other."""
    with ranks(WAITS) as (_, others):
        told = [row(0, "answering", stacks="Thread\n  one\x1b[2J\n"), row(1), row(2)]
        with answering(jobs_dir, told, others):
            code, out, err = run(capsys, "stacks", "job")
            assert code == 0 and "\x1b" not in out
            assert out.startswith("rank 0, pid 1 on node, answering\nThread\n  one\\x1b[2J\n\nrank 1, ")
            assert "MainThread" in out and out.endswith("rank 2, pid 1 on node, silent\n  no stacks\n")
            assert err == "rank 2: it does not answer, and its process has no stack dumper\n"
            rows = json.loads(run(capsys, "stacks", "job", "--json")[1])
            assert [bool(one["stacks"]) for one in rows] == [True, True, False]


def test_stacks_of_a_job_that_keeps_the_interpreter_lock(jobs_dir, impatient, capsys):
    """Rank 0 does not answer: its stacks are read from outside and show where it hangs; it continues after that."""
    path = jobs_dir / "job" / "control.sock"
    path.parent.mkdir(parents=True)
    with ranks(LISTENS.format(path=str(path)) + KEEPS, WAITS) as ((first, _), records):
        publish(jobs_dir, records)
        until(path.exists)
        code, out, err = run(capsys, "stacks", "job", "--timeout=0.1")
        assert code == 0 and "in hold_the_lock_in_c" in out and out.count("MainThread") == 1
        assert "what can be seen from here" in err
        code, out, err = run(capsys, "ranks", "job", "--timeout=0.1")
        assert code == 4 and "no answer in time: ranks 0, 1" in out and str(first.pid) in out
        first.say("go on")
        assert first.line() == "unhurt"


def test_a_job_without_ranks_json_has_nothing_to_read(jobs_dir, impatient, capsys):
    """Where no stacks can be had at all, that is exit code 4, with the reason."""
    path = jobs_dir / "job" / "control.sock"
    path.parent.mkdir(parents=True)
    with ranks(LISTENS.format(path=str(path)) + WAITS) as (_, records):
        publish(jobs_dir, records, ranks_file_too=False)
        until(path.exists)
        code, out, err = run(capsys, "stacks", "job", "--timeout=0.1")
        assert code == 4 and "no stacks" in out and "has no stack dumper" in err


def test_abort_kills_what_does_not_end(jobs_dir, impatient, capsys):
    """A real job whose step never ends: after the deadline its process gets SIGTERM and ends; exit code 0."""
    with job_process("stuck", step_seconds=SOON) as stuck:
        code, out, err = run(capsys, "abort", "stuck", "--force", "--kill-after=0.1")
        assert code == 0 and "ended after SIGTERM" in out and str(stuck.pid) in out
        assert err == "stuck did not end within 0.1 s\n"
        assert stuck.popen.wait(SOON) == -signal.SIGTERM
    assert run(capsys, "abort", "stuck", "--force", "--kill-after=0.1")[0] == 4, "it is dead already"
    assert run(capsys, "cleanup", "--force")[1].endswith("removed 1 of 1\n")


def test_abort_that_need_not_kill_is_an_abort(capsys):
    """A job that reaches its next step ends by itself, with the usual output; --json prints the record."""
    with running_loop() as one:
        code, out, err = run(capsys, "abort", "job", "--force", "--kill-after=20")
        assert (code, err) == (0, "") and out.startswith("job: ended at step ")
        one.thread.join(SOON)
        assert one.job.aborted
    with running_loop():
        code, out, err = run(capsys, "abort", "job", "--force", "--kill-after=20", "--json")
        assert json.loads(out)["state"] == "finished"


def test_abort_tells_each_process_its_fate(jobs_dir, impatient, capsys):
    """Deaf, on another host, not recorded: each is named, and what is left of the job makes the exit code 4."""
    with ranks(DEAF + WAITS, WAITS) as ((deaf, other), records):
        assert deaf.line() == "deaf"
        far = RankRecord.of(2, records[1].identity._replace(host="far\x1b[2J"), None)
        publish(jobs_dir, [*records, far], world_size=4)
        code, out, err = run(capsys, "abort", "job", "--force", "--kill-after=0")
        assert code == 4 and [line.partition(": ")[2] for line in out.splitlines()] == [
            "killed by SIGKILL, 10 s after SIGTERM", "ended after SIGTERM", "not reached: it runs on another host",
        ]  # fmt: skip
        assert "\x1b" not in out and "1 more of its processes are not recorded" in err
        assert (deaf.popen.wait(SOON), other.popen.wait(SOON)) == (-9, -15)


def test_abort_by_force_as_json(jobs_dir, impatient, capsys):
    """One JSON text: why the abort itself did not do, and what became of each process."""
    with ranks(WAITS) as ((one,), records):
        publish(jobs_dir, records)
        code, out, _ = run(capsys, "abort", "job", "--force", "--kill-after=0", "--json")
        told = json.loads(out)
        assert code == 0 and told["error"]["code"] == -31024
        assert told["processes"] == [{"rank": 0, "host": records[0].host, "pid": one.pid, "outcome": "ended"}]


def test_abort_that_may_kill_refuses_without_a_terminal(jobs_dir):
    """Nobody to ask, and no --force: usage, and no process is touched."""
    with ranks(WAITS) as ((one,), records):
        publish(jobs_dir, records)
        done = cli("abort", "job", "--kill-after=0", stdin="y\n")
        assert done.returncode == 2 and "--force" in done.stderr and one.popen.poll() is None


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize("answer, code", [("n\n", 1), ("y\n", 0)])
def test_abort_that_may_kill_asks_once_and_says_so(jobs_dir, answer, code):
    """The question says what will be lost, what will be killed and when; no means no."""
    with ranks(WAITS) as ((one,), records):
        publish(jobs_dir, records)
        got, shown = on_terminal(["abort", "job", "--kill-after=0.5"], answer)
        assert got == code, shown
        assert (
            "lost" in shown and "get SIGTERM after 0.5 s, and SIGKILL 10 s later" in shown and shown.count("[y/N]") == 1
        )
        # A process can be a zombie, and so count as ended, before its last thread has gone and it can be reaped.
        assert one.popen.poll() is None if code == 1 else until(lambda: one.popen.poll() is not None)


def test_the_new_verbs_cost_others_nothing():
    """What only they need is loaded only by them; so is what only --ssh needs, and what no verb needs to start."""
    source = """
    import sys
    before = set(sys.modules)
    from forgather_control.cli import main as cli
    cli.main(["status", "nobody"])
    others = {"recovery", "stack_dump", "rank_processes", "ssh", "stdio_proxy", "file_transport", "cleanup"}
    loaded = {name.rpartition(".")[2] for name in sys.modules if name.startswith("forgather_control.")}
    unneeded = {"shutil", "logging", "signal", "subprocess", "threading", "dataclasses"} - before
    print("main" in loaded, others & loaded, unneeded & sys.modules.keys(), flush=True)
    """
    with Process(source) as other:
        assert other.line() == "True set() set()", other.errors


def test_the_start_compiles_no_annotation():
    """A named tuple compiles each annotation that is a string: for all of ours that is a tenth of the start."""
    source = """
    import typing
    typing.ForwardRef.__init__ = None
    import forgather_control.cli.main
    print("loaded", flush=True)
    """
    with Process(source) as process:
        assert process.line() == "loaded", process.errors


def test_a_real_job_shows_its_rank_and_its_stacks():
    """The real controller, one process: one rank that answers, and its training thread's stack first."""
    with job_process("real") as job:
        rows = json.loads(cli("ranks", "real", "--json").stdout)
        assert [(one["rank"], one["pid"], one["state"]) for one in rows] == [(0, job.pid, "answering")]
        assert rows[0].keys() >= {"host", "step", "seconds_since_step", "rss_bytes", "device", "device_memory_bytes"}
        done = cli("stacks", "real")
        assert done.returncode == 0 and "MainThread" in done.stdout.splitlines()[1]
        assert "forgather-control" not in done.stdout and "forgather-control" in cli("stacks", "--internal").stdout


def test_a_real_job_that_keeps_the_interpreter_lock(impatient, capsys):
    """It hangs in C and does not answer: its stacks show where, and abort --kill-after ends it."""
    source = """
    import ctypes
    from forgather_control import TrainingJob
    with TrainingJob("held") as job:
        job.step(1)
        print("ready", flush=True)
        ctypes.PyDLL(None).read(0, ctypes.create_string_buffer(1), 1)
    """

    def hangs():
        try:
            with connect("held", timeout=0.2) as one:
                one.call("ping")
        except JobNotAnswering:
            return True

    with Process(source) as job:
        assert job.line() == "ready"
        until(hangs)
        code, out, _ = run(capsys, "stacks", "held", "--timeout=0.1")
        assert code == 0 and '"<string>", line 7 in <module>' in out
        code, out, _ = run(capsys, "abort", "held", "--force", "--kill-after=0")
        assert code == 0 and job.popen.wait(SOON) == -signal.SIGTERM


def test_a_real_job_takes_its_ranks_json_away(jobs_dir):
    """It is there while the job lives, for its owner alone, and goes with it."""
    with running_loop():
        path = jobs_dir / "job" / "ranks.json"
        until(path.exists)
        assert path.stat().st_mode & 0o777 == 0o600
    assert not path.exists()


# Over TCP...

HERE = "127.0.0.1"


@pytest.fixture
def remote(tmp_path, monkeypatch):
    """A job with a port, its address and a file with its token; the jobs directory is then another, empty one."""
    with running_loop("far", port=0) as run:
        known = json.loads((Path(os.environ["FORGATHER_JOBS_DIR"]) / "far" / "endpoint.json").read_text())
        run.token, run.at = known["token"], f"tcp://{HERE}:{known['port']}"
        (tmp_path / "token").write_text(run.token + "\n")
        monkeypatch.setenv("FORGATHER_JOBS_DIR", str(tmp_path / "elsewhere"))
        yield run


def test_every_verb_works_over_a_port(remote, tmp_path, capsys):
    """status, list, save, ranks, stacks, rpc, stop; the token out of a file."""
    way = ("--connect", remote.at, "--token-file", str(tmp_path / "token"))
    until(lambda: remote.steps)
    code, out, err = run(capsys, "status", *way)
    assert (code, err) == (0, "") and out.startswith("far  training")
    code, out, err = run(capsys, "save", "far", "--timeout=20", *way)
    assert code == 0 and out.startswith("far: saved at step "), err
    code, out, _err = run(capsys, "save", "--timeout=20", *way)
    assert code == 0 and out.startswith(f"{remote.at}: saved at step ")
    assert json.loads(run(capsys, "ranks", "--json", *way)[1])[0]["state"] == "answering"
    assert "MainThread" in run(capsys, "stacks", *way)[1]
    assert json.loads(run(capsys, "rpc", "far", "ping", *way)[1])["job_id"] == "far"
    code, out, _err = run(capsys, "list", "--remote", remote.at.removeprefix("tcp://"), *way[2:])
    assert code == 0 and out.splitlines()[0].startswith("STATE") and remote.token not in out
    assert remote.token not in run(capsys, "list", "--json", "--remote", remote.at, *way[2:])[1]
    code, _out, err = run(capsys, "abort", "far", "--force", "--kill-after=5", *way)
    assert code == 2 and "--kill-after" in err
    code, _out, err = run(capsys, "abort", "other", "--force", *way)
    assert code == 3 and "Another job answers" in err
    code, out, _err = run(capsys, "stop", "--timeout=20", *way)
    assert code == 0 and "ended at step" in out and not remote.job.aborted


@pytest.mark.once
def test_the_token_may_come_from_the_environment(remote, monkeypatch, capsys):
    """And a file goes before it."""
    monkeypatch.setenv("FORGATHER_CONTROL_TOKEN", remote.token)
    assert run(capsys, "status", "--connect", remote.at)[0] == 0
    monkeypatch.setenv("FORGATHER_CONTROL_TOKEN", "wrong")
    code, out, err = run(capsys, "status", "--connect", remote.at)
    assert (code, out) == (1, "") and "not the job's token" in err and remote.token not in err
    code, out, err = run(capsys, "status", "--json", "--connect", remote.at)
    assert code == 1 and json.loads(out)["error"]["code"] == -31025


def test_without_a_token_it_says_where_one_may_come_from(remote, capsys):
    """Before anything is connected to."""
    code, _out, err = run(capsys, "status", "--connect", remote.at)
    assert code == 2 and "--token-file" in err and "FORGATHER_CONTROL_TOKEN" in err and "endpoint.json" in err


@pytest.mark.parametrize("verb", [("status",), ("save", "x"), ("rpc", "x", "ping"), ("list",)])
def test_who_cannot_be_reached_is_exit_code_four(verb, monkeypatch, capsys):
    """Nobody listens, and no such host."""
    monkeypatch.setenv("FORGATHER_CONTROL_TOKEN", "any")
    with socket.create_server((HERE, 0)) as sock:
        port = sock.getsockname()[1]
    option = "--remote" if verb == ("list",) else "--connect"
    for at, said in (
        (f"tcp://{HERE}:{port}", "Nothing listens"),
        ("tcp://no.such.host.invalid:1", "cannot be reached"),
    ):
        code, out, err = run(capsys, *verb, option, at)
        assert (code, out) == (4, "") and said in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "words",
    [
        ("status", "--connect", "nonsense"),
        ("status", "--connect", "tcp://host"),
        ("status", "--connect", "tcp://host:99999"),
        ("status", "--connect", "http://host:1"),
        ("status", "--connect", "tcp://host:" + "9" * 5000),
        ("status", "--connect", ""),
        ("save", "--connect="),
        ("list", "--remote", "host"),
        ("list", "--remote", "host:0"),
        ("list", "--remote", "http://host:1"),
        ("status", "--token-file", "/no/such/file"),
        ("status", "--token-file", "/dev/null"),
        ("status", "--token-file", "/"),
    ],
)
def test_what_cannot_be_meant_is_a_usage_error(words, capsys):
    """Addresses that are none, files without a token."""
    with pytest.raises(SystemExit) as caught:
        command_line.main(list(words))
    said = capsys.readouterr()
    assert caught.value.code == 2 and said.out == "" and "Traceback" not in said.err and len(said.err) < 2000


def test_a_token_file_without_end_is_not_read_whole(capsys):
    """/dev/zero has no first line."""
    assert run(capsys, "status", "--connect", f"tcp://{HERE}:1", "--token-file", "/dev/zero")[0] in (1, 4)


@pytest.mark.parametrize(
    "rows",
    [
        None,
        {},
        "rows",
        [None],
        [{}],
        [[]],
        [{**RECORD, "state": "live", "started_at": "now"}],
        [{**RECORD, "state": "live", "started_at": 1e300}],
        [{**RECORD, "state": "\x1b[2J"}],
        [{**RECORD, "state": ["live"]}],
        [{**RECORD, "state": "live", "job_id": "../x"}],
        [{**RECORD, "state": "live", "port": "\x1b[2J"}],
        [{**RECORD, "state": "live", "launch": 7}],
    ],
)
def test_a_hostile_list_is_one_sentence(rows, capsys):
    """Whatever the other side sends, no traceback and nothing raw on the terminal."""
    with serving_tcp(lambda request, sink: rows if request.method == "list_jobs" else {"job_id": "x"}) as control:
        at = f"{HERE}:{control.at[1]}"
        code, out, err = run(capsys, "list", "--remote", at, "--token-file", _token_file())
    assert (code, out) == (1, "") and err == "the other side sent no list of jobs\n"


def _token_file() -> str:
    path = Path(os.environ["FORGATHER_JOBS_DIR"]).parent / "token"
    path.write_text(TOKEN)
    return str(path)


def test_a_list_from_elsewhere_is_shown_as_ours(capsys):
    """The states that a job knows of its neighbours, hostile names made safe."""
    rows = [{**RECORD, "state": "running"}, {**RECORD, "state": "live", "host": "\x1b[2J", "port": 8900}]
    with serving_tcp(lambda request, sink: rows if request.method == "list_jobs" else {"job_id": "x"}) as control:
        at = f"{HERE}:{control.at[1]}"
        code, out, err = run(capsys, "list", "--remote", at, "--token-file", _token_file())
        assert (code, err) == (0, "") and "\x1b" not in out
        assert [line.split()[0] for line in out.splitlines()] == ["STATE", "running", "live"]
        assert json.loads(run(capsys, "list", "--json", "--remote", at, "--token-file", _token_file())[1]) == rows


def test_the_token_is_no_argument():
    """Nobody reads it in the list of processes, because there is no option to type it."""
    for verb in ("status", "save", "list", "rpc"):
        words = cli(verb, "--help").stdout
        assert "--token-file FILE" in words and "--token " not in words
