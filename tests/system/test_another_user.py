"""Another user of the same machine attacks a job in every way, without effect on its steps, its data and its files.

Three users: the owner of the job, an attacker, and root, who runs these tests and may do what the owner may. Owner and
attacker are processes that have dropped root's rights for good; each runs the lines of code that it receives.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from forgather_control.client import api, recovery
from forgather_control.client.target import find
from forgather_control.errors import JobsDirUnusable, NotAuthenticated
from forgather_control.jobs import cleanup
from forgather_control.jobs.record import JobRecord
from forgather_control.processes import liveness

from ..support.harness import Process, Wire, needs_root, until

pytestmark = [pytest.mark.once, needs_root]

OWNER, ATTACKER = 64123, 64124

#: What the processes of ordinary users import before they drop root's rights; perhaps only root can read this Python.
DROP = """
import contextlib, ctypes, difflib, encodings.ascii, encodings.idna, fcntl, getpass, hashlib, importlib, io, json
import logging, os, pkgutil, pwd, resource, shutil, signal, socket, ssl, stat, struct, subprocess, sys, tempfile
import threading, time, traceback
import psutil
import forgather_control
from forgather_control import deadline
for module in pkgutil.walk_packages(forgather_control.__path__, "forgather_control."):
    if module.name != "forgather_control.__main__":
        importlib.import_module(module.name)
from forgather_control.client import file_transport
from forgather_control.cli import main as cli
from forgather_control.client import api as client
from forgather_control.jobs import directory
from forgather_control.processes import stack_dump as dump
from forgather_control.wire import addresses as endpoint
from forgather_control.server import auth
from forgather_control.jobs import cleanup, limits, private_files
from forgather_control.jobs import registry as jobs
from forgather_control.jobs import spool
from forgather_control.processes import liveness as process
from forgather_control.processes.terminate import terminate
from forgather_control.jobs import record
from forgather_control.client import recovery as rescue
from forgather_control.jobs import rank_processes
from forgather_control import TrainingJob

process.current_process(), directory._user()
os.setgroups([]); os.setgid(int(sys.argv[1])); os.setuid(int(sys.argv[1]))
os.umask(0o022)
os.environ["HOME"] = "/nonexistent"
"""

#: Runs the code in each line, a JSON array of the code and the values that it names; prints ``it``.
AGENT = (
    DROP
    + """
def control(*words):
    "The command line: exit code, standard output, standard error."
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(list(words))
    return code, out.getvalue(), err.getvalue()

def talk(where, data, family=socket.AF_UNIX):
    "Return all that is answered until the other side closes the connection, or for 3 s."
    with socket.socket(family) as sock:
        sock.settimeout(3)
        sock.connect(where)
        sock.sendall(data)
        got = b""
        with contextlib.suppress(OSError):
            while part := sock.recv(65536):
                got += part
        return got.decode()

def answering(path, job_id):
    "Serve as a false job: its socket is open to all users, and it answers every request."
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    os.chmod(path, 0o777)
    listener.listen(50)
    def serve():
        while True:
            sock, _ = listener.accept()
            with sock, sock.makefile("rb") as lines, contextlib.suppress(OSError):
                received.append(lines.readline().decode())
                sock.sendall(json.dumps({"jsonrpc": "2.0", "id": 1, "result": {"job_id": job_id}}).encode() + b"\\n")
    threading.Thread(target=serve, daemon=True).start()

def plant(root, name, **members):
    "Make a false job directory."
    os.makedirs(os.path.join(root, name))
    me = process.current_process()
    mine = record.JobRecord(name, me.host, None, me.pid, time.time(), os.path.join(root, name, "control.sock"))
    with open(os.path.join(root, name, "endpoint.json"), "w") as file:
        json.dump({**mine.to_json(), "process_started_at": me.started_at, **members}, file)

received = []
names = globals()
print("ready", flush=True)
for line in sys.stdin:
    code, values = json.loads(line)
    names.update(values, it=None)
    try:
        exec(code, names)
        print(json.dumps([None, it]), flush=True)
    except BaseException as err:
        print(json.dumps([type(err).__name__, str(err)]), flush=True)
"""
)

#: The owner's job. Its weights are a chain of hashes, which an extra, missing or repeated step would change.
JOB = (
    DROP
    + """
logging.basicConfig(format="%(levelname)s %(message)s")
weights, step = b"", 0
with TrainingJob(sys.argv[2], 10**9, port=0 if sys.argv[3] else None, save_on_stop=False) as job:
    print("ready", flush=True)
    while not job.should_stop:
        step += 1
        weights = hashlib.sha256(weights + b"%d" % step).digest()
        time.sleep(0.002)
        job.log(loss=1 / step)
        job.step(step)
        if job.should_save:
            print("saved", flush=True)
            job.saved("nowhere")
