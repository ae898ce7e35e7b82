"""The channel between ranks on real stores: order, all kinds of ends, and threads that sleep while it is idle."""

from __future__ import annotations

import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

from forgather_control.ranks import channel, limits
from forgather_control.ranks.channel import StoreChannel, StoreSender

from ..support.harness import MS, SOON, Process, needs_torch, until
from ..support.ranks_groups import connector

pytestmark = needs_torch

# torch asks the name server for the name of 127.0.0.1 at each connection; a slow refusal costs seconds.
os.environ.setdefault("RES_OPTIONS", "attempts:0")

#: A store's server in a process of its own: prints its port, lives until there is a line on its standard input.
SERVER = """
import torch.distributed as dist
store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
print(store.port, flush=True)
input()
"""


class Rank:
    """One end of the channel, and all that it noticed."""

    def __init__(self, connect: Callable[[], Any], rank: int = 0) -> None:
        self.heard: queue.Queue[Any] = queue.Queue()
        self.cuts: list[str] = []
        self.idles: queue.Queue[float] = queue.Queue()
        self.ends: list[tuple[int, str]] = []
        self.pause: float | None = None
        self.reply: Callable[[list[Any], StoreSender], None] = lambda message, sender: None
        self.channel = StoreChannel(connect, rank, self.hear, self.idle, self.cut, self.end)

    def hear(self, message: list[Any], sender: StoreSender) -> None:
        self.heard.put(message)
        self.reply(message, sender)

    def cut(self, why: str, *sender: StoreSender) -> None:
        self.cuts.append(why)

    def end(self, received: int, sender: StoreSender) -> None:
        assert not self.threads[0].is_alive() and sender.add("ends", 1)
        self.ends.append((received, threading.current_thread().name))

    def idle(self, sender: StoreSender) -> float | None:
        self.idles.put(time.monotonic())
        pause, self.pause = self.pause, None
        return pause

    def send(self, rank: int, *message: Any) -> None:
        self.channel.post(lambda sender: sender.send([rank], list(message)))

    def next(self) -> Any:
        return self.heard.get(timeout=SOON)

    @property
    def threads(self) -> list[threading.Thread]:
        return self.channel._threads

    @property
    def is_over(self) -> bool:
        return not any(thread.is_alive() for thread in self.threads)


@pytest.fixture(scope="module")
def server() -> Iterator[Process]:
    """A store in another process, its port in ``port``."""
    with Process(SERVER) as process:
        process.port = process.line()
        yield process


@pytest.fixture(params=["HashStore", "TCPStore"])
def connect(request: pytest.FixtureRequest) -> Callable[[], Any]:
    """Connections to one store, its keys of this test alone."""
    import torch.distributed as dist

    if request.param == "HashStore":
        clone = connector(dist.HashStore())
    else:
        clone = connector(dist.TCPStore("127.0.0.1", int(request.getfixturevalue("server").port), None, False))
    return lambda: dist.PrefixStore(request.node.name, clone())


@contextmanager
def ranks(connect: Callable[[], Any], size: int = 1) -> Iterator[list[Rank]]:
    """Started; closed on exit, whatever happened."""
    with ExitStack() as stack:
        made = [Rank(connect, rank) for rank in range(size)]
        for rank in made:
            stack.callback(rank.channel.close, SOON)
            rank.channel.start()
        yield made


# Messages...


def test_messages_come_in_order(connect):
    """Messages of one thread arrive in order, once, and unchanged."""
    with ranks(connect, 2) as (one, two):
        for number in range(300):
            one.send(1, "number", number, {"none": None, "text": "ä\n"})
        assert [two.next()[1] for _ in range(299)] == list(range(299))
        assert two.next() == ["number", 299, {"none": None, "text": "ä\n"}]
        assert one.heard.empty() and not one.cuts and not two.cuts


def test_many_may_speak_at_once(connect):
    """Mouths and receivers of many ranks write to one inbox: nothing is lost, and each is heard in its own order."""
    with ranks(connect, 6) as (first, *others):
        for rank, other in enumerate(others, 1):
            other.reply = lambda message, sender, rank=rank: sender.send([0], ["receiver", rank, message[0]])
        for number in range(40):
            for rank, other in enumerate(others, 1):
                other.send(0, "sender", rank, number)
            first.channel.post(lambda sender, number=number: sender.send(range(1, 6), [number]))
        heard = [first.next() for _ in range(2 * 40 * 5)]
        for kind in ("sender", "receiver"):
            for rank in range(1, 6):
                assert [number for *who, number in heard if who == [kind, rank]] == list(range(40))
        assert first.heard.empty()


