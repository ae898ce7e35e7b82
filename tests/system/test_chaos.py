"""Random faults of all kinds at once against live training runs: same weights as without faults, nothing is lost.

Three jobs train (a plain loop; one with a TCP port; two ranks under torchrun) while their files are deleted, damaged
and replaced by links, their disk fills up, the clock jumps, clients are killed, floods arrive, subscribers come and go,
the jobs fork and are suspended, other jobs die by ``kill -9``, execute themselves anew, are begun again, renamed, cut
off in a save or left without space, and ``cleanup --force`` runs without a pause. Meanwhile saves are requested in
every way, and each accepted one is followed to its end.

FORGATHER_CHAOS_SECONDS and FORGATHER_CHAOS_SEED set the duration and the seed; ``tox -e chaos`` takes two minutes. The
seed determines what each thread does, and in which order; what coincides depends on the machine.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import mmap
import os
import random
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from forgather_control import ControlError, connect
from forgather_control.errors import DeadlinePassed
from forgather_control.jobs import private_files, spool
from forgather_control.states import COMMAND_STATES, EVENT_KINDS, FINAL_STATES
from forgather_control.wire.records import CommandRecord

from ..support.chaos_runs import Runs
from ..support.harness import JOB, ROOT, SOON, Process, Wire, cli, needs_torch, until
from ..support.torchrun import START, Torchrun
from .test_fuzz import mutated, request

SECONDS = float(os.environ.get("FORGATHER_CHAOS_SECONDS", "10"))
SEED = int(os.environ.get("FORGATHER_CHAOS_SEED", "20261125"))
#: Threads that make faults, beside the one that cleans up.
FAULT_THREADS = 3

#: The clock of all processes here but this one: the machine's, shifted by the number in the file CHAOS_CLOCK. The
#: machine's clock must not jump, because others use it. The kernel's boot time is shifted, too.
CLOCK = """
import mmap, os, time
from psutil import _pslinux

with open(os.environ["CHAOS_CLOCK"], "rb") as file:
    shift = memoryview(mmap.mmap(file.fileno(), 8, access=mmap.ACCESS_READ)).cast("d")
real, real_ns, booted = time.time, time.time_ns, _pslinux.boot_time
time.time = lambda: real() + shift[0]
time.time_ns = lambda: real_ns() + int(shift[0] * 1e9)
_pslinux.boot_time = lambda: booted() + shift[0]
"""
JUMPS = (0.0, 1.0, -1.0, 3600.0, -3600.0, 86400.0, -86400.0, 3e8, -3e8)
#: A pid that no process has, beyond Linux's highest (proc(5), pid_max).
FREE_PID = 1 << 22

SAVE = b'{"jsonrpc":"2.0","id":1,"method":"save_checkpoint"}'
SUBSCRIBE = b'{"jsonrpc":"2.0","id":1,"method":"subscribe","params":{"since":0}}\n'


# The jobs under test...


class Ledger:
    """What clients were told about the commands of one job."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.records: dict[str, dict[str, Any]] = {}
        self.refused: set[str] = set()  # requests that must never be carried out
        self._lock = threading.Lock()

    def note(self, record: dict[str, Any]) -> None:
        """Note a record that a client received, now or earlier. A final one must never change."""
        with self._lock:
            known = self.records.get(record["command_id"])
            if known is not None and known["state"] in FINAL_STATES:
                assert record["state"] not in FINAL_STATES or record == known, (record, known)
            elif known is None or COMMAND_STATES.index(record["state"]) >= COMMAND_STATES.index(known["state"]):
                self.records[record["command_id"]] = record
                if record["state"] == "finished":
                    self.is_on_disk(record)

    def is_on_disk(self, record: dict[str, Any]) -> list[str]:
        """Assert that each rank's part is there, of the right step; return the digests of their weights."""
        path, step = Path(record["result"]["path"]), record["result"]["step"]
        parts = [json.loads((path / f"rank-{rank}.json").read_text()) for rank in range(self.size)]
        assert all((path / f"rank-{rank}.pt").is_file() for rank in range(self.size)), record
        assert all(part["step"] == step == record["applied_at_step"] for part in parts), record
        return [part["digest"] for part in parts]

    def open(self) -> list[str]:
        """Return the commands that are not final, as far as is known."""
        with self._lock:
            return [name for name, record in self.records.items() if record["state"] not in FINAL_STATES]