print(step, weights.hex(), job.aborted, flush=True)
"""
)


class Agent(Process):
    """A process of one user that runs the code that it receives."""

    def __init__(self, uid: int) -> None:
        super().__init__(AGENT, str(uid), env={"FORGATHER_JOBS_DIR": "/nonexistent", "XDG_RUNTIME_DIR": ""})
        assert self.line() == "ready", self.errors

    def tries(self, code: str, **values: Any) -> tuple[str | None, Any]:
        """Run code; return its error's class and text, or ``None`` and the value of ``it``."""
        self.say(json.dumps([code, {name: _plain(value) for name, value in values.items()}]))
        error, it = json.loads(self.line())
        return error, it

    def does(self, code: str, **values: Any) -> Any:
        """Run code that must work; return the value of ``it``."""
        error, it = self.tries(code, **values)
        assert error is None, (error, it)
        return it


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def _users(uid: int) -> Iterator[Agent]:
    with Agent(uid) as agent:
        yield agent


@pytest.fixture(scope="module")
def attacker() -> Iterator[Agent]:
    """The other user."""
    yield from _users(ATTACKER)


@pytest.fixture(scope="module")
def owner() -> Iterator[Agent]:
    """The user whose jobs are attacked."""
    yield from _users(OWNER)


@contextmanager
def folder(uid: int, mode: int) -> Iterator[Path]:
    """Make a directory of this user and mode that all users can reach."""
    place = Path(tempfile.mkdtemp(prefix="fg"))
    os.chown(place, uid, uid)
    place.chmod(mode)
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


class Victim(NamedTuple):
    """The job under attack, and what it published."""

    process: Process
    jobs: Path
    home: Path
    known: dict[str, Any]

    def ask(self, method: str) -> Any:
        """Return its answer to root."""
        with Wire(self.known["socket"]) as wire:
            return wire.call(method)["result"]

    def values(self) -> dict[str, Any]:
        """Return what attackers know: everything but the token."""
        known = self.known
        return {"home": self.home, "root": self.jobs, "job": self.home.name, "pid": known["pid"], "port": known["port"]}


@contextmanager
def running(root: Path, job_id: str, port: str = "yes", **env: str) -> Iterator[Victim]:
    """Run a job of the owner; at the end it is stopped, and must have trained as if undisturbed."""
    with Process(JOB, str(OWNER), job_id, port, env={"FORGATHER_JOBS_DIR": str(root), **env}) as job:
        assert job.line() == "ready", job.errors
        home = root / job_id
        victim = Victim(job, root, home, json.loads((home / "endpoint.json").read_text()))
        yield victim
        if job.popen.poll() is None:
            assert not victim.ask("list_commands")
            victim.ask("graceful_stop")
            step, weights, aborted = job.line().split()
            assert (weights, aborted) == (_trained(int(step)), "False") and job.end() == 0
            assert not [line for line in job.errors if "did not send the job's token" not in line], job.errors


def _trained(steps: int) -> str:
    weights = b""
    for step in range(1, steps + 1):
        weights = hashlib.sha256(weights + b"%d" % step).digest()
    return weights.hex()


@pytest.fixture(scope="module")
def victim() -> Iterator[Victim]:
    """A job in a jobs directory that all users can read."""
    with folder(OWNER, 0o755) as place:
        (place / "jobs").mkdir()
        os.chown(place / "jobs", OWNER, OWNER)
        with running(place / "jobs", "experiment") as victim:
            until(lambda: (victim.home / "status.json").exists() and (victim.home / "ranks.json").exists())
            yield victim


@pytest.fixture
def unmoved(victim: Victim) -> Iterator[Victim]:
    """The job, which must have the same files before and after, no command, and continue to train."""

    def files() -> list[tuple[str, int, int]]:
        found = [victim.jobs, *victim.jobs.rglob("*")]
        return sorted((str(path), path.lstat().st_mode, path.lstat().st_uid) for path in found if path.name[0] != ".")

    before = files()
    yield victim
    assert files() == before and not victim.ask("list_commands")
    step = victim.ask("status")["global_step"]
    until(lambda: victim.ask("status")["global_step"] > step)


# What the kernel refuses because of the modes that the job set...