def test_a_rank_may_speak_to_itself(connect):
    """Its inbox is like any other."""
    with ranks(connect) as (one,):
        one.reply = lambda message, sender: sender.send([0], [message[0] + 1]) if message[0] < 5 else None
        one.send(0, 1)
        assert [one.next() for _ in range(5)] == [[1], [2], [3], [4], [5]]


def test_what_was_said_before_a_rank_listens_is_heard(connect):
    """The inbox is the store's, not the listener's."""
    with ranks(connect) as (one,):
        one.send(1, "early")
        late = Rank(connect, 1)
        late.channel.start()
        assert late.next() == ["early"]
        late.channel.close(SOON)


def test_one_decision_stands(connect):
    """Of many ranks that decide at once one is first, and all receive the decision of that one."""
    with ranks(connect, 5) as made:
        told: queue.Queue[Any] = queue.Queue()
        for round_number in range(20):
            for rank, one in enumerate(made):
                one.channel.post(
                    lambda sender, key=f"go/{round_number}", rank=rank: told.put(sender.decide(key, [rank, None]))
                )
            first = told.get(timeout=SOON)
            assert [told.get(timeout=SOON) for _ in range(4)] == [first] * 4 and first[0] in range(5)


def test_idle_after_the_pause(connect):
    """The sender thread calls on_idle at the start, after each task and after the delay it returned, else never."""
    with ranks(connect) as (one,):
        one.idles.get(timeout=SOON)
        one.send(0, "go")
        one.next()
        one.idles.get(timeout=SOON)
        for pause in (0.0, 20 * MS):
            assert one.idles.empty()
            one.pause = pause
            one.channel.post(lambda sender: None)
            begun = one.idles.get(timeout=SOON)
            assert one.idles.get(timeout=SOON) - begun >= pause
        one.send(0, "go")
        one.next()
        one.idles.get(timeout=SOON)
        assert one.idles.empty()


def test_speaking_in_a_signal_handler(connect):
    """A handler interrupts the very call that speaks, and speaks: nothing blocks, and nothing is lost."""
    said = [0, 0]

    def handle(*_: Any) -> None:
        said[0] += 1
        one.send(0, "signal")

    with ranks(connect) as (one,):
        before = signal.signal(signal.SIGALRM, handle)
        signal.setitimer(signal.ITIMER_REAL, 0.5 * MS, 0.5 * MS)
        try:
            until(
                lambda: ([one.send(0, "loop") for _ in range(20)] and said.__setitem__(1, said[1] + 20)) or said[0] > 30
            )
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        heard = [one.next()[0] for _ in range(sum(said))]
        assert [heard.count("signal"), heard.count("loop")] == said and one.heard.empty()


# Its end...


def test_close_while_idle_is_quick(connect):
    """Both threads end by themselves, long before the deadline."""
    with ranks(connect, 3) as made:
        made[0].send(1, "hello")
        made[1].next()
        begun = time.monotonic()
        for one in made:
            one.channel.close(SOON)
            assert one.is_over
        assert time.monotonic() - begun < SOON / 2 and not any(one.cuts for one in made)
        assert [one.ends for one in made] == [[(number, "forgather-sender")] for number in (0, 1, 0)]


def test_close_says_what_is_queued(connect):
    """The last words are heard."""
    with ranks(connect, 2) as (one, two):
        for number in range(50):
            one.send(1, number)
        one.channel.close(SOON)
        assert one.is_over and [two.next() for _ in range(50)] == [[number] for number in range(50)]


def test_close_twice_and_never_started(connect):
    """Nothing happens the second time, nor where there was nothing to close; speaking then does nothing."""
    one = Rank(connect)
    one.channel.close(SOON)
    other = Rank(connect, 1)
    other.channel.start()
    for _ in range(2):
        other.channel.close(SOON)
        assert other.is_over
        other.send(1, "nobody")
    assert not one.cuts and not other.cuts and other.heard.empty()


def test_close_in_the_midst_of_messages(connect):
    """Whatever the receiver is doing when the end comes, it ends; many times."""
    for turn in range(60):
        one = Rank(connect, turn)
        one.channel.start()
        for number in range(turn % 7):
            one.send(turn, number)
        if turn % 2 and turn % 7:
            one.next()
        one.channel.close(SOON)
        assert one.is_over and not one.cuts


