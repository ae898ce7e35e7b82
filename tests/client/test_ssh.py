"""Jobs of another host over ssh: a real sshd on this one, with keys and a configuration of its own."""

from __future__ import annotations

import json
import os
import pty
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from forgather_control import connect
from forgather_control.client import limits, ssh
from forgather_control.errors import (
    AmbiguousJob,
    FindError,
    InvalidParams,
    JobDead,
    JobNotAnswering,
    MethodNotFound,
    NoSuchJob,
    NotAuthenticated,
)

from ..support.harness import ROOT, SOON, Process, cli, descriptors, job_process, needs, running_loop, until

pytestmark = [pytest.mark.once, needs("sshd"), needs("ssh"), needs("ssh-keygen")]

SSHD = """
ListenAddress 127.0.0.1
Port {port}
HostKey {folder}/host
AuthorizedKeysFile {folder}/authorized
StrictModes no
UsePAM no
PidFile none
PermitRootLogin yes
PasswordAuthentication no
KbdInteractiveAuthentication no
AcceptEnv FORGATHER_JOBS_DIR PYTHONPATH
# Where no shell finds anything of ours to read first.
SetEnv HOME={folder}
"""

CONFIG = """
Host box
    HostName 127.0.0.1
    Port {port}
    IdentityFile {folder}/key
Host locked
    HostName 127.0.0.1
    Port {port}
    IdentityFile {folder}/locked
Host noisy
    HostName 127.0.0.1
    Port {port}
    IdentityFile {folder}/noisy
Host stranger
    HostName 127.0.0.1
    Port {port}
    IdentityFile {folder}/stranger
Host unknown
    HostName 127.0.0.1
    Port {port}
    UserKnownHostsFile /dev/null
    StrictHostKeyChecking yes
Host nobody-there
    HostName 127.0.0.1
    Port 1
Host *
    IdentitiesOnly yes
    IdentityAgent none
    KexAlgorithms curve25519-sha256
    UserKnownHostsFile {folder}/known
"""

#: What a shell's start may print: lines, half a line, an error's beginning, bytes that are no text.
NOISE = r"""echo welcome; echo hm >&2; printf '\\377[{\"error\": {\"code\": 1}}'; eval \"$SSH_ORIGINAL_COMMAND\""""


class Box(NamedTuple):
    """The other host."""

    folder: Path
    sshd: int

    def sessions(self) -> list[psutil.Process]:
        """The processes that sshd runs for its sessions."""
        return psutil.Process(self.sshd).children()

    def bridges(self) -> list[psutil.Process]:
        """The ends of connections there."""
        return [
            process
            for session in self.sessions()
            for process in session.children(recursive=True)
            if "dial-stdio" in process.cmdline()[-5:]
        ]


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    """A real sshd, with the rights of the user who runs the tests."""
    folder = tmp_path_factory.mktemp("ssh")
    for name, phrase in (("host", ""), ("key", ""), ("locked", "open sesame"), ("noisy", ""), ("stranger", "")):
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", phrase, "-f", folder / name], check=True, timeout=SOON
        )
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    key, locked, noisy = ((folder / f"{name}.pub").read_text() for name in ("key", "locked", "noisy"))
    (folder / "authorized").write_text(f'{key}{locked}command="{NOISE}" {noisy}')
    (folder / "known").write_text(f"[127.0.0.1]:{port} {(folder / 'host.pub').read_text()}")
    (folder / "sshd_config").write_text(SSHD.format(port=port, folder=folder))
    (folder / "config").write_text(CONFIG.format(port=port, folder=folder))
    if os.geteuid() == 0:
        os.makedirs("/run/sshd", mode=0o755, exist_ok=True)  # where sshd locks up what talks to strangers
    program = shutil.which("sshd")
    assert program is not None
    with open(folder / "log", "wb") as log:
        sshd = subprocess.Popen([program, "-D", "-e", "-f", folder / "sshd_config"], stderr=log)
    try:
        until(lambda: b"listening" in (folder / "log").read_bytes() or sshd.poll() is not None)
        assert sshd.poll() is None, (folder / "log").read_text()
        yield Box(folder, sshd.pid)
    finally:
        sshd.terminate()
        sshd.wait(SOON)