class Victim:
    """One training run, and the one connection to it that stays open from before the faults until after them."""

    def __init__(self, folder: Path, jobs: Path, name: str, size: int, running: Process | Torchrun) -> None:
        self.folder, self.name, self.size, self.running = folder, name, size, running
        self.path = jobs / name
        self.files_lock = threading.Lock()  # held by the thread that damages its files
        self.ledger = Ledger(size)
        files = [folder / f"{name}-{rank}.pid" for rank in range(size)]
        until(lambda: all(file.exists() for file in files), START)
        self.pids = [int(file.read_text()) for file in files]
        self.client = connect(name, 6 * SOON)
        record = json.loads((self.path / "endpoint.json").read_text())
        self.port, self.token = record["port"], record["token"]
        self.step = 0
        #: Where floods go to.
        self.addresses: list[Path | tuple[str, int]] = [self.path / "control.sock"]
        if self.port:
            self.addresses.append(("127.0.0.1", self.port))

    def end(self) -> None:
        """Close the connection, and print the job's output, as Torchrun does by itself."""
        self.client.close()
        if isinstance(self.running, Process):
            print(self.name, self.errors, sep="\n")

    @property
    def errors(self) -> str:
        """The output of the job."""
        return self.running.output if isinstance(self.running, Torchrun) else "".join(self.running.errors)

    def watch(self, over: threading.Event) -> None:
        """Follow every command over the connection that must outlive all faults, and check that training continues."""
        turn = 0
        while not over.wait(0.2):
            turn += 1
            step = self.client.call("status")["global_step"]
            assert step >= self.step, "the step went back"
            self.step = step
            self.look(everything=turn % 10 == 0)

    def look(self, everything: bool = True) -> list[str]:
        """Update the records that are not final, and find new ones; return the commands that are still not final."""
        for record in self.client.call("list_commands") if everything else ():
            self.ledger.note(record)
        for name in self.ledger.open():
            self.ledger.note(
                self.client.call("get_command", command_id=name)
            )  # it is never unknown, because nothing is lost
        return self.ledger.open()

    def uses(self) -> list[tuple[int, int]]:
        """Return the number of threads and descriptors of each rank."""
        return [(len(os.listdir(f"/proc/{pid}/task")), len(os.listdir(f"/proc/{pid}/fd"))) for pid in self.pids]

    def is_whole(self) -> bool:
        """Return whether it can be found, answers at its socket, and has all its files."""
        names = {"endpoint.json", "control.sock", "lock", "requests", "replies", "status.json"}
        try:
            with connect(self.name) as client:
                answers = client.call("ping")["pid"] == self.pids[0]
            record = json.loads((self.path / "endpoint.json").read_text())
            return answers and record["pid"] == self.pids[0] and names <= set(os.listdir(self.path))
        except (ControlError, OSError):
            return False


# Clients...


