"""Seeded random input for everything that parses foreign input: it answers, refuses or skips, and training continues.

Lines, batches, cuts, ``endpoint.json``, ``requests/`` and the replies that a client reads. FUZZ_LINES and FUZZ_SEED
set how many and which; ``tox -e fuzz`` sends a million. ``coverage_fuzz`` defines what must hold for any input;
``tox -e atheris`` lets libFuzzer choose the inputs.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import random
import shutil
import socket
import stat
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from forgather_control.cli import main
from forgather_control.client import api
from forgather_control.client.connection import Client
from forgather_control.client.target import find
from forgather_control.errors import ControlError
from forgather_control.jobs import private_files, spool
from forgather_control.server.connection import Connection
from forgather_control.server.dispatcher import Dispatcher
from forgather_control.wire import jsonrpc

from ..client.test_file_transport import FileTarget
from ..support.harness import MS, SOON, Wire, descriptors, running_loop, serving_tcp, strict, until
from . import coverage_fuzz
from .coverage_fuzz import TARGETS, agrees, echo, expected

#: How many random lines; a tenth in the torch-free half.
LINES = int(os.environ.get("FUZZ_LINES", "10000" if os.environ.get("FORGATHER_TEST_LIGHT") == "1" else "100000"))
SEED = int(os.environ.get("FUZZ_SEED", "20261122"))


def some(number: int) -> int:
    """Return how many of something that is not a line to try: ``number`` in the full half, in proportion to LINES."""
    return max(1, number * LINES // 100_000)


@pytest.fixture
def answers_fit_over_connect():
    """Answers are not checked: some of the jobs here answer oddly on purpose."""


@pytest.fixture
def quick(monkeypatch):
    """Lift the budget and shorten the ticks, which would make this take hours; both have their own tests."""
    from forgather_control.server import limits

    monkeypatch.setattr(limits, "CPU_SHARE", 1.0)
    monkeypatch.setattr(limits, "TICK_PERIOD", 20 * MS)


# Lines...

METHODS = [
    "ping",
    "status",
    "get_command",
    "cancel_command",
    "list_commands",
    "rpc.discover",
    "subscribe",
    "unsubscribe",
    "nosuch",
    "__class__",
    "",
]
VALUES = [None, True, 0, -1, 1e308, "", "x" * 200, "\ud800", "\x00", [], {}, [[]], {"wait": "finished"}, 10**30]


def request(dice: random.Random) -> bytes:
    """Return something like a request: right, nearly right, or far from it."""
    message: dict = {"jsonrpc": "2.0", "method": dice.choice(METHODS), "id": dice.choice(VALUES)}
    if dice.random() < 0.5:
        message["params"] = {dice.choice(["command_id", "wait", "timeout", "since", "kinds", "x"]): dice.choice(VALUES)}
    if dice.random() < 0.2:
        message[dice.choice(["jsonrpc", "method", "params", "id", "more"])] = dice.choice(VALUES)
    text = json.dumps([message] * dice.randrange(3) if dice.random() < 0.1 else message)
    return text.encode()


def mutated(dice: random.Random, line: bytes) -> bytes:
    """Return the line with bytes changed, cut, doubled or inserted."""
    data = bytearray(line)
    for _ in range(dice.randrange(4)):
        place = dice.randrange(len(data) + 1)
        kind = dice.randrange(4)
        if kind == 0:
            data[place : place + dice.randrange(5)] = dice.randbytes(dice.randrange(5))
        elif kind == 1:
            del data[place:]
        elif kind == 2:
            data[place:place] = dice.choice(
                [b"[" * 50, b"{", b'"', b"\\u", b"\xff\xfe", b"1" * 5000, b"NaN", b"\0", b"\r"]
            )
        else:
            data += data[place:]
    return bytes(data).replace(b"\n", b" ")[:65536]


def attack(path: os.PathLike, seed: int, lines: int) -> int:
    """Send ``lines`` random lines, in pieces of any size, 200 on each connection; return how many were sent."""
    dice = random.Random(seed)
    sent = 0
    while sent < lines:
        with Wire(path) as wire:
            some = min(200, lines - sent)
            data = b"".join(mutated(dice, request(dice)) + dice.choice([b"\n", b"\r\n"]) for _ in range(some))
            while data:
                cut = dice.choice([1, 7, 100, 4096, 1 << 20])
                wire.send(data[:cut])
                data = data[cut:]
            wire.still_answers()
            sent += some
    return sent


def test_random_lines_do_nothing_but_get_answers(jobs_dir, caplog, quick):
    """After every two hundred the connection still answers a valid request; the training loop is not affected."""
    with running_loop() as run, caplog.at_level(logging.WARNING):
        path = jobs_dir / "job" / "control.sock"
        with ThreadPoolExecutor(2) as pool:
            assert sum(pool.map(lambda part: attack(path, SEED + part, LINES // 2), range(2))) == LINES // 2 * 2
        assert run.thread.is_alive() and run.saves == [] and not run.job.should_stop
    assert [record for record in caplog.records if record.exc_info] == []


# Random bytes to every parser...


@pytest.mark.parametrize("name", TARGETS)
def test_targets_hold_for_random_bytes(name, tmp_path, monkeypatch, caplog):
    """The targets of ``tox -e atheris``, for a short time, on every Python."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(coverage_fuzz, "_servers", [])
    from forgather_control.server import limits

    for bound in ("FILES_TIMEOUT", "FILES_CPU_SLICE"):  # one tick takes all files of a target, however slow it is
        monkeypatch.setattr(limits, bound, SOON)
    caplog.set_level(logging.CRITICAL + 1, "forgather_control")
    dice, target = random.Random(f"{SEED} {name}"), TARGETS[name]
    for seed in target.seeds:
        target.run(seed)
    for _ in range(some(100 if name in ("requests", "words") else 1000)):
        seed = dice.choice(target.seeds)
        try:
            data = odd_text(dice, json.loads(seed))
        except ValueError:
            data = seed
        target.run(data if dice.random() < 0.5 else mutated(dice, data))