def test_the_receiver_may_close(connect):
    """A message that ends the channel, as rank 0's Shutdown does."""
    with ranks(connect, 2) as (one, two):
        two.reply = lambda message, sender: two.channel.close(0.0)
        one.send(1, "over")
        two.next()
        until(lambda: two.is_over)
        assert not two.cuts


def test_what_hear_raises_cuts_the_line_once(connect):
    """A handler that raises counts as a loss of the channel, and ends both threads."""
    with ranks(connect) as (one,):
        one.reply = lambda message, sender: {}["nothing"]
        for _ in range(3):
            one.send(0, "go")
        until(lambda: one.is_over)
        assert one.cuts == ["KeyError: 'nothing'"]


def test_a_task_that_raises_ends_both_threads(connect):
    """The receiver, blocked in the store, is woken by a message of the sender that broke."""
    with ranks(connect) as (one,):
        one.send(0, "hello")
        one.next()
        one.channel.post(lambda sender: {}["nothing"])
        until(lambda: one.is_over)
        assert one.cuts == ["KeyError: 'nothing'"] and one.heard.empty() and not one.ends


def test_a_sender_without_connection_ends_both_threads(connect):
    """Its receiver is woken over the connection for replies, as its own one has gone."""
    with ranks(connect) as (one,):
        one.send(0, "hello")
        one.next()
        one.channel._sender._store = None
        one.send(0, "lost")
        until(lambda: one.is_over)
        (why,) = one.cuts
        assert why.startswith("AttributeError") and one.heard.empty()


# The store's faults...


def test_a_store_that_is_frozen_at_the_start(server):
    """It delays no start; what is sent meanwhile arrives when it is back."""
    import torch.distributed as dist

    clone = connector(dist.TCPStore("127.0.0.1", int(server.port), None, False))
    os.kill(server.pid, signal.SIGSTOP)
    try:
        os.waitpid(server.pid, os.WUNTRACED)  # it has stopped
        one = Rank(lambda: dist.PrefixStore("frozen", clone()))
        one.channel.start()
        one.send(0, "hello")
    finally:
        os.kill(server.pid, signal.SIGCONT)
    assert one.next() == ["hello"]
    one.channel.close(SOON)
    assert one.is_over and not one.cuts


def test_a_store_that_cannot_be_reached():
    """The loss is told once, and both threads end."""

    def connect() -> Any:
        raise RuntimeError("refused\nand more")

    with ranks(connect) as (one,):
        until(lambda: one.is_over)
        assert one.cuts == ["RuntimeError: refused"]


#: A rank that waits for what never comes; ends by itself once the channel is lost, or as the words say.
RANK = """
import os, sys, threading, time
import torch.distributed as dist
from forgather_control.ranks import select
from forgather_control.ranks.channel import StoreChannel

how, port = sys.argv[1], int(sys.argv[2])
clone, _ = select._connector(dist, dist.TCPStore("127.0.0.1", port, None, False))
cut = threading.Event()

def cuts(why, *sender):
    print("cut", threading.current_thread().name, flush=True)
    cut.set()

connect, hear = lambda: dist.PrefixStore(how, clone()), lambda *_: print("heard", flush=True)
channel = StoreChannel(connect, 0, hear, lambda sender: None, cuts, lambda *end: None)
channel.start()
channel.post(lambda sender: sender.send([0], ["hello"]))
if how == "speak":
    while not cut.is_set():
        channel.post(lambda sender: sender.send([1], ["hello"]))
        time.sleep(0.0001)
elif how == "close":
    input()
    begun = time.monotonic()
    channel.close(0.3)
    print("closed", time.monotonic() - begun < 10, flush=True)
    sys.exit(3)
else:
    cut.wait()
channel.close(0.3)
print("end", flush=True)
"""


def no_crash(process: Process, tracebacks: int) -> None:
    """Fails if a thread, or the interpreter's end, left its mark; what torch warns of is its own."""
    errors = "".join(process.errors)
    assert errors.count("Traceback (most recent") == errors.count("RuntimeError: as it was meant") == tracebacks, errors
    assert not any(word in errors for word in ("terminate called", "Fatal", "FATAL", "Aborted")), errors


def test_the_store_is_killed():
    """Each rank reports the loss once, no thread prints a traceback, and the processes exit normally."""
    with Process(SERVER) as server:
        port = server.line()
        with Process(RANK, "wait", port) as waits, Process(RANK, "speak", port) as speaks:
            assert [waits.line(), speaks.line()] == ["heard"] * 2
            server.kill()
            for rank in (waits, speaks):
                lines = [rank.line(), rank.line()]
                begun = time.monotonic()
                assert rank.end() == 0, rank.errors
                assert time.monotonic() - begun < SOON / 2
                assert lines[0].startswith("cut forgather-") and lines[1] == "end" and rank.line() == ""
                no_crash(rank, 0)