class Commander:
    """Requests saves of one job in every way, and notes all answers in the ledger."""

    def __init__(self, victim: Victim) -> None:
        self.victim, self.ledger = victim, victim.ledger
        self.dice = random.Random(f"{SEED} {victim.name}")
        self.ids: list[str] = []
        self.files: list[tuple[str, str]] = []  # request files: their names and command ids
        self.asked: Counter[str] = Counter()

    def run(self, over: threading.Event) -> None:
        """Send requests until the faults are over."""
        ways = [self.by_client, self.by_client, self.by_client, self.and_cancel, self.by_file, self.by_touch]
        while not over.wait(self.dice.random() * 0.2):
            way = self.dice.choice(ways)
            self.asked[way.__name__] += 1
            # At the moment the job may be impossible to find, to connect to or to write to.
            with contextlib.suppress(ControlError, OSError):
                way()
            self.read_replies()

    def new_id(self) -> str:
        """Return a new command id, or sometimes a recent one again."""
        if not self.ids or self.dice.random() < 0.9:
            self.ids.append(f"{self.victim.name}-{len(self.ids)}")
            return self.ids[-1]
        return self.dice.choice(self.ids[-5:])

    def by_client(self) -> None:
        """Request a save as a Python program does, over the socket or the port."""
        params: dict[str, Any] = {"command_id": self.new_id(), "wait": self.dice.choice(COMMAND_STATES[:3])}
        if self.dice.random() < 0.5:
            params["timeout"] = self.dice.choice([0, 0.01, 0.1, 5])
        way = {}
        if self.victim.port and self.dice.random() < 0.7:
            way = {"at": f"tcp://127.0.0.1:{self.victim.port}", "token": self.victim.token}
        cancels = self.dice.random() < 0.2
        with connect(self.victim.name, **way) as client:
            try:
                self.ledger.note(client.call("save_checkpoint", **params))
            except DeadlinePassed as err:
                self.ledger.note({name: err.data[name] for name in CommandRecord._fields})
            if cancels:
                self.ledger.note(client.call("cancel_command", command_id=params["command_id"]))

    def and_cancel(self) -> None:
        """Send two requests at once, the second of which cancels the first if it is early enough."""
        params = {"command_id": self.new_id()}
        lines = [
            {"jsonrpc": "2.0", "id": method, "method": method, "params": params}
            for method in ("save_checkpoint", "cancel_command")
        ]
        with Wire(self.victim.path / "control.sock") as wire:
            wire.send(b"".join(json.dumps(line).encode() + b"\n" for line in lines))
            for _ in lines:
                reply = wire.reply()
                if "result" in reply:
                    self.ledger.note(reply["result"])

    def by_file(self) -> None:
        """Put a file into ``requests/``, sometimes one from yesterday or tomorrow."""
        name, command_id = f"{self.dice.getrandbits(64):x}", f"{self.victim.name}-file-{self.dice.getrandbits(64):x}"
        age = self.dice.choice([0, 0, 0, 86400, -86400])
        line = {"jsonrpc": "2.0", "id": 1, "method": "save_checkpoint", "params": {"command_id": command_id}}
        with spool.opened(str(self.victim.path), spool.REQUESTS, spool.directory_id(str(self.victim.path))) as box:
            private_files.write(box, f".{name}", json.dumps(line).encode())
            if age:
                os.utime(f".{name}", (time.time() - age,) * 2, dir_fd=box)
            os.rename(f".{name}", f"{name}.json", src_dir_fd=box, dst_dir_fd=box)
        self.files.append((f"{name}.json", command_id))
        if age > 0:
            self.ledger.refused.add(command_id)

    def by_touch(self) -> None:
        """Make an empty request file, as a user in a shell does."""
        with spool.opened(str(self.victim.path), spool.REQUESTS, spool.directory_id(str(self.victim.path))) as box:
            os.close(os.open("save_checkpoint", os.O_CREAT | os.O_NOFOLLOW | os.O_WRONLY, 0o600, dir_fd=box))

    def read_replies(self) -> None:
        """Take the replies that have come; others were lost with their directory, or will never come."""
        with contextlib.suppress(OSError):
            path = str(self.victim.path)
            with spool.opened(path, spool.REPLIES, spool.directory_id(path)) as box:
                for name, command_id in self.files[-20:]:
                    with contextlib.suppress(FileNotFoundError):
                        found = spool.read(box, name, 1 << 20)
                        if found is not None:
                            spool.remove(box, name)
                            self.note_reply(command_id, json.loads(found[0]))

    def note_reply(self, command_id: str, reply: dict[str, Any]) -> None:
        """Note what a reply file says about a request."""
        if "result" in reply:
            assert reply["result"]["command_id"] == command_id
            self.ledger.note(reply["result"])

    def requests_left(self) -> list[str]:
        """Return the request files that the job has not taken yet."""
        return [name for name in os.listdir(self.victim.path / "requests") if not name.startswith(".")]


# Faults...