@pytest.mark.parametrize(
    "code",
    [
        "talk(home + '/control.sock', b'ping')",
        "os.listdir(home)",
        "os.chdir(home)",
        "os.stat(home + '/endpoint.json')",
        *(f"open(home + '/{name}').read()" for name in ("endpoint.json", "ranks.json", "status.json")),
        *(f"os.listdir(home + '/{name}')" for name in ("requests", "replies")),
        "open(home + '/requests/abort', 'w')",
        "os.symlink('/dev/null', home + '/requests/abort')",
        "open('/tmp/fg-gift', 'w').close(); os.link('/tmp/fg-gift', home + '/requests/abort')",
        "open('/tmp/fg-gift', 'w').close(); os.rename('/tmp/fg-gift', home + '/requests/abort')",
        "os.mkdir(home + '/requests/abort.json')",
        "open(home + '/endpoint.json', 'w')",
        "os.unlink(home + '/control.sock')",
        "os.rename(home + '/control.sock', home + '/s')",
        "os.unlink(home + '/endpoint.json')",
        "os.link(home + '/endpoint.json', '/tmp/fg-stolen')",
        "os.rename(home, root + '/moved')",
        "os.rmdir(home)",
        "os.chmod(home, 0o777)",
        "os.chown(home, os.getuid(), -1)",
        "os.utime(home)",
        "os.mkdir(root + '/planted')",
        "os.symlink('/tmp', root + '/planted')",
        "open(root + '/.lock', 'r')",
        "fcntl.flock(os.open(home + '/lock', os.O_RDONLY), fcntl.LOCK_EX)",
        "os.rename(root, root + '.old')",
        *(f"os.kill(pid, {number})" for number in (0, 10, 15, 9, 42)),
        "signal.pidfd_send_signal(os.pidfd_open(pid), 9)",
        "open(f'/proc/{pid}/mem', 'rb')",
        "open(f'/proc/{pid}/environ', 'rb').read()",
        "os.listdir(f'/proc/{pid}/fd')",
        "os.listdir(f'/proc/{pid}/task/{pid}/fd')",
        "open(f'/proc/{pid}/fd/3', 'wb')",
        "open(f'/proc/{pid}/maps').read()",
        "os.chdir(f'/proc/{pid}/cwd')",
        "resource.prlimit(pid, resource.RLIMIT_CPU, (1, 1))",
        "os.sched_setaffinity(pid, [0])",
        "os.setpriority(os.PRIO_PROCESS, pid, 19)",
        "os.setpriority(os.PRIO_USER, OWNER, 19)",
        "os.setuid(OWNER)",
    ],
)
def test_no_way_in_past_the_modes(attacker, unmoved, code):
    """Connect, read, list, write, link, rename, replace, signal, trace: each fails with EACCES or EPERM."""
    error, text = attacker.tries(f"it = repr({code})" if ";" not in code else code, **unmoved.values(), OWNER=OWNER)
    assert error == "PermissionError", (error, text)
    assert not Path("/tmp/fg-stolen").exists()
    Path("/tmp/fg-gift").unlink(missing_ok=True)


def test_a_debugger_is_not_let_in(attacker, unmoved):
    """The kernel refuses ptrace(2) and process_vm_readv(2), too."""
    code = """
libc = ctypes.CDLL(None, use_errno=True)
traced = libc.ptrace(16, pid, None, None), ctypes.get_errno()
buffer = (ctypes.c_size_t * 2)(id(libc), 8)
read = libc.process_vm_readv(pid, buffer, 1, buffer, 1, 0), ctypes.get_errno()
it = traced, read
"""
    assert attacker.does(code, **unmoved.values()) == [[-1, 1], [-1, 1]]


def test_no_secret_is_seen_from_outside(attacker, unmoved):
    """What all users may read of a process, its arguments and its sockets, holds no token."""
    seen = attacker.does(
        "it = [open(p).read() for p in (f'/proc/{pid}/cmdline', f'/proc/{pid}/stat', f'/proc/{pid}/status',"
        " '/proc/net/unix', '/proc/net/tcp')]",
        **unmoved.values(),
    )
    assert not any(unmoved.known["token"] in text for text in seen)