# Batches...

ITEMS: list[Callable[[random.Random], Any]] = [
    lambda dice: {"jsonrpc": "2.0", "method": "ping", "id": dice.randrange(1000)},
    lambda dice: {"jsonrpc": "2.0", "method": "ping"},
    lambda dice: {"jsonrpc": "2.0", "method": "nosuch", "id": str(dice.random())},
    lambda dice: {"jsonrpc": "2.0", "method": "nosuch"},
    lambda dice: {"jsonrpc": "2.0", "method": "ping", "id": dice.choice([None, -1.5, "", "\u00e4\n"])},
    lambda dice: {"jsonrpc": "2.0", "method": "ping", "id": dice.choice([True, [], {}, [1]])},
    lambda dice: {"jsonrpc": dice.choice(["1.0", 2, None]), "method": "ping", "id": 7},
    lambda dice: {"method": "ping", "id": "old"},
    lambda dice: dice.choice([1, "ping", None, [], {}, [[]], [{"jsonrpc": "2.0", "method": "ping", "id": 1}], 1e308]),
]


def batches(dice: random.Random, number: int) -> Iterator[bytes]:
    """Yield batches of every size at the limits, of one kind or mixed; some are nested in another list."""
    most = jsonrpc.MAX_BATCH
    for size in itertools.islice(itertools.cycle([0, 1, 2, most - 1, most, most + 1, 13]), number):
        kinds = dice.choice([ITEMS, ITEMS[:5], [dice.choice(ITEMS)]])
        batch = [dice.choice(kinds)(dice) for _ in range(size)]
        yield json.dumps([batch] if dice.random() < 0.05 else batch).encode()


def test_batches_are_answered_as_the_specification_says(jobs_dir, quick):
    """Each batch gets one reply line, with one reply for each request that is no notification, in order."""
    with running_loop() as run, Wire(jobs_dir / "job" / "control.sock") as wire:
        for line in batches(random.Random(SEED), some(140)):
            want = expected(line, lambda method: method != "ping")
            wire.send(line + b"\n")
            if want.replies is not None:
                agrees(wire.line(), want)
            wire.send(b'{"jsonrpc": "2.0", "method": "ping", "id": "mark"}\n')
            assert wire.reply()["id"] == "mark"
        assert run.thread.is_alive()


# Cuts...