@pytest.fixture
def box(started: Box, jobs_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Box]:
    """The same, with this test's jobs directory there; at the end all sessions are closed."""
    python = shlex.join(["env", f"FORGATHER_JOBS_DIR={jobs_dir}", f"PYTHONPATH={ROOT}", sys.executable])
    monkeypatch.setenv(ssh.REMOTE, f"{python} -m forgather_control")
    monkeypatch.setenv(ssh.PROGRAM, shlex.join(["ssh", "-F", str(started.folder / "config")]))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    yield started
    until(lambda: not started.sessions())
    assert [process.pid for process in psutil.Process().children()] == [started.sshd]


def over(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
    """``forgather control --ssh box WORDS``, on a host that has no jobs itself."""
    return cli("--ssh", "box", *words, env={"FORGATHER_JOBS_DIR": "/nowhere", **env})


def waiting(job: str) -> subprocess.Popen[str]:
    """A client that waits for a save over ssh; the job has accepted it."""
    client = subprocess.Popen(
        [sys.executable, "-m", "forgather_control", "--ssh", "box", "save", job, "--wait"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with connect(job) as here:
        until(lambda: here.call("list_commands"))
    return client


# What works...


def test_every_verb_works_from_a_host_without_jobs(box):
    """list, status, save --wait, stacks, rpc, stop: as on the job's own host, which may name the job."""
    with running_loop() as run:
        until(lambda: run.steps)
        listed = over("list").stdout.splitlines()
        assert listed[1].split()[:2] == ["live", "job"] and re.search(r"\d+/\d+ ", listed[1]), "with its step"
        assert over("status", "job").stdout.startswith("job  training\n")
        saved = over("save", "job", "--timeout=20")
        assert (saved.returncode, saved.stderr) == (0, "") and saved.stdout.strip().endswith(run.saves[0])
        assert "MainThread" in over("stacks").stdout
        assert json.loads(cli("rpc", "job", "ping", "--ssh", "box").stdout)["job_id"] == "job"
        assert over("stop").stdout == "job: stop accepted\n"
        run.thread.join(SOON)
        assert not run.thread.is_alive()


def test_several_jobs_of_that_host(box):
    """Patterns and --all mean the jobs there, each over a connection of its own."""
    with running_loop("run1") as one, running_loop("run2") as two, running_loop("other") as other:
        done = over("save", "run*", "no-such", "--timeout=20")
        assert done.returncode == 3 and done.stdout.endswith("save of 3 jobs: 2 finished, 1 not found\n")
        assert done.stderr.startswith("no-such: box: No job 'no-such'")
        assert (len(one.saves), len(two.saves), len(other.saves)) == (1, 1, 0)
        assert over("status", "--all", "--parallel=2").stdout.endswith("status of 3 jobs: 3 answered\n")
        assert over("stop", "other", "run1").returncode == 2 and not one.job.should_stop
        done = over("stop", "--all", "--force", "--timeout=20")
        assert (done.returncode, done.stderr) == (0, "") and done.stdout.endswith("stop of 3 jobs: 3 finished\n")
    assert over("stop", "--all", "--force").returncode == 3


def test_what_a_job_left_there(box):
    """status and events of a job that has ended, as on its own host; of one that never was, the other side's error."""
    with running_loop() as run:
        until(lambda: run.steps)
        over("stop", "job", "--timeout=20")
    shown = over("status", "job")
    assert shown.returncode == 0 and shown.stdout.startswith("job  has ended: stopped at ")
    told = json.loads(over("status", "job", "--json").stdout)
    assert told == json.loads(cli("status", "job", "--json").stdout) and told["ended"]["how"] == "stopped"
    for words in (["--since=1h"], ["--json"], ["--follow"]):
        here, there = cli("events", "job", *words), over("events", "job", *words)
        assert there.stdout == here.stdout and "started" in here.stdout and "ended" in here.stdout
        assert there.stderr == here.stderr and here.stderr.startswith("job has ended: stopped at ")
    for verb in ("status", "events"):
        done = over(verb, "nobody")
        assert done.returncode == 3 and done.stdout == "" and done.stderr.startswith("box: No job 'nobody'")


def test_list_as_json_and_what_was_left_out(box, jobs_dir):
    """The other side's JSON and its complaints arrive; an empty list says whose it is."""
    assert over("list").stdout == "no jobs on box\n"
    (jobs_dir / "broken").mkdir(parents=True)
    (jobs_dir / "broken" / "endpoint.json").write_text("{}")
    with running_loop():
        done = over("list", "--json")
        (row,) = json.loads(done.stdout)
        assert (row["job_id"], row["state"]) == ("job", "live") and "left out broken" in done.stderr


def test_one_connection_for_many_calls_leaves_nothing_behind(box):
    """connect(ssh=): calls, an error of the job's own class, and then no process, thread or descriptor more."""
    with running_loop():
        before = descriptors(), threading.active_count(), len(psutil.Process().children())
        with connect("job", ssh="box") as job:
            for _ in range(20):
                assert job.call("ping")["job_id"] == "job"
            with pytest.raises(MethodNotFound):
                job.call("nosuch")
            assert job.command("save_checkpoint", wait="finished").result["path"]
            with pytest.raises(InvalidParams):
                job.call("status", unknown=1)
            assert len(box.bridges()) == 1
        job.close()  # twice is once
        # The job in this process opens a file now and then.
        until(lambda: (descriptors(), threading.active_count(), len(psutil.Process().children())) == before)
        until(lambda: not box.sessions())


def test_the_program_is_found_on_the_path_there(box, monkeypatch, tmp_path, jobs_dir):
    """Without a word of ours: forgather-control, else python3 -m forgather_control."""
    monkeypatch.delenv(ssh.REMOTE)
    settings = f"FORGATHER_JOBS_DIR={jobs_dir} PYTHONPATH={ROOT}"
    monkeypatch.setenv(ssh.PROGRAM, f'{os.environ[ssh.PROGRAM]} -o "SetEnv {settings}"')
    monkeypatch.setattr(ssh, "_FIND", f"PATH={tmp_path}; {ssh._FIND}")  # a path on which only this test puts anything
    with running_loop():
        with pytest.raises(FindError, match="forgather-control is not found on box"):
            connect("job", ssh="box")
        for name, words in (("python3", ""), ("forgather-control", "-m forgather_control ")):
            script = tmp_path / name
            script.write_text(f'#!/bin/sh\necho {name} >>{tmp_path}/used\nexec {sys.executable} {words}"$@"\n')
            script.chmod(0o755)
            with connect("job", ssh="box") as job:
                assert job.call("ping")["job_id"] == "job"
    assert (tmp_path / "used").read_text().split() == ["python3", "forgather-control"]


def test_what_a_shell_prints_at_its_start_confuses_nobody(box):
    """It is skipped before the bridge's line, before a list, and before an error."""
    with running_loop():
        with connect("job", ssh="noisy") as job:
            assert job.call("ping")["job_id"] == "job"
        assert ssh.list_jobs("noisy", SOON)[0][0]["job_id"] == "job"
        with pytest.raises(NoSuchJob):
            connect("nobody", ssh="noisy")


def test_noise_without_end_is_given_up(box, monkeypatch):
    """A shell that prints without end is given up."""
    monkeypatch.setenv(ssh.REMOTE, "yes #")
    with pytest.raises(FindError, match="prints without end"):
        connect("job", ssh="box")


def test_a_shared_connection_is_used(box, monkeypatch, jobs_dir):
    """ControlMaster: the one in the background keeps our stderr open, and the client does not wait for its end."""
    control = ["-o", "ControlMaster=auto", "-o", "ControlPersist=60", "-o", f"ControlPath={jobs_dir.parent}/%C"]
    words = [*shlex.split(os.environ[ssh.PROGRAM]), *control]
    monkeypatch.setenv(ssh.PROGRAM, shlex.join(words))
    with running_loop():
        try:
            for _ in range(2):
                with connect("job", ssh="box") as job:
                    assert job.call("ping")["job_id"] == "job"
            assert len(box.sessions()) == 1
        finally:
            subprocess.run([*words, "-O", "exit", "box"], capture_output=True, timeout=SOON)


# What does not...


def test_errors_of_the_other_side_are_the_same_here(box):
    """No such job, several, dead: class, exit code and facts, and whose side it was."""
    with job_process("one") as one, job_process("other"):
        with pytest.raises(NoSuchJob, match=r"^box: No job 'nobody'"):
            connect("nobody", ssh="box")
        with pytest.raises(AmbiguousJob, match=r"^box: Several jobs are live") as found:
            connect(ssh="box")
        assert sorted(found.value.data["candidates"]) == ["one", "other"]
        done = over("status", "--json")
        assert done.returncode == 2 and json.loads(done.stdout)["error"]["code"] == AmbiguousJob.code
        one.kill()
        with pytest.raises(JobDead, match=r"^box: Job one is dead"):
            connect("one", ssh="box")
        assert over("status", "one").returncode == 4


@pytest.mark.parametrize(
    "host, kind, said",
    [
        ("nobody-there", JobNotAnswering, r"cannot be reached over ssh \(.*refused"),
        ("stranger", NotAuthenticated, r"cannot log in to stranger \(.*Permission denied"),
        ("unknown", NotAuthenticated, r"cannot log in to unknown \(Host key verification failed"),
        ("no-such-host.invalid", JobNotAnswering, r"cannot be reached over ssh \(.*resolve"),
    ],
)
def test_a_host_that_cannot_be_entered(box, host, kind, said):
    """The last line of ssh says why, in brackets; without a terminal no question is asked."""
    with pytest.raises(kind, match=said):
        connect("job", ssh=host)


@pytest.mark.parametrize(
    "there, said",
    [
        ("/opt/none/forgather-control", r"is not found on box \(.*No such file.*set FORGATHER_CONTROL_REMOTE"),
        (f"{sys.executable} -I -S -m forgather_control", "is not found on box .*install it there"),
        ("exit 5;", "does not start on box$"),
        (r"printf 'broken \033]0;x\007\n' >&2; exit 1;", r"does not start on box \(broken \\x1b\]0;x\\x07\)$"),
        ("true", "does not start on box$"),
    ],
)
def test_a_program_that_is_missing_or_another(box, monkeypatch, there, said):
    """It says what is missing where, and what to do; nothing of it reaches a terminal raw."""
    monkeypatch.setenv(ssh.REMOTE, there)
    with pytest.raises(FindError, match=said):
        connect("job", ssh="box")


def test_a_list_from_a_program_that_is_missing(box, monkeypatch):
    """The same sentence as for a job."""
    monkeypatch.setenv(ssh.REMOTE, "/opt/none/forgather-control")
    with pytest.raises(FindError, match="is not found on box"):
        ssh.list_jobs("box", SOON)


def test_a_missing_ssh_is_one_sentence(box, monkeypatch):
    """So is one that cannot be read as words."""
    monkeypatch.setenv(ssh.PROGRAM, "/opt/none/ssh")
    with pytest.raises(FindError, match="cannot be run here"):
        connect("job", ssh="box")
    monkeypatch.setenv(ssh.PROGRAM, "ssh 'half")
    with pytest.raises(InvalidParams, match=ssh.PROGRAM):
        connect("job", ssh="box")


def test_a_list_that_is_none(box, monkeypatch):
    """Another program there, which succeeds at printing something else."""
    for there in ("echo no list #", "echo '[7]' #"):
        done = over("list", **{ssh.REMOTE: there})
        assert done.returncode == 1 and "no list of jobs" in done.stderr and "Traceback" not in done.stderr


def test_a_login_that_does_not_end_is_given_up(box, monkeypatch):
    """The deadline holds for all that happens there, and the ssh is ended."""
    monkeypatch.setattr(limits, "SSH_START", 0.0)
    monkeypatch.setattr(limits, "SSH_TYPING", 0.0)
    monkeypatch.setenv(ssh.REMOTE, "cat >/dev/null; exit;")
    for reach in (lambda: connect("job", 0.3, ssh="box"), lambda: ssh.list_jobs("box", 0.3)):
        with pytest.raises(JobNotAnswering, match="does not answer over ssh in time"):
            reach()


def test_a_link_that_breaks_off_is_not_a_job_that_died(box):
    """sshd's session is killed while the client waits: exit code 4, what is not known, and the job trains on."""
    with job_process("slow", step_seconds=SOON):
        with waiting("slow") as client:
            (session,) = box.sessions()
            (bridge,) = box.bridges()
            session.kill()
            out, err = client.communicate(timeout=SOON)
        assert (client.returncode, out) == (4, "")
        assert err.startswith("The ssh connection to box broke off (") and "before job slow answered" in err
        assert err.endswith("whether its save was carried out is not known\n")
        until(lambda: not bridge.is_running())
        assert cli("status", "slow").returncode == 0


def test_a_job_that_dies_meanwhile_is_called_so(box):
    """Its end comes through the bridge, which ends well: the link was not at fault."""
    with job_process("slow", step_seconds=SOON) as job, waiting("slow") as client:
        job.kill()
        out, err = client.communicate(timeout=SOON)
        assert (client.returncode, out) == (4, "") and err.startswith(
            "Job slow closed the connection before it answered"
        )


def test_interrupted_it_leaves_nothing_running(box):
    """Ctrl-C reaches the client alone: exit code 130, one sentence; ssh, session and bridge go, the job stays."""
    with job_process("slow", step_seconds=SOON):
        with waiting("slow") as client:
            (link,) = psutil.Process(client.pid).children()
            (bridge,) = box.bridges()
            client.send_signal(signal.SIGINT)
            out, err = client.communicate(timeout=SOON)
        assert (client.returncode, out) == (130, "")
        assert err == "interrupted; a command that was accepted is still carried out\n"
        until(lambda: not link.is_running() and not bridge.is_running())
        assert cli("status", "slow").returncode == 0


def test_killed_it_leaves_nothing_running(box):
    """A client that gets no time to close anything: ssh and the bridge go all the same, the job stays."""
    with job_process("slow", step_seconds=SOON):
        with waiting("slow") as client:
            (link,) = psutil.Process(client.pid).children()
            (bridge,) = box.bridges()
            client.kill()
        until(lambda: not link.is_running() and not bridge.is_running())
        assert cli("status", "slow").returncode == 0


# A person at a terminal...


def typed(words: list[str], prompt: bytes, answer: bytes) -> tuple[int, str]:
    """Run a program on a terminal of its own, and type one line at its prompt."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(ROOT)
        os.execv(sys.executable, [sys.executable, *words])
    shown = b""
    try:
        while True:
            try:
                data = os.read(terminal, 4096)
            except OSError:  # a terminal whose last process has gone (pty(7))
                break
            if not data:
                break
            shown += data
            if prompt in shown and answer:
                os.write(terminal, answer)
                answer = b""
    finally:
        _, status = os.waitpid(pid, 0)
        os.close(terminal)
    return os.waitstatus_to_exitcode(status), shown.decode()


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize("answer, code", [(b"open sesame\n", 0), (b"\x03", 130)])
def test_a_person_may_type_a_passphrase(box, answer, code):
    """ssh asks on the terminal, not on our streams; Ctrl-C there ends all of it."""
    with running_loop():
        words = ["-m", "forgather_control", "--ssh", "locked", "rpc", "job", "ping"]
        got, shown = typed(words, b"passphrase", answer)
        assert got == code and "Traceback" not in shown, shown
        assert ('"protocol": 2' in shown) == (code == 0)


def test_without_a_terminal_nobody_is_asked(box):
    """The same key is refused at once where no passphrase can be typed."""
    source = """
    from forgather_control import connect
    try:
        connect("job", ssh="locked")
    except Exception as err:
        print(type(err).__name__, flush=True)
    """
    with Process(source, start_new_session=True) as process:
        assert process.line() == "NotAuthenticated"


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_abort_names_the_job_before_it_asks(box):
    """Without JOB the question names the id on the other side; no means no."""
    with running_loop("far-away") as run:
        code, shown = typed(["-m", "forgather_control", "--ssh", "box", "abort"], b"[y/N] ", b"n\n")
        assert code == 1 and "abort far-away?" in shown and not run.job.aborted
        assert over("abort").returncode == 2, "no terminal, no answer"
        assert over("abort", "--force").returncode == 0
        run.thread.join(SOON)
        assert run.job.aborted


# Names that are none...


@pytest.mark.parametrize(
    "host",
    [
        "",
        "-oProxyCommand=touch x",
        "me@-v",
        "-",
        "a b",
        "a;b",
        "$(x)",
        "`x`",
        "a\nb",
        "a'b",
        "me@you@-x",
        "x" * 256,
        "é",
    ],
)
def test_a_host_that_no_shell_may_see_is_refused(host, monkeypatch, tmp_path):
    """Neither an option of ssh nor a word for a shell: ssh is not even run."""
    monkeypatch.setenv(ssh.PROGRAM, f"touch {tmp_path}/ran")
    with pytest.raises(InvalidParams, match="is no"):
        connect("job", ssh=host)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "host", ["gpu7", "me@gpu7.example.org", "10.0.0.7", "::1", "fe80::1%eth0", "ssh://me@[::1]:2222"]
)
def test_hosts_that_ssh_takes(host):
    """Aliases, names, addresses and ssh's own form with a port."""
    assert ssh.check_host(host) == host


@pytest.mark.parametrize("job", ["", "-x", "a b", "x; touch y", "$(x)", "../up", "é", "a\nb"])
def test_a_job_that_no_shell_may_see_is_refused(job, monkeypatch, tmp_path):
    """It is no job's name, so there is none; ssh is not even run."""
    monkeypatch.setenv(ssh.PROGRAM, f"touch {tmp_path}/ran")
    with pytest.raises(NoSuchJob):
        connect(job, ssh="gpu7")
    assert not (tmp_path / "ran").exists()


def test_what_ssh_makes_of_our_options(box, monkeypatch):
    """As ``ssh -G`` reads them: no forwarding, no terminal, a time-out; one's own options count first."""

    def settings(options: str) -> set[str]:
        monkeypatch.setenv(ssh.PROGRAM, f"ssh -F {box.folder}/config {options} -G")
        command = ssh._command("box", "true", 7.2)
        return set(
            subprocess.run(command, capture_output=True, text=True, check=True, timeout=SOON).stdout.splitlines()
        )

    assert settings("") >= {
        "clearallforwardings yes", "connecttimeout 7", "permitlocalcommand no", "forwardagent no", "forwardx11 no",
        "requesttty false",
    }  # fmt: skip
    assert "connecttimeout 3" in settings("-o ConnectTimeout=3")
    assert "batchmode no" in settings("-o BatchMode=no")