class Chaos:
    """The faults, each a method that undoes what would not go away by itself.

    Args:
        disk: a small file system is mounted at ``jobs``, to be filled.
        sentinel: a folder outside of the jobs directory, the target of links.
        clock: by how much all clocks are shifted, in seconds.
        runs: where runs that are started for one fault save.
    """

    #: How often each is chosen.
    FAULTS = {
        "kills_a_client": 2,
        "kills_a_job": 3,
        "stops_a_rank_for_a_moment": 3,
        "forks_in_a_training": 5,
        "deletes_a_file": 8,
        "deletes_a_directory": 2,
        "puts_a_link_in_its_place": 3,
        "spoils_a_record": 2,
        "makes_up_a_job": 6,
        "writes_garbage_into_a_job": 6,
        "floods_with_lines": 2,
        "floods_with_requests": 2,
        "floods_with_connections": 2,
        "never_reads": 2,
        "subscribes": 3,
        "fills_the_disk": 2,
        "jumps_in_time": 6,
        "holds_the_lock": 1,
        **dict.fromkeys(Runs.FAULTS, 1),
    }

    def __init__(
        self, jobs: Path, victims: list[Victim], sentinel: Path, clock: mmap.mmap, disk: bool, runs: Path
    ) -> None:
        self.jobs, self.victims, self.sentinel, self.clock = jobs, victims, sentinel, clock
        self.over = threading.Event()
        self.done: Counter[str] = Counter()
        privileged = ("fills_the_disk", *Runs.PRIVILEGED)
        self.faults = {name: often for name, often in self.FAULTS.items() if disk or name not in privileged}
        self.sacrifice: Process | None = None
        self.sacrifice_lock = threading.Lock()
        self.disk = threading.Lock()
        self.cleaned: Counter[str] = Counter()
        self.runs = Runs(jobs, runs, self.disk)

    def run(self, number: int) -> None:
        """Make faults in one thread until the time is over."""
        dice = random.Random(f"{SEED} {number}")
        first = list(self.faults)[number::FAULT_THREADS]  # each at least once, however short the time
        dice.shuffle(first)
        while first or not self.over.wait(dice.random() * 0.1):
            fault = first.pop() if first else dice.choices(list(self.faults), list(self.faults.values()))[0]
            if fault in Runs.FAULTS:
                getattr(self.runs, fault)()
            else:
                getattr(self, fault)(dice, dice.choice(self.victims))
            self.done[fault] += 1

    def cleans_up(self) -> None:
        """Run the real program again and again; note the jobs that it removed."""
        while not self.over.is_set():
            done = cli("cleanup", "--force", "--json")
            assert "Traceback" not in done.stderr, done.stderr
            self.cleaned.update(json.loads(done.stdout)["removed"] if done.returncode == 0 else ())
            self.done["cleans_up"] += 1

    # ... by signals

    def kills_a_client(self, dice: random.Random, victim: Victim) -> None:
        """Kill a client in the middle of its request, or before it."""
        words = [sys.executable, "-m", "forgather_control", "save", victim.name, "--wait"]
        client = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.over.wait(dice.random() * 0.6)
        client.kill()
        client.wait()

    def kills_a_job(self, dice: random.Random, victim: Victim) -> None:
        """Kill a job that is not under test; the next one has its id, at once or after it may have been cleaned up."""
        with self.sacrifice_lock:
            if self.sacrifice is not None:
                self.sacrifice.kill()
                self.sacrifice.__exit__()
                assert "Traceback" not in "".join(self.sacrifice.errors), self.sacrifice.errors
                self.sacrifice = None
                if dice.random() < 0.5:
                    return
            self.sacrifice = Process(JOB, "sacrifice")
            assert self.sacrifice.line() == "ready", self.sacrifice.errors

    def stops_a_rank_for_a_moment(self, dice: random.Random, victim: Victim) -> None:
        """Suspend a rank, as a debugger does, or a host that swaps."""
        pid = dice.choice(victim.pids)
        os.kill(pid, signal.SIGSTOP)
        try:
            self.over.wait(dice.random() * 0.8)
        finally:
            os.kill(pid, signal.SIGCONT)

    def forks_in_a_training(self, dice: random.Random, victim: Victim) -> None:
        """Make a rank fork, at whatever line it is."""
        os.kill(dice.choice(victim.pids), signal.SIGUSR1)

    # ... to files

    def deletes_a_file(self, dice: random.Random, victim: Victim) -> None:
        """Delete one file that the job wrote."""
        names = [
            "endpoint.json",
            "endpoint.json",
            "control.sock",
            "control.sock",
            "status.json",
            "ranks.json",
            "lock",
            "../.lock",
        ]
        with victim.files_lock, contextlib.suppress(OSError):
            os.unlink(victim.path / dice.choice(names))

    def deletes_a_directory(self, dice: random.Random, victim: Victim) -> None:
        """Delete the job's directory, or one in it."""
        with victim.files_lock:
            shutil.rmtree(victim.path / dice.choice(["requests", "replies", "."]), ignore_errors=True)

    def puts_a_link_in_its_place(self, dice: random.Random, victim: Victim) -> None:
        """Replace a file by a link out of the jobs directory for a while; following it would change the sentinel."""
        name = dice.choice(["", "requests", "replies", "endpoint.json", "control.sock", "status.json"])
        place = victim.path / name if name else victim.path
        target = self.sentinel / ("endpoint.json" if name.endswith(("json", "sock")) else "box")
        aside = self.jobs / f".aside-{threading.get_ident()}"
        with victim.files_lock:
            with contextlib.suppress(OSError):
                os.rename(place, aside)
                os.symlink(target, place)
            self.over.wait(dice.random() * 2)
            if place.is_symlink():
                place.unlink()
            with contextlib.suppress(OSError):
                aside.unlink()
        shutil.rmtree(aside, ignore_errors=True)

    def spoils_a_record(self, dice: random.Random, victim: Victim) -> None:
        """Replace the content of the record for a while: by nothing, half of it, another job's, or noise."""
        noise = dice.choice([b"", b"{", self.record("../../victim"), self.record("sacrifice"), dice.randbytes(99)])
        record = victim.path / "endpoint.json"
        with victim.files_lock, contextlib.suppress(OSError):
            try:
                record.write_bytes(noise)
                self.over.wait(dice.random() * 2)
            finally:
                record.unlink()

    def record(self, job_id: str, **members: Any) -> bytes:
        """Return the record of a dead job."""
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        known = {"job_id": job_id, "host": socket.gethostname(), "port": None, "pid": FREE_PID, "started_at": 1.0}
        return json.dumps({**known, "boot_id": boot, **members}).encode()

    def makes_up_a_job(self, dice: random.Random, victim: Victim) -> None:
        """Make a directory that never was a job's, or looks like a dead one's; its links lead to other places."""
        path = self.jobs / f"madeup-{dice.randrange(20)}"
        shutil.rmtree(path, ignore_errors=True)
        with contextlib.suppress(OSError):
            path.unlink()
        name, sock = path.name, str(victim.path / "control.sock")
        texts = [b"", b"[" * 1000, b"{}", dice.randbytes(1000), self.record(name), self.record(name, socket=sock)]
        texts += [
            self.record(job_id, socket=sock) for job_id in ("../../victim", f"../{victim.name}", victim.name, ".")
        ]
        texts += [self.record(name, pid=victim.pids[0], process_started_at=1.0, booted_at=0.0), b"x" * 100_000]
        with contextlib.suppress(OSError):
            if dice.random() < 0.2:
                path.symlink_to(dice.choice([self.sentinel, self.sentinel / "box", victim.path]))
                return
            path.mkdir()
            os.symlink(self.sentinel / "box", path / "requests")
            os.symlink(victim.path, path / "replies")
            if dice.random() < 0.2:
                (path / "endpoint.json").symlink_to(dice.choice([self.sentinel, victim.path]) / "endpoint.json")
            elif dice.random() < 0.1:
                os.mkfifo(path / "endpoint.json")
            else:
                (path / "endpoint.json").write_bytes(dice.choice(texts))

    def writes_garbage_into_a_job(self, dice: random.Random, victim: Victim) -> None:
        """Write garbage among its requests, replies and files."""
        box, name = (
            dice.choice([spool.REQUESTS, spool.REQUESTS, spool.REPLIES, "."]),
            f"{dice.randrange(50)}.json",
        )
        with victim.files_lock, contextlib.suppress(OSError):
            with spool.opened(str(victim.path), box, spool.directory_id(str(victim.path))) as place:
                match dice.randrange(6):
                    case 0:
                        os.symlink(self.sentinel / "box" / "save.json", name, dir_fd=place)
                    case 1:
                        os.mkfifo(name, dir_fd=place)
                    case 2:
                        os.mkdir(name, dir_fd=place)
                    case 3:
                        private_files.write(place, name, dice.randbytes(dice.choice([0, 10, 100_000])))
                    case 4:
                        private_files.write(place, name, mutated(dice, request(dice)))
                    case 5:
                        os.symlink(self.sentinel, dice.choice(["abort", "save_checkpoint", "x"]), dir_fd=place)

    def fills_the_disk(self, dice: random.Random, victim: Victim) -> None:
        """Fill the disk to the last byte for a while."""
        ballast = self.jobs / ".ballast"
        with self.disk:
            try:
                with contextlib.suppress(OSError), open(ballast, "wb", buffering=0) as file:
                    while True:
                        file.write(b"\0" * 65536)
                end = time.monotonic() + dice.random() * 2
                while time.monotonic() < end and not self.over.wait(0.05):
                    with contextlib.suppress(OSError), open(ballast, "ab", buffering=0) as file:
                        file.write(b"\0" * 65536)  # space that became free since
            finally:
                ballast.unlink(missing_ok=True)

    def holds_the_lock(self, dice: random.Random, victim: Victim) -> None:
        """Hold the lock of the jobs directory for up to a second."""
        with contextlib.suppress(OSError), open(self.jobs / ".lock", "ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            self.over.wait(dice.random())

    # ... over the wire

    def connection(self, dice: random.Random, victim: Victim) -> Wire | None:
        """Return a connection to one of its addresses, if it accepts any; over TCP with the token, or a wrong line."""
        address = dice.choice(victim.addresses)
        with contextlib.suppress(OSError):
            wire = Wire(address)
            wire.sock.settimeout(6 * SOON)
            if isinstance(address, tuple):
                known = {"jsonrpc": "2.0", "id": 0, "method": "authenticate", "params": {"token": victim.token}}
                first = [
                    json.dumps(known).encode(),
                    b"POST / HTTP/1.1",
                    b"\x16\x03\x01",
                    SAVE,
                    known["method"].encode(),
                ]
                wire.send(dice.choice([first[0], *first]) + b"\n")
            return wire
        return None

    def floods_with_lines(self, dice: random.Random, victim: Victim) -> None:
        """Send hundreds of random lines and disconnect."""
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            if wire := self.connection(dice, victim):
                stack.enter_context(wire)
                wire.send(b"".join(mutated(dice, request(dice)) + b"\n" for _ in range(dice.randrange(300))))

    def floods_with_requests(self, dice: random.Random, victim: Victim) -> None:
        """Send many requests at once; all are answered in order."""
        with contextlib.ExitStack() as stack:
            try:
                wire = stack.enter_context(Wire(victim.addresses[0]))
            except OSError:
                return
            wire.sock.settimeout(6 * SOON)
            number = dice.randrange(1, 1000)
            calls = [json.dumps({"jsonrpc": "2.0", "id": id, "method": "ping"}).encode() for id in range(number)]
            wire.send(b"\n".join(calls) + b"\n")
            assert [wire.reply()["id"] for _ in range(number)] == list(range(number))

    def floods_with_connections(self, dice: random.Random, victim: Victim) -> None:
        """Open hundreds of connections with half a line each, and close them at once, half of them by a reset."""
        wires = [wire for _ in range(dice.randrange(100, 300)) if (wire := self.connection(dice, victim))]
        for number, wire in enumerate(wires):
            with contextlib.suppress(OSError):
                wire.send(SAVE[: dice.randrange(len(SAVE))])
                if number % 2:
                    wire.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        for wire in wires:
            wire.close()

    def never_reads(self, dice: random.Random, victim: Victim) -> None:
        """Request long answers, or all events, and read nothing."""
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            if wire := self.connection(dice, victim):
                stack.enter_context(wire)
                wire.sock.settimeout(0.5)
                wire.send(dice.choice([SUBSCRIBE, b'{"jsonrpc":"2.0","id":1,"method":"rpc.discover"}\n' * 300]))
                self.over.wait(dice.random() * 2)

    def subscribes(self, dice: random.Random, victim: Victim) -> None:
        """Read events for a while: from the first that is kept, numbered in order, none twice."""
        with contextlib.ExitStack() as stack:
            try:
                wire = stack.enter_context(Wire(victim.addresses[0]))
            except OSError:
                return
            wire.sock.settimeout(6 * SOON)
            wire.send(SUBSCRIBE)
            assert wire.reply()["result"]["next"] > 1
            seq, end = 0, time.monotonic() + dice.random() * 2
            while seq == 0 or (time.monotonic() < end and not self.over.is_set()):
                event = wire.reply()["params"]
                assert event["seq"] > seq and event["kind"] in EVENT_KINDS, (seq, event)
                seq = event["seq"]

    # ... and to the clock

    def jumps_in_time(self, dice: random.Random, victim: Victim) -> None:
        """Set all clocks, except for the monotonic ones."""
        self.clock[:8] = struct.pack("d", dice.choice(JUMPS))


# The environment...


@contextlib.contextmanager
def small_disk(place: Path) -> Iterator[bool]:
    """Mount a file system that is soon full; yields whether that was possible."""
    place.mkdir(parents=True, mode=0o700)
    words = ["mount", "-t", "tmpfs", "-o", "size=4m,mode=0700", "tmpfs", str(place)]
    try:
        mounted = os.geteuid() == 0 and subprocess.run(words, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(place)], check=True)