LINES_TO_CUT = [
    *[line for line in TARGETS["line"].seeds if b"break" not in line],
    b"", b" \r", b"\xff\xfe", b"nonsense", b'{"jsonrpc": "2.0", "method": "refuse", "id": 1}\r', b"\0", b"[1, 2, [[]]]",
    '{"jsonrpc": "2.0", "method": "\u00e4\u4e2d\U0001f600", "id": "\u00e4"}'.encode(), b'{"id": 1, "id": 2}',
    b'{"jsonrpc": "2.0", "method": "last", "id": "without a newline"}',
]  # fmt: skip


def served(pieces: list[bytes]) -> bytes:
    """Return the replies to a stream that arrives in these pieces, each read before the next is sent."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.setblocking(False)
        served, dispatcher, replies = Connection(ours, jsonrpc.MAX_LINE), Dispatcher(echo), b""
        for piece in [*pieces, b""]:
            theirs.sendall(piece) if piece else theirs.shutdown(socket.SHUT_WR)
            for _ in range(len(piece) // jsonrpc.MAX_LINE + 1):
                served.read()
                while (line := served.take_line()) is not None:
                    dispatcher.dispatch(served, line)
            with suppress(BlockingIOError):
                replies += theirs.recv(1 << 20)
        assert served.at_end and served.is_idle and not served.broken
    return replies


def cut(dice: random.Random, data: bytes, number: int) -> list[bytes]:
    """Cut the data at ``number`` random places."""
    places = [0, *sorted(dice.randrange(len(data)) for _ in range(number)), len(data)]
    return [piece for piece in map(lambda a, b: data[a:b], places, places[1:]) if piece]


def test_where_a_stream_is_cut_changes_nothing():
    """Cut at every byte, in random pieces, and byte by byte: the same bytes are replied as to the whole."""
    dice, data = random.Random(SEED), b"\n".join(LINES_TO_CUT)
    whole = served([data])
    assert whole.count(b"\n") == len(LINES_TO_CUT) - 1, "all but the notification"
    for place in range(dice.randrange(1, 10), len(data), max(1, 100_000 // LINES)):
        assert served([data[:place], data[place:]]) == whole
    for _ in range(some(50)):
        assert served(cut(dice, data, dice.randrange(30))) == whole
    assert served([data[place : place + 1] for place in range(len(data))]) == whole


@pytest.mark.parametrize("more", [-1, 0, 1, 2, 1000])
def test_where_a_longest_line_is_cut_changes_nothing(more):
    """At the limit the line and the next one are answered; beyond it one error is, and nothing after it."""
    dice = random.Random(SEED + more)
    line = jsonrpc.request("x", ["y" * (jsonrpc.MAX_LINE - 52 + more)], 1)
    line = line.replace(b"y", b"y" * (jsonrpc.MAX_LINE + more - len(line) + 2), 1)
    assert len(line) == jsonrpc.MAX_LINE + more + 1
    data = line + jsonrpc.request("after", [], 2)
    whole = served([data])
    assert whole.count(b"\n") == (2 if more <= 0 else 1)
    for _ in range(some(20)):
        assert served(cut(dice, data, dice.randrange(6))) == whole
    for place in (jsonrpc.MAX_LINE - 1, jsonrpc.MAX_LINE, jsonrpc.MAX_LINE + 1, len(line) - 1, len(line)):
        assert served([data[:place], data[place:]]) == whole


def test_an_unauthenticated_client_may_send_in_pieces():
    """Over TCP, with the token in the first line, each piece read before the next is sent: the same replies."""
    dice = random.Random(SEED)
    data = jsonrpc.request("authenticate", {"token": coverage_fuzz.TOKEN}, "auth") + b"\n".join(LINES_TO_CUT[:6])

    def asked(pieces: list[bytes]) -> bytes:
        with Wire(server.at) as wire:
            for piece in pieces:
                wire.send(piece)
                other.call("x")  # once this is answered, the piece has been read
            wire.sock.shutdown(socket.SHUT_WR)
            return wire.file.read()

    with serving_tcp(echo) as server, Wire(server.at) as other:
        assert other.authenticate(coverage_fuzz.TOKEN)["id"] == "auth"
        whole = asked([data])
        assert whole.count(b"\n") == 6, "all but the notification"
        for _ in range(some(40)):
            assert asked(cut(dice, data, dice.randrange(6))) == whole


# endpoint.json...

ODD: list[Any] = [
    None, True, 0, -5, 1.5, "123", "", "../../x", "/abs", "\ud800", "\0", "\x1b[2J\n", [], {}, [[[]]], {"a": {"b": 1}},
    2**31, 10**30, -(10**400), float("nan"), float("inf"), 1e300, "x" * 300, "x" * 70_000, ["x"] * 9000,
]  # fmt: skip


def oddly(dice: random.Random, value: Any) -> Any:
    """Return the JSON value with something odd in it, something missing, or something added."""
    if not isinstance(value, (dict, list)) or not value or dice.random() < 0.05:
        return dice.choice(ODD)
    found = dict(value) if isinstance(value, dict) else list(value)
    place = dice.choice(list(found)) if isinstance(found, dict) else dice.randrange(len(found))
    kind = dice.randrange(5)
    if kind == 0:
        del found[place]
    elif kind == 1 and isinstance(found, dict):
        found[dice.choice(["more", "", "__class__", "\ud800"])] = dice.choice(ODD)
    else:
        found[place] = oddly(dice, found[place])
    return found


def odd_text(dice: random.Random, value: Any) -> bytes:
    """Return such a value as text, perhaps with the text itself changed, or nested very deeply."""
    for _ in range(dice.randrange(3)):
        value = oddly(dice, value)
    data = json.dumps(value).encode()
    kind = dice.randrange(8)
    if kind == 0:
        return mutated(dice, data)
    return data.replace(b"1", b"[" * 30_000, 1) if kind == 1 else data


def put_odd(dice: random.Random, path: Path, outside: Path, data: bytes) -> None:
    """Put something in the place of a file: mostly a file, which may be huge."""
    kind = dice.randrange(16)
    if kind == 0:
        os.mkfifo(path)
    elif kind == 1:
        path.mkdir()
        (path / "within").write_bytes(data)
    elif kind == 2:
        path.symlink_to(dice.choice(["/dev/zero", outside / "victim", outside, path, "nowhere", "/proc/self/mem"]))
    elif kind == 3:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(str(path.parent / "s"))  # the name may be too long for it
        (path.parent / "s").rename(path)
    elif kind == 4:
        with open(path, "wb") as file:
            file.write(data)
            file.truncate(10 << 20)
    elif kind == 5:
        path.hardlink_to(outside / "victim")
    elif kind != 6:
        path.write_bytes(data)
        path.chmod(dice.choice([0o600, 0o666, 0o000]))


def clear(folder: Path, *but: str) -> None:
    """Remove everything in a folder, and nothing behind its links."""
    for path in [path for path in folder.iterdir() if path.name not in but]:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)  # the job may have taken it meanwhile
        else:
            path.unlink(missing_ok=True)


def snapshot(folder: Path) -> dict[str, object]:
    """Return everything in a folder: kinds, modes, times of change and contents."""
    found: dict[str, object] = {}
    for path in [folder, *folder.rglob("*")]:
        facts = path.lstat()
        is_file = stat.S_ISREG(facts.st_mode)
        found[str(path)] = (facts.st_mode, facts.st_mtime_ns, path.read_bytes() if is_file else None)
    return found


@pytest.fixture
def outside(tmp_path):
    """Files outside the jobs directory; they must be unchanged at the end of the test."""
    (tmp_path / "victim").write_bytes(
        jsonrpc.request("graceful_stop", {}, 1)
    )  # its effect would be seen if it was read
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "endpoint.json").write_text("{}")
    before = snapshot(tmp_path)
    yield tmp_path
    assert snapshot(tmp_path) == before


def dead_pid() -> int:
    """Return the pid of a process that has ended."""
    with subprocess.Popen(["true"]) as process:
        return process.pid


def a_record(job_id: str, pid: int) -> dict[str, Any]:
    """Return a record as a job of this host publishes it."""
    return {
        "job_id": job_id, "host": socket.gethostname(), "port": None, "pid": pid, "started_at": 1.7e9,
        "process_started_at": 1.7e9, "boot_id": None, "socket": "/nowhere/s", "world_size": 2, "protocol": 1,
        "version": "1", "user": "me", "address": None, "token": None, "tls_sha256": None, "machine": None,
        "booted_at": 1.6e9, "pid_namespace": None, "launch": {"slurm_job_id": 5, "run_id": "r", "restart_count": 1},
    }  # fmt: skip


def odd_record(dice: random.Random, job_id: str, pid: int, sockets: list[str]) -> bytes:
    """Return a spoiled record; mostly with the right job id, because others are refused at once."""
    value = a_record(job_id, pid)
    kind = dice.randrange(4)
    if kind == 0:
        value["socket"] = dice.choice(
            [*sockets, "", "\0abstract", "/etc/passwd", "/dev/null", "x" * 200, "\ud800", "\udc80"]
        )
    elif kind == 1:  # no name that a resolver would look up
        value |= {"socket": None, "address": dice.choice(["127.0.0.1", "", "::1", "\ud800", "\0", "x" * 300])}
        value["port"] = dice.choice([0, 1, -1, 65535, 65536, 70_000, 2**31, 2**64, 10**400])
    return odd_text(dice, value)


def strew(dice: random.Random, root: Path, number: int, outside: Path, sockets: list[str]) -> list[str]:
    """Make ``number`` job directories that are broken in some way; return their names."""
    names, pid = [], dead_pid()
    for place in range(number):
        name = f"bad-{place}"
        folder = root / dice.choice(
            [name] * 20 + [f"bad {place}\n", f".bad-{place}", f"-bad{place}", f"b\udcff{place}"]
        )
        if dice.random() < 0.05:
            put_odd(dice, folder, outside, b"")
        else:
            folder.mkdir()
            put_odd(dice, folder / "endpoint.json", outside, odd_record(dice, name, dice.choice([pid, 1]), sockets))
        names.append(name)
    return names


def ours_only(ask: Callable[[], Any]) -> Any:
    """Return the answer; ``None`` where it is a ControlError."""
    with suppress(ControlError):
        return ask()


def test_no_record_hides_a_good_one_or_reaches_outside(jobs_dir, outside, capsys):
    """List, ask and clean up among hundreds of broken jobs: only ControlErrors, promptly, and the good job stays."""
    dice = random.Random(SEED)
    with running_loop("good") as run:
        mine, before = set(os.listdir(jobs_dir / "good")), descriptors()
        for _ in range(some(6)):
            names = strew(dice, jobs_dir, 50, outside, [str(jobs_dir / "good" / "control.sock")])
            states = {job.job_id: job.state for job in api.list_jobs(SOON)}
            assert states["good"] == "live" and "live" not in {states.get(name) for name in names}
            for name in names:
                ours_only(lambda name=name: api.connect(name).close())
            for words in (["list"], ["list", "--json"], *(["status", dice.choice(names)] for _ in range(5))):
                assert main.main(words) in range(6)
            assert find("good").job_id == "good" and api.get_job_status()["job_id"] == "good"
            dead = [name for name, state in states.items() if state == "dead"]
            assert main.main(["cleanup", "--force"]) == 0 and not [name for name in dead if (jobs_dir / name).exists()]
            said = capsys.readouterr()
            assert set(said.out + said.err) <= {"\n", *filter(str.isprintable, said.out + said.err)}
            clear(jobs_dir, "good", ".lock")
        assert mine <= set(os.listdir(jobs_dir / "good")) and run.thread.is_alive()
        until(lambda: descriptors() <= before)


def test_a_record_may_change_while_it_is_read(jobs_dir, outside):
    """A record is rewritten in place, replaced and removed all the time: the good job is listed each time."""
    dice, over = random.Random(SEED), threading.Event()
    path = jobs_dir / "changing" / "endpoint.json"

    def change() -> None:
        while not over.is_set():
            data = odd_record(dice, "changing", 1, [])
            if path.is_file() and dice.random() < 0.8:
                with open(path, "r+b") as file:
                    file.write(data[: len(data) // 2])
                    file.flush()
                    file.write(data[len(data) // 2 :])
                    file.truncate()
                continue
            clear(path.parent)
            with suppress(FileNotFoundError):
                put_odd(dice, path, outside, data)
                if path.is_symlink() or os.path.samefile(path, outside / "victim"):
                    path.unlink()  # or it would be written through

    with running_loop("good"):
        path.parent.mkdir()
        changer = threading.Thread(target=change)
        changer.start()
        try:
            for _ in range(some(200)):
                assert "good" in [job.job_id for job in api.list_jobs(SOON)]
                ours_only(lambda: find("changing"))
        finally:
            over.set()
            changer.join(SOON)
        assert not changer.is_alive()


# requests/...


def odd_name(dice: random.Random) -> bytes:
    """Return the name of a file in ``requests/``: of a request, or nearly so."""
    names = [
        b"%d.json",
        b"a%d",
        b"%d.json ",
        b".%d.json",
        b"-%d.json",
        b"%d\n.json",
        b"\xff%d.json",
        b"%d.JSON",
        b"%d.json.json",
    ]
    name = dice.choice(names) % dice.randrange(10**9)
    return name if dice.random() < 0.9 else name.ljust(dice.choice([123, 124, 250]), b"x") + b".json"


def drop(dice: random.Random, box: Path, outside: Path) -> Path | None:
    """Put one odd thing into ``requests/``; return its path if it is no request file."""
    path = Path(os.fsdecode(os.path.join(os.fsencode(box), odd_name(dice))))
    with suppress(FileExistsError, FileNotFoundError):  # the job may have taken it meanwhile
        put_odd(dice, path, outside, mutated(dice, request(dice)))
        facts = path.lstat()
        return None if stat.S_ISREG(facts.st_mode) and facts.st_nlink == 1 else path
    return None


def test_requests_among_rubbish_are_answered_once(jobs_dir, outside, quick, caplog):
    """Among FIFOs, links, directories, huge files, odd names and contents, each valid request is carried out once."""
    dice, number = random.Random(SEED), itertools.count()
    home = jobs_dir / "job"
    with running_loop() as run, caplog.at_level(logging.WARNING):
        for _ in range(some(4)):
            good, others = {f"good-{next(number)}" for _ in range(20)}, []
            for name in dice.sample(sorted(good), len(good)):
                others += [drop(dice, home / "requests", outside) for _ in range(5)]
                line = jsonrpc.request("save_checkpoint", {"command_id": name}, name)
                with spool.opened(str(home), spool.REQUESTS, spool.directory_id(str(home))) as box:
                    private_files.write(box, f"{name}.json", line)
            until(lambda good=good: all((home / "replies" / f"{name}.json").exists() for name in good))
            for name in good:
                reply = strict((home / "replies" / f"{name}.json").read_bytes())
                assert reply["id"] == name and reply["result"]["command_id"] == name
            records = run.job._controller._queries.list_commands()
            assert sorted(record["command_id"] for record in records if record["command_id"] in good) == sorted(good)
            assert all(path is None or os.path.lexists(path) for path in others), (
                "something that is no request file was taken"
            )
            before = run.steps
            until(lambda before=before: run.steps > before + 2)
            clear(home / "requests")
            clear(home / "replies")
        assert not run.job.should_stop
    assert [record for record in caplog.records if record.exc_info] == []


@pytest.mark.parametrize("name", ["status.json", "requests", "replies"])
def test_what_stands_in_the_way_of_its_files_ends_no_job(name, jobs_dir, outside, quick):
    """A FIFO, a link, a directory or a socket in the place of the job's files: it trains, and its socket answers."""
    dice = random.Random(SEED)
    home = jobs_dir / "job"
    with running_loop() as run, Wire(home / "control.sock") as wire:
        for _ in range(some(20)):
            (home / "new").mkdir()
            put_odd(dice, home / "new" / name, outside, b"{}")
            with suppress(OSError):  # the job has made it again
                (home / name).rename(home / "new" / "old")
                (home / "new" / name).rename(home / name)
            clear(home / "new")
            (home / "new").rmdir()
            before = run.steps
            until(lambda before=before: run.steps > before + 2)
            assert wire.call("ping")["result"]["job_id"] == "job"
    assert run.saves == []