# The package's own programs, run by the attacker...


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("list", 0),
        ("list --json", 0),
        ("cleanup --force", 0),
        ("status", 3),
        ("status {job}", 3),
        ("status exp", 3),
        ("save {job}", 3),
        ("stop --timeout=5 {job}", 3),
        ("abort --force {job}", 3),
        ("abort --force --kill-after 0 {job}", 3),
        ("ranks {job}", 3),
        ("stacks {job}", 3),
        ("rpc {job} ping", 3),
        ("dial-stdio {job}", 3),
        ("status --connect unix:{home}/control.sock", 1),
        ("abort --force --connect tcp://127.0.0.1:{port}", 2),
        ("abort --force --connect tcp://127.0.0.1:{port} {job}", 2),
    ],
)
def test_the_command_line_tells_another_user_nothing(attacker, unmoved, words, code):
    """Each verb fails or finds nothing; the only fact it prints is the job id, which ls shows, too."""
    given = words.format(**unmoved.values()).split()
    done, out, err = attacker.does(
        "os.environ['FORGATHER_JOBS_DIR'] = root; it = control(*given)", **unmoved.values(), given=given
    )
    assert done == code, (done, out, err)
    assert out.strip() in ("", "[]", f"no jobs in {unmoved.jobs}", "nothing to clean up")
    assert "Traceback" not in err and unmoved.known["token"] not in err and str(unmoved.known["pid"]) not in err


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("file_transport.FileTransport(record.JobRecord(job, 'h', None, pid, 1.0))", "FindError"),
        (
            "dump.dump_stacks(process.current_process()._replace(pid=pid, started_at=None), 3, deadline.Deadline(5.0))",
            "FindError",
        ),
        ("cleanup.remove_tree(root, job, (0, 0))", "JobsDirUnusable"),
        ("cleanup.remove_dead(root, job)", "JobsDirUnusable"),
        ("cleanup.locked(root, 0.0).__enter__()", "JobsDirUnusable"),
        ("directory.JobDirectory(job, lambda path: None, 1).claim()", "JobsDirUnusable"),
    ],
)
def test_no_part_of_the_package_gets_past_the_modes(attacker, unmoved, code, error):
    """Request files, stacks, clean-up, claiming the job id: ControlErrors in the attacker's process."""
    found, text = attacker.tries(f"os.environ['FORGATHER_JOBS_DIR'] = root; it = repr({code})", **unmoved.values())
    assert found == error, (found, text)


def test_processes_are_ended_only_by_their_owner(attacker, unmoved):
    """abort --kill-after with a record that names the job's process: the kernel refuses each signal."""
    code = """
it = [word for _, word in terminate([process.current_process()._replace(pid=pid, started_at=None)], 0.0)]
"""
    assert attacker.does(code, **unmoved.values()) == ["refused"]


# Over TCP, where all users of this host may connect...

COMMAND = '{"jsonrpc":"2.0","id":1,"method":"abort"}\n'


@pytest.mark.parametrize(
    "first",
    [
        COMMAND,
        "[" + COMMAND.strip() + "]\n",
        "\n" + COMMAND,
        "POST /abort HTTP/1.1\r\nHost: localhost\r\nContent-Type: text/plain\r\n\r\n" + COMMAND,
        "GET /jobs HTTP/1.1\r\n\r\n",
        "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        '{"jsonrpc":"2.0","method":"authenticate","params":{"token":""}}\n' + COMMAND,
        '[{"jsonrpc":"2.0","method":"authenticate","params":{"token":""}}]\n' + COMMAND,
        '[1,{"jsonrpc":"2.0","id":1,"method":"authenticate","params":{"token":""}}]\n' + COMMAND,
        '{"jsonrpc":"2.0","id":1,"method":"rpc.discover"}\n',
        '{"jsonrpc":"2.0","id":1,"method":"status"}\n',
    ],
)
def test_without_the_token_the_port_answers_nothing(attacker, unmoved, first):
    """The server closes the connection: no answer, not even an error, and no effect."""
    said = attacker.does(
        "it = talk(('127.0.0.1', port), first.encode('latin-1'), socket.AF_INET)", **unmoved.values(), first=first
    )
    assert said == ""


def test_tokens_are_not_guessed(attacker, unmoved):
    """Fifty wrong tokens at once, empty, similar or of another type: each is refused after a delay."""
    code = """
def guess(token, found):
    line = json.dumps({"jsonrpc": "2.0", "id": 1, "method": "authenticate", "params": {"token": token}})
    begin = time.monotonic()
    said = talk(("127.0.0.1", port), line.encode() + b"\\n" + command.encode(), socket.AF_INET)
    found.append((said, time.monotonic() - begin))

odd = ["", " ", "A" * 43, job, str(pid), None, True, 0, [], {}, ["A"], {"token": "A"}, "\\u0000", "A" * 900]
found = []
threads = [threading.Thread(target=guess, args=(token, found)) for token in odd + [auth.new_token() for _ in range(36)]]
for thread in threads: thread.start()
for thread in threads: thread.join()
it = found
"""
    found = attacker.does(code, **unmoved.values(), command=COMMAND)
    assert len(found) == 50
    for said, seconds in found:
        assert json.loads(said)["error"]["code"] == NotAuthenticated.code and said.count("\n") == 1, said
        assert seconds > 0.9