@contextlib.contextmanager
def jumping_clock(folder: Path, patch: pytest.MonkeyPatch) -> Iterator[mmap.mmap]:
    """Shift the clock of every Python that is started from here on."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(CLOCK)
    (folder / "shift").write_bytes(bytes(8))
    patch.setenv("CHAOS_CLOCK", str(folder / "shift"))
    patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")])))
    with open(folder / "shift", "r+b") as file, mmap.mmap(file.fileno(), 8) as clock:
        yield clock


def sentinel_at(path: Path) -> Path:
    """Make what a followed link would change: a folder much like a job's."""
    (path / "box").mkdir(parents=True)
    (path / "endpoint.json").write_bytes(b"{}")
    (path / "box" / "save.json").write_bytes(SAVE)
    for name in ("save_checkpoint", "endpoint.json", "1.json"):
        (path / "box" / name).touch()
    return path


def fingerprint(path: Path) -> str:
    """Return a digest of a folder: names, kinds, times of change and contents."""
    found = hashlib.sha256()
    for each in sorted([path, *path.rglob("*")]):
        facts = each.lstat()
        found.update(f"{each} {facts.st_mode} {facts.st_nlink} {facts.st_mtime_ns} {facts.st_ctime_ns}\n".encode())
        if stat.S_ISREG(facts.st_mode):
            found.update(each.read_bytes())
    return found.hexdigest()