# Replies...


ROW = {"rank": 0, "host": "h", "pid": 1, "state": "training", "step": 5, "rss_bytes": 1, "stacks": "x"}
RECORD = {"command_id": "c", "command": "abort", "state": "accepted", "requested_at": 1.0, "error": None}
STATUS = {
    "job_id": "bad", "status": "training", "global_step": 5, "epoch": 0.5, "max_steps": 10, "metrics": {"loss": 1.5},
    "progress": 0.5, "steps_per_second": 2.0, "eta_seconds": 2.5, "seconds_since_step": 0.1, "host": "h", "pid": 1,
    "world_size": 2, "started_at": 1.7e9, "commands": [RECORD], "rss_bytes": 1, "cpu_percent": 1.0,
}  # fmt: skip
RESULTS: list[Any] = [STATUS, RECORD, {**RECORD, "state": "failed", "error": {"code": 1, "message": "no"}}, [ROW]]


def odd_reply(dice: random.Random, id_: Any) -> bytes:
    """Return one line: a reply that is right, nearly right, or far from it."""
    value: dict[str, Any] = {"jsonrpc": "2.0", "id": id_, "result": dice.choice(RESULTS)}
    if dice.random() < 0.3:
        del value["result"]
        value["error"] = {"code": dice.choice([-32000, -32002, -32603, 5]), "message": "no", "data": RECORD}
    return odd_text(dice, value)