def test_the_owner_connects_while_another_user_fills_the_port(owner, attacker, unmoved):
    """While the attacker holds a hundred connections to the port, the owner connects to the socket and to the port."""
    code = "socks = [socket.create_connection(('127.0.0.1', port)) for _ in range(100)]"
    attacker.does(code, **unmoved.values())
    try:
        for words in (
            ["status", "--json"],
            ["status", "--json", "--connect", f"tcp://127.0.0.1:{unmoved.known['port']}"],
        ):
            done, out, err = owner.does(
                "os.environ['FORGATHER_JOBS_DIR'] = root; it = control(*words)", **unmoved.values(), words=words
            )
            assert done == 0 and json.loads(out)["job_id"] == "experiment", err
    finally:
        attacker.does("[sock.close() for sock in socks]")


# False jobs in a jobs directory in which all users may make one...


@pytest.fixture
def shared() -> Iterator[Path]:
    """A directory like /tmp: all users may add to it, and remove what they own."""
    with folder(0, 0o1777) as place:
        yield place


FORGERIES = {
    "a live job": "plant(root, 'exp'); answering(root + '/exp/control.sock', 'exp')",
    "a job elsewhere": "plant(root, 'exp', socket='/tmp/fg-forged'); answering('/tmp/fg-forged', 'exp')",
    "a dead job": "plant(root, 'exp', pid=2**31 - 1)",
    "a job with a port": "plant(root, 'exp', socket=None, port=port, address='127.0.0.1', token='mine')",
    "the owner's job": "plant(root, 'exp', pid=pid, socket=home + '/control.sock')",
    "a directory for all": "plant(root, 'exp'); os.chmod(root + '/exp', 0o777)",
}


@pytest.mark.parametrize("kind", FORGERIES)
def test_a_forged_job_is_left_out(owner, attacker, unmoved, shared, kind):
    """It is left out with the reason; no verb reaches it, nothing is sent to it, and it is not cleaned up."""
    with running(shared, "experiment-2", port="") as mine:
        attacker.does("received.clear(); " + FORGERIES[kind], **{**unmoved.values(), "root": str(shared)})
        try:
            owner.does("os.environ['FORGATHER_JOBS_DIR'] = str(root)", root=shared)
            code, out, err = owner.does("it = control('list', '--json')")
            assert code == 0 and [row["job_id"] for row in json.loads(out)] == ["experiment-2"]
            assert err.startswith("left out exp: ") and ("another user" in err or "other users" in err), err
            for words in ("status exp", "stop exp", "abort --force exp", "save --timeout=5 exp", "ranks exp"):
                code, out, err = owner.does("it = control(*words)", words=words.split())
                assert (code, out) == (3, ""), (words, out, err)
            # Without a job id the owner's job is meant, because there is no other.
            for words in ("status --json", "status --json experiment-2"):
                code, out, err = owner.does("it = control(*words)", words=words.split())
                assert code == 0 and json.loads(out)["pid"] == mine.known["pid"], err
            assert owner.does("it = control('cleanup', '--force')")[1] == "nothing to clean up\n"
            assert not any(attacker.does("it = received")) and (shared / "exp").exists()
        finally:
            Path("/tmp/fg-forged").unlink(missing_ok=True)


def test_no_token_goes_to_a_forged_port(owner, attacker, unmoved, shared):
    """The attacker's record names a port, an address and a fingerprint: they are ignored."""
    code = """
listener = socket.create_server(("127.0.0.2", 0))
plant(root, "exp", port=listener.getsockname()[1], address="127.0.0.2", token="mine", tls_sha256="0" * 64)
it = listener.getsockname()[1]
"""
    port = attacker.does(code, root=shared)
    words = ["status", "--connect", f"tls://127.0.0.1:{port}"]
    code = "os.environ.update(FORGATHER_JOBS_DIR=root, FORGATHER_CONTROL_TOKEN='secret'); it = control(*words)"
    done, _, err = owner.does(code, root=shared, words=words)
    owner.does("del os.environ['FORGATHER_CONTROL_TOKEN']")
    assert done == 4 and f"Nothing listens at tls://127.0.0.1:{port}" in err
    code = """
listener.setblocking(False)
try: it = repr(listener.accept())
except BlockingIOError: it = None
listener.close()
"""
    assert attacker.does(code) is None