@contextlib.contextmanager
def trainings(folder: Path, jobs: Path) -> Iterator[list[Victim]]:
    """Run the three jobs."""
    source = "import sys; from tests.support.chaos_training import main; main(*sys.argv[1:])"
    with contextlib.ExitStack() as stack:
        running = [
            stack.enter_context(Process(source, str(folder), "plain", cwd=ROOT)),
            stack.enter_context(Process(source, str(folder), "port", "0", cwd=ROOT)),
            stack.enter_context(Torchrun("-m", "tests.support.chaos_training", str(folder), "ranks", ranks=2)),
        ]
        found = []
        for name, size, process in zip(("plain", "port", "ranks"), (1, 1, 2), running):
            found.append(Victim(folder, jobs, name, size, process))
            stack.callback(found[-1].end)
        yield found


def make_faults(chaos: Chaos, commanders: list[Commander]) -> None:
    """Run everything at once for SECONDS; raise what failed in a thread."""
    work: list[Callable[[], None]] = [lambda number=n: chaos.run(number) for n in range(FAULT_THREADS)]  # type: ignore[misc]
    work.append(chaos.cleans_up)
    work += [lambda one=one: one.run(chaos.over) for one in commanders]  # type: ignore[misc]
    work += [lambda one=one: one.watch(chaos.over) for one in chaos.victims]  # type: ignore[misc]
    with ThreadPoolExecutor(len(work)) as pool:
        try:
            pending = [pool.submit(each) for each in work]
            end = time.monotonic() + SECONDS
            while time.monotonic() < end and not any(each.done() for each in pending):
                time.sleep(0.05)
        finally:
            chaos.over.set()
    for each in pending:
        each.result()