def test_a_network_that_is_dead(server):
    """A store that answers nothing, as its process is stopped: the end takes as long as it may, the exit is clean."""
    with Process(RANK, "close", server.port) as rank:
        assert rank.line() == "heard"
        os.kill(server.pid, signal.SIGSTOP)
        try:
            os.waitpid(server.pid, os.WUNTRACED)  # it has stopped
            rank.say("go")
            assert rank.line() == "closed True"
            assert rank.end() == 3, rank.errors
        finally:
            os.kill(server.pid, signal.SIGCONT)
        no_crash(rank, 0)


#: Interpreters that end with the channel open, forked from one that has loaded torch; each prints its exit code.
EXITS = """
import gc, os, sys, threading
import torch.distributed as dist
from forgather_control.ranks import select
from forgather_control.ranks.channel import StoreChannel

gc.freeze()  # of each end, half the time is the collection of torch's own modules

def become(number):
    if number % 2:
        store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)  # it dies with us
    else:
        store = dist.TCPStore("127.0.0.1", int(sys.argv[1]), None, False)
    heard = threading.Event()

    def hear(message, sender):
        heard.set()
        if number % 3:  # it is not idle when the end comes
            sender.send([0], ["again"])

    clone, _ = select._connector(dist, store)
    connect = lambda: dist.PrefixStore(str(number), clone())
    channel = StoreChannel(connect, 0, hear, lambda sender: None, print, lambda *end: None)
    channel.start()
    channel.post(lambda sender: sender.send([0], ["hello"]))
    heard.wait()
    globals().update(store=store, channel=channel)
    if number % 4 // 2:
        raise RuntimeError("as it was meant")

for number in range(20):
    child = os.fork()
    if child == 0:
        become(number)
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def test_exit_without_close(server):
    """A script that ends, or raises, with the channel open does so with its own exit code, time and again."""
    with Process(EXITS, server.port) as process:
        codes = [process.line() for _ in range(20)]
        assert process.end() == 0
    assert codes == ["0", "0", "1", "1"] * 5, "".join(process.errors)
    no_crash(process, 10)


# While there is nothing to send...


def switches(threads: list[threading.Thread]) -> list[int]:
    """How often each has given up the processor by itself."""
    found = []
    for thread in threads:
        with open(f"/proc/self/task/{thread.native_id}/status") as file:
            found += [int(line.split()[1]) for line in file if line.startswith("voluntary")]
    return found


def work() -> None:
    """A thousand steps of training, at about 0.1 ms each."""
    for _ in range(1000):
        sum(range(4000))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux counts a thread's switches in /proc")
def test_both_threads_sleep_while_there_is_nothing_to_send(connect):
    """In thousands of steps of training neither thread wakes up once."""

    def slept() -> bool:
        before = switches(one.threads)
        work()
        return switches(one.threads) == before

    with ranks(connect) as (one,):
        one.send(0, "hello")
        one.next()
        until(slept)  # the receiver has gone back to its place
        assert all(slept() for _ in range(5))
        before = switches(one.threads)
        one.send(0, "hello")
        one.next()
        until(lambda: all(now > then for now, then in zip(switches(one.threads), before)))


def test_the_exit_waits_for_threads_that_the_end_of_training_left(monkeypatch):
    """A thread inside the store's C++ code when the interpreter ends would abort the process."""
    stuck, registered = threading.Event(), []
    monkeypatch.setattr(channel.atexit, "register", lambda *call: registered.append(call))

    class Store:
        def set_timeout(self, timeout):
            """As torch's."""

        def get(self, key):
            """Like a store that hangs."""
            stuck.wait(SOON)
            raise RuntimeError("gone")

        def set(self, key, value):
            """As ``get``."""
            stuck.wait(SOON)

    nothing = lambda *words: None  # noqa: E731
    held = StoreChannel(Store, 0, nothing, nothing, nothing, nothing)
    held.start()
    held.close(10 * MS)
    ((join, threads, seconds),) = registered
    assert all(thread in held._threads for thread in threads) and seconds == limits.LAST_TIMEOUT
    stuck.set()
    join(threads, SOON)
    assert not any(thread.is_alive() for thread in threads)