@pytest.mark.parametrize("mode, name", [(0o770, ""), (0o777, ""), (0o660, "endpoint.json"), (0o602, "endpoint.json")])
def test_a_record_that_others_could_write_is_ignored(owner, attacker, mode, name):
    """The owner opened the job's directory or its record to others, who could have written it."""
    with folder(OWNER, 0o755) as root, running(root, "job", port="") as mine:
        was = (mine.home / name).stat().st_mode
        (mine.home / name).chmod(mode)
        code, out, err = owner.does(
            "os.environ['FORGATHER_JOBS_DIR'] = root; it = control('list', '--json')", root=root
        )
        assert (code, out) == (0, "[]\n") and "can be written by other users; chmod go-w" in err
        (mine.home / name).chmod(was)
        assert owner.does("it = control('status', 'job')")[0] == 0


PLANTED = {
    "directory": ("os.mkdir(root + '/exp', 0o777)", "is no directory of this user"),
    "directory for all": ("os.mkdir(root + '/exp'); os.chmod(root + '/exp', 0o777)", "is no directory of this user"),
    "job": ("plant(root, 'exp')", "is no directory of this user"),
    "file": ("open(root + '/exp', 'w').close()", "is no directory of this user"),
    "link": ("os.mkdir(root + '/mine', 0o777); os.symlink(root + '/mine', root + '/exp')", "no directory of this user"),
    "dangling link": ("os.symlink('/tmp/fg-dangling', root + '/exp')", "is no directory of this user"),
    "lock": ("open(root + '/.lock', 'w').close()", "cannot be written (Permission denied)"),
    "locked lock": ("f = open(root + '/.lock', 'w'); os.chmod(root + '/.lock', 0o666); fcntl.flock(f, 2)", "for 0.2 s"),
    "lock that is a link": ("os.symlink('/tmp/fg-dangling', root + '/.lock')", "cannot be written"),
    "jobs directory": ("os.mkdir(root + '/jobs')", "belongs to another user"),
    "jobs directory for all": ("os.mkdir(root + '/jobs'); os.chmod(root + '/jobs', 0o1777)", "belongs to another user"),
    "jobs directory as a link": ("os.symlink(own, root + '/jobs')", "belongs to another user"),
}


@pytest.mark.parametrize("kind", PLANTED)
def test_a_job_uses_nothing_that_another_user_made(owner, attacker, shared, monkeypatch, kind):
    """Another user's file in the place of its directory, its lock or its jobs directory: one warning, and it trains."""
    code, why = PLANTED[kind]
    with folder(OWNER, 0o755) as own:
        attacker.does(code, root=shared, own=own)
        before = sorted(str(path) for path in shared.rglob("*"))
        job = """
os.environ["FORGATHER_JOBS_DIR"] = root
limits.LOCK_TIMEOUT = 0.2
said = io.StringIO()
logging.basicConfig(stream=said, force=True)
with TrainingJob("exp", port=0) as job:
    for step in range(1, 4): job.step(step)
it = step, said.getvalue(), job._controller is None
"""
        root = shared / "jobs" if "jobs" in kind else shared
        step, said, is_alone = owner.does(job, root=root)
        assert step == 3 and is_alone and why in said and said.count("WARNING") == 1, said
        left = [path for path in sorted(str(path) for path in shared.rglob("*")) if not path.endswith("/.lock")]
        assert left == [path for path in before if not path.endswith("/.lock")] and list(own.iterdir()) == []
        assert not Path("/tmp/fg-dangling").exists()
        attacker.does("f = None")


def test_a_name_that_changes_all_the_time_is_claimed_whole_or_not_at_all(owner, attacker, shared):
    """The attacker makes and removes a directory and a link of that name all the time, while the owner claims it."""
    with folder(ATTACKER, 0o777) as trap:
        code = """
going = True
def flip():
    while going:
        for make in (lambda: os.mkdir(root + "/exp", 0o777), lambda: os.symlink(trap, root + "/exp")):
            with contextlib.suppress(OSError):
                make()
            for remove in (os.rmdir, os.unlink):
                with contextlib.suppress(OSError):
                    remove(root + "/exp")
flipper = threading.Thread(target=flip)
flipper.start()
"""
        attacker.does(code, root=shared, trap=trap)
        claim = """
os.environ["FORGATHER_JOBS_DIR"] = root
it = []
for _ in range(30):
    server = forgather_control.server.server.Server(lambda request, sink: None, lambda: None)
    mine = directory.JobDirectory("exp", server.listen, 1)
    try:
        mine.claim()
        facts = os.lstat(root + "/exp")
        it.append([facts.st_uid, stat.S_IMODE(facts.st_mode), sorted(os.listdir(root + "/exp"))])
        mine.remove()
    except (OSError, directory.ControlError):
        it.append(None)
    server.close(1.0)
"""
        outcomes = owner.does(claim, root=shared)
        attacker.does("going = False; flipper.join()")
        assert len(outcomes) == 30 and list(trap.iterdir()) == []
        whole = [OWNER, 0o700, ["control.sock", "endpoint.json", "lock"]]
        assert all(found in (None, whole) for found in outcomes), outcomes