# Checks...


def check_jobs(chaos: Chaos, commanders: list[Commander]) -> None:
    """Each job has its files and answers, and each command ends in a final state."""
    for victim, commander in zip(chaos.victims, commanders):
        until(victim.is_whole)
        until(lambda one=commander: not {name for name, _ in one.files} & {*one.requests_left()})
        commander.read_replies()
        until(lambda one=victim: one.look() == [])
        done = cli("save", victim.name, "--timeout=60", "--json")
        assert done.returncode == 0, done.stderr
        victim.ledger.note(json.loads(done.stdout))
        assert not victim.ledger.refused & victim.ledger.records.keys()
    assert not {victim.name for victim in chaos.victims} & chaos.cleaned.keys()


def check_cleanup(chaos: Chaos) -> None:
    """The killed job leaves nothing behind, and the live ones stay."""
    if chaos.sacrifice is not None:
        chaos.sacrifice.kill()
        chaos.sacrifice.__exit__()
    assert cli("cleanup", "--force").returncode == 0
    assert not (chaos.jobs / "sacrifice").exists()
    listed = json.loads(cli("list", "--json").stdout)
    assert {job["job_id"] for job in listed if job["state"] == "live"} == {victim.name for victim in chaos.victims}


def stop_all(victims: list[Victim]) -> dict[str, list[dict[str, Any]]]:
    """Stop the jobs with the command line; return each rank's report."""
    found = {}
    for victim in victims:
        done = cli("stop", victim.name, "--timeout=60")
        assert done.returncode == 0, done.stderr
        reports = [victim.folder / f"{victim.name}-{rank}.json" for rank in range(victim.size)]
        until(lambda reports=reports: all(report.exists() for report in reports))
        found[victim.name] = [json.loads(report.read_text()) for report in reports]
        assert not victim.path.exists()
    return found


