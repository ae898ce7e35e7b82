"""Signals that run commands: real ones, in this process and in others, and nothing left behind."""

from __future__ import annotations

import copy
import os
import pickle
import queue
import signal
import threading

import pytest

from forgather_control import connect
from forgather_control.errors import InvalidParams, Unsupported
from forgather_control.training import signals
from forgather_control.training.signals import Signals

from ..ranks.test_channel import SERVER
from ..support.harness import SOON, Process, needs_torch

BOTH = {"SIGTERM": "save_and_stop", "SIGUSR1": "save_checkpoint"}


@pytest.fixture(autouse=True)
def untouched():
    """Each test leaves the signals as it found them."""
    watched = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in watched}
    yield
    after = {number: signal.getsignal(number) for number in watched}
    for number, handler in before.items():
        signal.signal(number, handler)
    assert after == before and not signals._active


@pytest.fixture
def given():
    """What was called, in order."""
    return []


# The mapping...


def test_signals_are_named_or_members(given):
    """Both kinds of keys, aliases included, and a mapping of nothing."""
    for number in ("SIGUSR1", signal.SIGUSR1):
        one = Signals({number: "abort"})
        one.install(given.append)
        signal.raise_signal(signal.SIGUSR1)
        one.restore()
    assert given == ["abort", "abort"]
    Signals({"SIGCLD": "abort", "SIGRTMIN": "abort"})
    Signals({}).install(given.append)


@pytest.mark.parametrize(
    ("wanted", "why"),
    [
        ({"SIGNOPE": "abort"}, "'SIGNOPE' is not a signal of this system"),
        ({"TERM": "abort"}, "'TERM' is not a signal"),
        ({"sigterm": "abort"}, "'sigterm' is not a signal"),
        ({"SIG_DFL": "abort"}, "'SIG_DFL' is not a signal"),
        ({15: "abort"}, "15 is not a signal"),
        ({True: "abort"}, "True is not a signal"),
        ({None: "abort"}, "None is not a signal"),
        ({"\x1b[2J" * 99: "abort"}, "is not a signal"),
        ({"SIGKILL": "abort"}, "SIGKILL cannot run a command"),
        ({signal.SIGSTOP: "abort"}, "SIGSTOP cannot run a command"),
        ({"SIGSEGV": "abort"}, "SIGSEGV cannot run a command"),
        ({"SIGIOT": "abort"}, "SIGABRT cannot run a command"),
        ({"SIGTERM": "save"}, "'save' is not a command .* save_checkpoint, graceful_stop, save_and_stop, abort"),
        ({"SIGTERM": "status"}, "'status' is not a command"),
        ({"SIGTERM": "change_settings"}, "'change_settings' is not a command that a signal can run"),  # without values
        ({"SIGTERM": None}, "None is not a command"),
        ({"SIGTERM": ["abort"]}, "is not a command"),
        ({"SIGTERM": "abort", signal.SIGTERM: "abort"}, "SIGTERM twice"),
        (["SIGTERM"], "signals must map signals to commands"),
        ("SIGTERM", "signals must map signals to commands"),
        (None, "signals must map signals to commands"),
    ],
    ids=lambda value: ascii(value)[:30],
)
def test_a_wrong_mapping_is_refused_when_it_is_made(wanted, why):
    """One sentence says which value and what was expected."""
    with pytest.raises(InvalidParams, match=why) as caught:
        Signals(wanted)
    assert isinstance(caught.value, ValueError) and caught.value.data == {"parameter": "signals"}
    assert len(str(caught.value)) < 250 and str(caught.value).isprintable()


# In this process...