@pytest.mark.parametrize(
    "code",
    [
        "private_files.write(os.open(root, os.O_RDONLY), 'endpoint.json', b'token')",
        "rank_processes.write(root, [])",
    ],
)
def test_no_file_of_another_user_is_written(owner, attacker, shared, code):
    """The name of a file before it is renamed can be guessed: an existing file is not used."""
    pid = owner.does("it = os.getpid()")
    for name in (f".endpoint.json.{pid}", f".ranks.json.{pid}"):
        attacker.does(
            "open(root + '/' + name, 'w').close(); os.chmod(root + '/' + name, 0o666)", root=shared, name=name
        )
    assert owner.tries(code, root=shared)[0] == "FileExistsError"
    assert {path.read_text() for path in shared.iterdir()} == {""} and len(list(shared.iterdir())) == 2


# The short directory of a socket whose path would be too long...

LONG = "x" * 110


@pytest.mark.parametrize(
    "place, chosen",
    [("own", True), ("shared", True), ("another user's", False), ("for all", False), ("for a group", False)],
)
def test_the_short_directory_is_private_and_never_where_others_may_rename(owner, attacker, place, chosen):
    """It is in $XDG_RUNTIME_DIR where that is safe, otherwise in /tmp under a name that cannot be guessed."""
    uid, mode = {
        "own": (OWNER, 0o755),
        "shared": (0, 0o1777),
        "another user's": (ATTACKER, 0o777),
        "for all": (OWNER, 0o777),
        "for a group": (OWNER, 0o775),
    }[place]
    with folder(OWNER, 0o755) as root, folder(uid, mode) as runtime:
        with running(root, LONG, port="", XDG_RUNTIME_DIR=str(runtime)) as mine:
            short = Path(mine.known["socket"]).parent
            assert short.parent == (runtime if chosen else Path("/tmp")) and short.name.startswith("forgather-")
            assert (short.stat().st_uid, short.stat().st_mode & 0o777) == (OWNER, 0o700)
            tries = ("talk(short + '/s', b'x')", "os.listdir(short)", "os.rename(short, short + '.old')")
            for code in (*tries, "os.rmdir(short)", "os.unlink(short + '/s')"):
                assert attacker.tries(code, short=short)[0] == "PermissionError", code
        assert not short.exists()


def test_another_users_socket_is_not_taken_for_the_job(owner, attacker):
    """A job was killed, /tmp was emptied, and the attacker listens where its socket was: the job counts as dead."""
    with folder(OWNER, 0o755) as root:
        with running(root, LONG, port="") as mine:
            short = Path(mine.known["socket"]).parent
            mine.process.kill()
        shutil.rmtree(short)
        code = "received.clear(); os.mkdir(short); os.chmod(short, 0o755); answering(short + '/s', job)"
        attacker.does(code, short=short, job=LONG)
        try:
            owner.does("os.environ['FORGATHER_JOBS_DIR'] = root", root=root)
            code, out, _ = owner.does("it = control('list', '--json')")
            assert code == 0 and [row["state"] for row in json.loads(out)] == ["dead"]
            for words in ("status", "stop x", "rpc x ping", "dial-stdio x", f"save --connect unix:{short}/s"):
                code, out, err = owner.does("it = control(*words)", words=words.split())
                assert code and not out, (words, out, err)
            assert "belongs to another user" in err
            assert not any(attacker.does("it = received")), "not one byte was sent to it"
            code, out, _ = owner.does("it = control('cleanup', '--force', '--json')")
            assert json.loads(out) == {"removed": [LONG]} and (short / "s").exists()
        finally:
            shutil.rmtree(short)


# Root cleans up other users' jobs, which must not mislead it...


@pytest.fixture
def foreign_jobs() -> Iterator[Path]:
    """A jobs directory of the attacker."""
    with folder(ATTACKER, 0o755) as place:
        (place / "jobs").mkdir()
        os.chown(place / "jobs", ATTACKER, ATTACKER)
        yield place / "jobs"


@contextmanager
def precious(job_id: str) -> Iterator[Path]:
    """Make a directory of root with a directory of that name, whose file must not be lost."""
    with folder(0, 0o755) as place:
        (place / job_id).mkdir()
        (place / job_id / "weights").write_text("precious")
        yield place
        assert (place / job_id / "weights").read_text() == "precious"