def weights(folder: Path, steps: int) -> dict[int, list[str]]:
    """Return the weights after each step of undisturbed runs with one and two ranks."""
    words = [sys.executable, "-m", "tests.support.chaos_training", str(folder), "undisturbed", str(steps)]
    subprocess.run(words, cwd=ROOT, check=True)
    return {size: json.loads((folder / f"undisturbed-{size}.json").read_text()) for size in (1, 2)}


def check_weights(victim: Victim, reports: list[dict[str, Any]], undisturbed: list[str]) -> None:
    """Compare the weights at the end and in every checkpoint that a client was told of; all records are final."""
    for report in reports:
        assert report["steps"] == reports[0]["steps"] and report["digest"] == undisturbed[report["steps"]]
    for record in reports[0]["records"]:
        assert record["state"] in FINAL_STATES, record
        if record["command"] == "save_checkpoint":
            victim.ledger.note(record)
    for record in victim.ledger.records.values():
        assert record["state"] in ("finished", "cancelled"), record
        if record["state"] == "finished":
            assert set(victim.ledger.is_on_disk(record)) == {undisturbed[record["applied_at_step"]]}, record


@pytest.mark.once
@needs_torch
@pytest.mark.timeout(SECONDS + 300)
def test_nothing_is_lost_in_chaos(tmp_path, jobs_dir, monkeypatch):
    """The weights are the same, every command is final, every live job can be found, nothing outside has changed."""
    print(f"FORGATHER_CHAOS_SEED={SEED} FORGATHER_CHAOS_SECONDS={SECONDS:g}")
    sentinel, temporary = sentinel_at(jobs_dir.parent / "sentinel"), tmp_path / "tmp"
    temporary.mkdir()
    with contextlib.ExitStack() as stack:
        clock = stack.enter_context(jumping_clock(tmp_path / "clock", monkeypatch))
        disk = stack.enter_context(small_disk(jobs_dir))
        monkeypatch.setenv("TMPDIR", str(temporary))
        monkeypatch.setenv("HOME", str(temporary))
        before = fingerprint(sentinel)
        victims = stack.enter_context(trainings(tmp_path, jobs_dir))
        chaos = Chaos(jobs_dir, victims, sentinel, clock, disk, tmp_path / "runs")
        commanders = [Commander(victim) for victim in victims]
        warm = [victim.uses() for victim in victims]
        make_faults(chaos, commanders)
        check_jobs(chaos, commanders)
        check_cleanup(chaos)
        for victim, uses in zip(victims, warm):
            until(lambda one=victim, was=uses: all(map(is_no_more_than, one.uses(), was)))
        reports = stop_all(victims)
        undisturbed = weights(tmp_path, max(report[0]["steps"] for report in reports.values()))
        for victim in victims:
            check_weights(victim, reports[victim.name], undisturbed[victim.size])
            assert victim.running.end(2 * SOON) == 0, victim.errors
            assert "Traceback" not in victim.errors and "Exception" not in victim.errors, victim.errors
        assert fingerprint(sentinel) == before
        assert {path.name for path in jobs_dir.parent.iterdir()} == {"jobs", "sentinel"}
        assert not [path for path in temporary.rglob("*") if "forgather" in path.name]
    told = Counter(record["state"] for victim in victims for record in victim.ledger.records.values())
    print(summary(chaos, commanders, told, reports))
    assert told["finished"] and told["cancelled"] and chaos.done.keys() == {*chaos.faults, "cleans_up"}


def is_no_more_than(now: tuple[int, int], before: tuple[int, int]) -> bool:
    """Return whether the threads and descriptors are as before, except for a few that a library may open once."""
    return now[0] <= before[0] + 1 and now[1] <= before[1] + 3


def summary(chaos: Chaos, commanders: list[Commander], told: Counter[str], reports: dict[str, Any]) -> str:
    """Return all figures in one line."""
    asked = sum((commander.asked for commander in commanders), Counter())
    return (
        f"{SECONDS:g} s of chaos, seed {SEED}: {sum(chaos.done.values())} faults {dict(chaos.done)}; "
        f"saves asked for {dict(asked)}; {sum(told.values())} accepted, of which {dict(told)}; "
        f"{sum(chaos.cleaned.values())} dead removed; steps {[report[0]['steps'] for report in reports.values()]}; "
        f"forks {sum(each['forks'] for report in reports.values() for each in report)}; weights the same, nothing lost"
    )