@contextmanager
def odd_job(jobs_dir: Path, dice: random.Random) -> Iterator[None]:
    """A job of a process that has ended, whose socket answers each connection once, oddly."""
    (jobs_dir / "bad").mkdir(parents=True)
    value = {**a_record("bad", dead_pid()), "socket": str(jobs_dir / "bad" / "s")}
    (jobs_dir / "bad" / "endpoint.json").write_text(json.dumps(value))

    def answer() -> None:
        while True:
            sock, _ = server.accept()
            with sock, sock.makefile("rb") as file:
                line = file.readline()
                if not line:
                    return
                with suppress(OSError):
                    sock.sendall(odd_reply(dice, json.loads(line)["id"]) + dice.choice([b"\n", b"\n", b"\n\n", b""]))

    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(jobs_dir / "bad" / "s"))
        server.listen()
        thread = threading.Thread(target=answer)
        thread.start()
        yield
        Wire(jobs_dir / "bad" / "s").close()
        thread.join(SOON)
        assert not thread.is_alive()


def ask_oddly(dice: random.Random, job: api.Client) -> None:
    """Make one of the calls that parse their answer."""
    method = dice.choice(["status", "list_jobs", "ranks", "stacks", "get_command", "save_checkpoint"])
    if method == "get_command":
        api.CommandRecord.from_json(job.call(method, command_id="c"))
    elif method == "save_checkpoint":
        assert job.command(method).command_id
    else:
        job.call(method)