@pytest.mark.parametrize(
    "code",
    [
        "plant(root, 'exp', pid=gone, job_id='../../victim')",
        "plant(root, 'exp', pid=gone, job_id='')",
        "plant(root, 'exp', pid=gone, job_id=target)",
        "os.symlink(target, root + '/victim')",
        "os.symlink(target + '/victim', root + '/victim')",
        "plant(root, 'exp', pid=gone); [os.symlink(target, root + '/exp/' + n) for n in ('requests', 'control.sock')]",
        "plant(root, 'exp', pid=gone); os.symlink(target + '/victim/weights', root + '/exp/status.json')",
        "os.mkdir(root + '/exp'); os.symlink(target + '/victim/weights', root + '/exp/endpoint.json')",
    ],
)
def test_root_cleans_up_nothing_else(attacker, foreign_jobs, monkeypatch, code):
    """With job ids and links that lead elsewhere, root removes the attacker's files or nothing."""
    monkeypatch.setenv("FORGATHER_JOBS_DIR", str(foreign_jobs))
    with precious("victim") as place:
        attacker.does(code, root=foreign_jobs, target=place, gone=2**31 - 1)
        assert api.cleanup() in ([], ["exp"])
        assert api.cleanup() == []


@pytest.mark.parametrize(
    "swap",
    [
        "os.rename(root, root + '.old'); os.symlink(target, root)",
        "os.rename(root + '/victim', root + '/old'); os.symlink(target + '/victim', root + '/victim')",
        "os.chdir(root); os.rename('victim', 'old'); os.mkdir('victim'); os.symlink(target + '/victim', 'victim/in')",
    ],
    ids=["jobs directory", "link", "directory"],
)
def test_root_removes_what_it_judged(attacker, foreign_jobs, swap):
    """When root connects to a dead job's socket, something else is put in the place of the job."""
    code = """
plant(root, "victim", pid=2**31 - 1)
listener = socket.socket(socket.AF_UNIX)
listener.bind(root + "/victim/control.sock")
listener.listen()
def serve():
    sock, _ = listener.accept()
    exec(swap)
    sock.close()
    swapped.set()
swapped = threading.Event()
threading.Thread(target=serve, daemon=True).start()
"""
    with precious("victim") as place:
        attacker.does(code, root=foreign_jobs, target=place, swap=swap)
        try:
            cleanup.remove_dead(str(foreign_jobs), "victim")
        except JobsDirUnusable:
            pass  # the judged directory is empty, and its name has another one, which stays
        assert attacker.does("it = swapped.wait(5)")


def test_root_kills_no_process_that_another_user_names(attacker, foreign_jobs, unmoved, monkeypatch):
    """abort --kill-after of a job whose record and ranks.json name a process of the owner."""
    monkeypatch.setenv("FORGATHER_JOBS_DIR", str(foreign_jobs))
    named = {name: unmoved.known[name] for name in JobRecord._fields if name not in ("token", "port", "address")}
    named.update(job_id="exp", socket=None, token=None, port=None, address=None)
    rank = {
        "rank": 0,
        "host": liveness.current_process().host,
        "pid": unmoved.known["pid"],
        "started_at": named["process_started_at"],
    }
    code = "plant(root, 'exp', **named); open(root + '/exp/ranks.json', 'w').write(json.dumps([rank]))"
    attacker.does(code, root=foreign_jobs, named=named, rank=rank)
    known = find("exp")
    assert [fate["outcome"] for fate in recovery.abort(known, 0.0).outcomes] == ["refused"]


def test_very_deep_directories_are_an_error_message(attacker, foreign_jobs):
    """Directories nested deeper than Python's recursion limit: a message says so, without a RecursionError."""
    code = """
plant(root, "exp", pid=2**31 - 1)
os.chdir(root + "/exp")
for _ in range(200):
    os.mkdir("d"); os.chdir("d")
os.chdir("/")
"""
    attacker.does(code, root=foreign_jobs)
    usual = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack()) + 150)
    try:
        with pytest.raises(JobsDirUnusable, match="cannot be removed"):
            cleanup.remove_dead(str(foreign_jobs), "exp")
    finally:
        sys.setrecursionlimit(usual)


def test_the_owner_has_the_job_at_the_end(owner, unmoved):
    """After all attacks the owner controls the job as before; its weights are compared when it ends."""
    owner.does("os.environ['FORGATHER_JOBS_DIR'] = root", root=unmoved.jobs)
    code, out, err = owner.does("it = control('status', '--json')")
    assert code == 0 and json.loads(out)["commands"] == [], err
    assert owner.does("it = control('ranks')")[0] == 0