def test_a_signal_gives_its_command_and_nothing_else(given):
    """The default action, which would end the process, is not run; after restore the old state is back."""
    one = Signals(BOTH)
    one.install(given.append)
    os.kill(os.getpid(), signal.SIGTERM)
    signal.raise_signal(signal.SIGUSR1)
    assert given == ["save_and_stop", "save_checkpoint"]
    one.restore()
    one.restore()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_installed_again_it_gives_each_command_once(given):
    """Training that begins anew without an end of the first run has one handler, not two."""
    one = Signals(BOTH)
    one.install(lambda name: given.append("old"))
    one.install(given.append)
    signal.raise_signal(signal.SIGUSR1)
    assert given == ["save_checkpoint"]
    one.restore()


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), ValueError("theirs")], ids=repr)
def test_the_earlier_handler_is_called_after_the_command(given, error):
    """With the signal and the frame; what it raises goes through, as it would without us."""

    def earlier(number, frame):
        given.append((number, frame.f_code.co_name))
        raise error

    signal.signal(signal.SIGTERM, earlier)
    one = Signals(BOTH)
    one.install(given.append)
    with pytest.raises(type(error)) as caught:
        signal.raise_signal(signal.SIGTERM)
    assert caught.value is error
    assert given == ["save_and_stop", (signal.SIGTERM, "test_the_earlier_handler_is_called_after_the_command")]
    one.restore()
    assert signal.getsignal(signal.SIGTERM) is earlier
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def test_an_interrupt_that_gives_a_command_does_not_interrupt(given):
    """Python's own handler of SIGINT is its default action, which opting in replaces; it comes back."""
    one = Signals({"SIGINT": "graceful_stop"})
    one.install(given.append)
    signal.raise_signal(signal.SIGINT)
    one.restore()
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    assert given == ["graceful_stop"]


def test_an_ignored_signal_is_ignored_again(given):
    """SIG_IGN, as nohup leaves SIGHUP, is no handler to call, and is put back."""
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    one = Signals({"SIGHUP": "save_and_stop"})
    one.install(given.append)
    signal.raise_signal(signal.SIGHUP)
    one.restore()
    signal.raise_signal(signal.SIGHUP)
    assert given == ["save_and_stop"] and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    signal.signal(signal.SIGHUP, old)


def test_a_signal_whose_command_nothing_can_run_does_what_it_does_without_us(given):
    """The earlier handler, or the default action, takes it."""
    signal.signal(signal.SIGTERM, lambda number, frame: given.append("earlier"))
    one = Signals(BOTH)
    one.install(lambda name: False)
    signal.raise_signal(signal.SIGTERM)
    assert given == ["earlier"] and isinstance(signal.getsignal(signal.SIGUSR1), signals._Handler)
    one.restore()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    source = """
    import signal
    from forgather_control.training.signals import Signals
    Signals({"SIGTERM": "save_and_stop"}).install(lambda name: False)
    signal.raise_signal(signal.SIGTERM)
    """
    with Process(source) as process:
        assert process.end() == -signal.SIGTERM


#: Rank 0 of two, whose store is on the port that it is given; it trains until it is ended.
RANK_0 = """
import sys, time
import torch.distributed as dist
from torch.testing._internal.distributed import fake_pg
from forgather_control import TrainingJob

store = dist.TCPStore("127.0.0.1", int(sys.argv[1]), None, False)
dist.init_process_group("fake", store=store, rank=0, world_size=2)
with TrainingJob("job", signals={"SIGTERM": "save_and_stop"}) as job:
    channel = job._controller._group._channel
    while channel._inbox is None or channel._sender._store is None:  # else it would wait for the host as it begins
        time.sleep(0.005)
    print("ready", flush=True)
    for step in range(1, 10**6):
        time.sleep(0.005)
        job.step(step)
"""


@needs_torch
@pytest.mark.once
def test_sigterm_ends_a_job_whose_control_has_failed(jobs_dir):
    """A mapping must not leave SIGKILL as the only way: here, the host of the ranks' store is killed."""
    with Process(SERVER) as server, Process(RANK_0, server.line()) as job:
        assert job.line() == "ready"
        server.kill()
        with connect("job") as client:
            kinds = (event for event in client.events(since=0) if event["kind"] == "rank")
            assert any(event["state"] == "lost" for event in kinds)
        job.popen.terminate()
        assert job.end() == -signal.SIGTERM, job.errors


def test_what_the_call_raises_does_not_reach_training(given):
    """It would come out of any line of the loop; the earlier handler is called all the same."""

    def fail(name):
        raise OSError(name)

    signal.signal(signal.SIGUSR1, lambda number, frame: given.append("earlier"))
    one = Signals(BOTH)
    one.install(fail)
    signal.raise_signal(signal.SIGUSR1)
    one.restore()
    assert given == ["earlier"]
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)