def test_a_broken_reply_is_a_control_error(jobs_dir, capsys):
    """A reply over a socket gives a value or a ControlError; never a traceback, never a wait."""
    dice = random.Random(SEED)
    with odd_job(jobs_dir, random.Random(SEED + 1)):
        for _ in range(some(500)):
            with suppress(ControlError), api.connect("bad", SOON) as job:
                ask_oddly(dice, job)
        for _ in range(some(50)):
            assert {job.job_id for job in api.list_jobs()} == {"bad"}
            assert main.main(["list"]) == 0
        for words in (["status"], ["save"], ["save", "--wait"], ["ranks"], ["stacks"], ["status", "--json"]):
            for _ in range(some(15)):
                assert main.main([*words, "bad"]) in range(6)
    assert capsys.readouterr().out.replace("\n", "").isprintable()


def test_a_broken_reply_file_is_a_control_error(jobs_dir, outside, monkeypatch):
    """The same for replies in ``replies/``, beside a status.json that is a directory; what is no file is no reply."""
    monkeypatch.setattr("forgather_control.client.file_transport._PAUSES", (MS, 10 * MS))
    dice, theirs, over = random.Random(SEED), random.Random(SEED + 1), threading.Event()
    home = jobs_dir / "bad"
    for box in ("requests", "replies"):
        (home / box).mkdir(parents=True)
    (home / "endpoint.json").write_text(json.dumps({**a_record("bad", os.getpid()), "socket": None}))
    (home / "status.json").mkdir()

    def answer() -> None:
        while not over.wait(MS):
            for path in (home / "requests").glob("*.json"):
                with suppress(FileNotFoundError):  # it was withdrawn
                    id_ = json.loads(path.read_bytes())["id"]
                    path.unlink()
                    put_odd(theirs, home / "new", outside, odd_reply(theirs, id_))
                    (home / "new").rename(home / "replies" / path.name)

    answering = threading.Thread(target=answer)
    answering.start()
    try:
        for _ in range(some(60)):
            with suppress(ControlError), Client(FileTarget("bad", "bad", find("bad")), 0.1) as job:
                ask_oddly(dice, job)
    finally:
        over.set()
        answering.join(SOON)
    assert not answering.is_alive()