def test_who_came_after_us_keeps_the_signal(given):
    """A handler on top of ours is not replaced; ours below it gives no commands, and calls what it always called."""
    signal.signal(signal.SIGUSR1, lambda number, frame: given.append("below"))
    below = signal.getsignal(signal.SIGUSR1)
    one = Signals(BOTH)
    one.install(given.append)
    ours = signal.getsignal(signal.SIGUSR1)

    def above(number, frame):
        given.append("above")
        ours(number, frame)

    signal.signal(signal.SIGUSR1, above)
    signal.raise_signal(signal.SIGUSR1)
    one.restore()
    assert signal.getsignal(signal.SIGUSR1) is above
    signal.raise_signal(signal.SIGUSR1)
    assert given == ["above", "save_checkpoint", "below", "above", "below"]
    signal.signal(signal.SIGUSR1, ours)  # as a polite one does when it goes
    signal.raise_signal(signal.SIGUSR1)
    assert given[5:] == ["below"] and signal.getsignal(signal.SIGUSR1) is below, "ours took itself away"
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)


def test_two_at_a_time_both_give_theirs(given):
    """Taken away in either order, nothing stays."""
    for order in (1, -1):
        one, two = Signals({"SIGUSR1": "save_checkpoint"}), Signals({"SIGUSR1": "graceful_stop"})
        signal.signal(signal.SIGUSR1, lambda number, frame: given.append("below"))
        below = signal.getsignal(signal.SIGUSR1)
        one.install(given.append)
        two.install(given.append)
        signal.raise_signal(signal.SIGUSR1)
        for each in (one, two)[::order]:
            each.restore()
        signal.raise_signal(signal.SIGUSR1)
        assert given == ["graceful_stop", "save_checkpoint", "below", "below"]
        assert signal.getsignal(signal.SIGUSR1) is below
        given.clear()
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)


def test_only_the_main_thread_installs(given):
    """Elsewhere it is an error that names the thread, and nothing is installed."""
    caught = []

    def install():
        try:
            Signals(BOTH).install(given.append)
        except Unsupported as err:
            caught.append(str(err))

    thread = threading.Thread(target=install, name="trainer")
    thread.start()
    thread.join(SOON)
    assert "'trainer'" in caught[0] and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_restored_on_another_thread_it_gives_no_commands(given):
    """There no handler can be put back; ours is silent at once, and puts the earlier one back at its next call."""
    signal.signal(signal.SIGUSR1, lambda number, frame: given.append("below"))
    below = signal.getsignal(signal.SIGUSR1)
    one = Signals(BOTH)
    one.install(given.append)
    thread = threading.Thread(target=one.restore)
    thread.start()
    thread.join(SOON)
    assert signal.getsignal(signal.SIGUSR1) is not below
    signal.raise_signal(signal.SIGUSR1)
    assert given == ["below"] and signal.getsignal(signal.SIGUSR1) is below
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def test_a_copy_has_installed_nothing(given):
    """Pickled or deep, it can be installed by itself, and its restore takes nothing from the first."""
    one = Signals(BOTH)
    one.install(queue.SimpleQueue().put)  # which cannot be copied
    for two in (copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
        two.restore()
        assert isinstance(signal.getsignal(signal.SIGUSR1), signals._Handler)
        two.install(given.append)
        signal.raise_signal(signal.SIGUSR1)
        two.restore()
    one.restore()
    assert given == ["save_checkpoint"] * 2


# In processes of their own...

PREPARE = """
import faulthandler, logging, os, queue, signal, sys, threading, time, warnings
from forgather_control.training.signals import Signals
warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads, which are tried here
logging.basicConfig(stream=sys.stdout, format="%(message)s")
given = queue.SimpleQueue()
one = Signals({"SIGTERM": "save_and_stop", "SIGUSR1": "save_checkpoint"})
"""


def run(program: str) -> tuple[list[str], int]:
    """The lines that the program printed, and its exit code."""
    with Process(PREPARE + program) as process:
        code = process.end()
        lines = process.popen.stdout.read().splitlines()
        assert not process.errors, "".join(process.errors)
        return lines, code


def test_from_outside_as_a_launcher_does_it():
    """Two signals of another process become two commands while training computes; after restore SIGTERM ends it."""
    program = """
    one.install(given.put)
    print("ready", flush=True)
    for _ in range(2):
        while given.empty():
            sum(range(1000))
        print(given.get(), flush=True)
    one.restore()
    print("restored", flush=True)
    while True:
        time.sleep(1)
    """
    with Process(PREPARE.replace("\n", "\n    ") + program) as process:
        assert process.line() == "ready"
        for number, command in ((signal.SIGTERM, "save_and_stop"), (signal.SIGUSR1, "save_checkpoint")):
            os.kill(process.pid, number)
            assert process.line() == command
        assert process.line() == "restored"
        os.kill(process.pid, signal.SIGTERM)
        assert process.end() == -signal.SIGTERM


def test_the_default_action_comes_back_whoever_restores_us():
    """A handler that came after ours, and puts ours back after our end, does not make the process immortal."""
    lines, code = run("""
one.install(given.put)
ours = signal.signal(signal.SIGTERM, lambda number, frame: print("above", flush=True))
one.restore()
signal.raise_signal(signal.SIGTERM)
signal.signal(signal.SIGTERM, ours)
print(given.empty(), flush=True)
signal.raise_signal(signal.SIGTERM)
print("not reached")
""")
    assert lines == ["above", "True"] and code == -signal.SIGTERM


@pytest.mark.parametrize("thread", [False, True], ids=["main", "thread"])
def test_a_forked_child_is_as_without_us(thread):
    """SIGTERM ends it though it computes nothing in Python, and gives no command; the parent's still does."""
    lines, code = run(f"""
one.install(given.put)
def fork():
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing, str(signal.getsignal(signal.SIGTERM)).encode())
        one.restore()
        signal.pause()
        os._exit(7)
    print(os.read(reading, 100).decode(), flush=True)
    os.kill(child, signal.SIGTERM)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
if {thread}:
    thread = threading.Thread(target=fork)
    thread.start()
    thread.join()
else:
    fork()
signal.raise_signal(signal.SIGUSR1)
print(given.get(), given.empty(), flush=True)
""")
    assert lines == [str(signal.SIG_DFL), str(-signal.SIGTERM), "save_checkpoint True"] and code == 0


def test_a_pool_of_workers_is_ended_as_ever():
    """multiprocessing ends forked workers with SIGTERM: from their first moment they die of it, a hundred times."""
    lines, code = run("""
import multiprocessing
one.install(given.put)
context = multiprocessing.get_context("fork")
for _ in range(100):
    worker = context.Process(target=time.sleep, args=(1000,))
    worker.start()
    worker.terminate()
    worker.join()
    assert worker.exitcode == -signal.SIGTERM, worker.exitcode
print(given.empty(), flush=True)
""")
    assert lines == ["True"] and code == 0


def test_no_lock_of_training_is_waited_for():
    """Thousands of signals in the middle of queues, locks and logging: none is waited for, each gives its command."""
    lines, code = run("""
one = Signals({"SIGALRM": "save_checkpoint"})
came = []
signal.signal(signal.SIGALRM, lambda number, frame: came.append(number))
one.install(given.put)
lock, theirs = threading.Lock(), queue.Queue()
log = logging.getLogger("training")
log.addHandler(logging.StreamHandler(open(os.devnull, "w")))
log.propagate = False
signal.setitimer(signal.ITIMER_REAL, 0.0002, 0.0002)
while len(came) < 2000:
    with lock:
        theirs.put(1)
        log.warning("in between")
        theirs.get()
signal.setitimer(signal.ITIMER_REAL, 0)
one.restore()
count = 0
while not given.empty():
    given.get()
    count += 1
print(count == len(came), flush=True)
""")
    assert lines == ["True"] and code == 0


def test_a_handler_that_is_not_pythons_is_left():
    """faulthandler's dump on SIGUSR1 stays: it could be neither called nor put back. The other signal works."""
    lines, code = run("""
faulthandler.register(signal.SIGUSR1, file=sys.stdout)
one.install(given.put)
signal.raise_signal(signal.SIGTERM)
print(given.get(), flush=True)
signal.raise_signal(signal.SIGUSR1)
one.restore()
""")
    why = "SIGUSR1 does not run save_checkpoint: a handler that is not Python's is installed"
    assert lines[:2] == [why, "save_and_stop"] and any("Current thread" in line for line in lines[2:]) and code == 0


def test_a_handler_that_replaced_ours_from_outside_python_is_left():
    """Where Python itself says that the handler is none of its own, restore leaves it and says so."""
    lines, code = run("""
one = Signals({"SIGUSR1": "save_checkpoint"})
one.install(given.put)
signal.getsignal = lambda number: None  # what it answers then (signal.getsignal); no library does it to us here
one.restore()
one.install(given.put)
""")
    assert lines == [
        "SIGUSR1 now has a handler that is not Python's; the earlier one was not restored",
        "SIGUSR1 does not run save_checkpoint: a handler that is not Python's is installed",
    ]
    assert code == 0
