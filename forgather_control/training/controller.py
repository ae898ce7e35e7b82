"""One controlled job: it owns the directory, the server, the mailbox and the group, and knows when a command is over.

Floor 4, training side. Imports all floors below; torch only by asking whether it is loaded.
``start``, ``step``, ``log``, ``saved`` and ``close`` run on the training thread of every rank, what answers
requests on the server thread of rank 0, what ranks say to one another on the threads of the line; what
several touch is the mailbox (its own lock), the progress and a few values that are assigned whole.

The loop, with each call of an adapter in its place::

    start()                               ─▶ published: from here on commands are accepted
    for each step:
        forward, backward, optimizer
        step(n, loop)                     ─▶ if commands are pending: all ranks get the same list,
                                             each runs it against ``loop`` (flags only), applied at n
        log(metrics)                         when the trainer logs
        phase = "evaluating" | "saving"      while it does
        saved(n, path)                    ─▶ when the checkpoint is on disk: saves are finished
    close()                               ─▶ stops are finished, the rest has failed, the directory is gone
"""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections.abc import Iterator, Mapping
from typing import Any, Final

from .. import states
from ..errors import ControlError, DeadlinePassed, JobEnding, JobIdTaken, StartError
from ..jobs import directory, registry
from ..jobs.record import JobRecord, jobs_dir
from ..processes import usage
from ..ranks import failures, select
from ..ranks.group import RankGroup, SingleProcess
from ..server import limits
from ..server.dispatcher import PENDING, Deferred, ReplySink
from ..server.file_requests import FileRequestServer
from ..server.server import Server
from ..server.tcp import BoundPort
from ..version import PROTOCOL, VERSION
from ..wire import builtin, discovery, jsonrpc
from ..wire.builtin import TrainingLoop
from ..wire.records import CommandRecord, Outcome, ScheduledCommand
from . import metrics
from .command_queue import Mailbox
from .command_tracker import Ledger
from .options import ControlOptions
from .progress import Progress
from .rank_report import Census
from .status_cache import Snapshot

log = logging.getLogger("forgather_control")

#: Seconds that the end of training may wait for the last replies.
CLOSE_TIMEOUT: Final = 3.0
#: Finished commands that ``status`` still shows.
LAST_FEW: Final = 5
#: Suffixes that are tried for a generated job id that is taken.
_MAX_SUFFIX: Final = 99


class Controller:
    """The control side of one training run, in each of its ranks; the job's server is rank 0's.

    Args:
        options: what the user chose.
        step: where training begins.
        max_steps: where it ends, if known.
        log_steps: after how many steps the trainer logs, if known.
    """

    def __init__(
        self, options: ControlOptions, step: int = 0, max_steps: int | None = None, log_steps: int | None = None
    ) -> None:
        self._options, self._log_steps = options, log_steps
        self.job_id = options.job_id
        #: One of ``starting training evaluating saving``; set by the adapter on the training thread.
        self.phase: states.TrainingStatus = states.STATUS_STARTING
        self._progress = Progress(step, max_steps)
        self._metrics: dict[str, Any] = {}
        self._logged = 0
        self._started_at = time.time()
        self._group: RankGroup = SingleProcess(self)
        self._snapshot = Snapshot(self._tell, self._mark, usage.process_stats)
        self._census = Census(self._progress, lambda: self._thread.ident)
        self._server = Server(self._answer, self._tick, self._last_look)
        self._mailbox = Mailbox(self._server.wake)
        self._ledger = Ledger(self._mailbox, options.fresh_seconds)
        self._directory: directory.JobDirectory | None = None
        self._leaving: directory.JobDirectory | None = None  # no longer listed; its last replies may be read
        self._file_requests: FileRequestServer | None = None
        self._directory_lock = threading.Lock()  # guards _directory against close() during a tick
        self._thread = threading.current_thread()
        self._closed = False
        self._abandoned = False
        self._orphaned: str | None = None
        self._warned: str | None = None

    # Start...

    def start(self) -> None:
        """Take part in the agreement of the ranks; rank 0 claims the id, serves and publishes.

        Raises:
            StartError: why this job cannot be controlled; nothing is left behind.
        """
        try:
            self._group = select.select_group(
                self, self.job_id or "", self._progress.step, self._options.poll_steps, self._log_steps
            )
            self._join()
        except BaseException:
            self._closed = True
            self._census.close()
            self._remove_directory()
            self._server.close(CLOSE_TIMEOUT)
            raise
        _controllers.add(self)

    def _join(self) -> None:
        try:
            if self.is_main:
                self._publish()
        except Exception as err:
            self._group.start(str(err))  # the others may be waiting for rank 0
            raise
        self._group.start()

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which keeps the records and the files."""
        return self._group.rank == 0

    def _publish(self) -> None:
        usage.process_stats()  # the first call only sets the mark to measure processor time from
        self._directory = self._claim()
        self.job_id = self._directory.job_id
        self._file_requests = FileRequestServer(
            self._directory.path, self._server.dispatch, self.status, self._mark, builtin.BUILTIN
        )
        self._server.start()

    def _open_port(self) -> BoundPort | None:
        """The port that was asked for; a job without it can still be controlled from this host."""
        try:
            wanted = self._options.tcp_options()
            return None if wanted is None else wanted.open(self._server)
        except StartError as err:
            log.warning("no control over TCP: %s", err)
            return None

    def _claim(self) -> directory.JobDirectory:
        opened = self._open_port()
        for job_id in self._candidates():
            mine = directory.JobDirectory(job_id, self._server.listen, self._group.size)
            if opened is not None:
                mine.offer(*opened)
            try:
                mine.claim()
                return mine
            except JobIdTaken:
                if self.job_id is not None:
                    raise
        raise JobIdTaken("every generated job id is taken")

    def _candidates(self) -> Iterator[str]:
        if self.job_id is not None:
            yield self.job_id
            return
        generated = directory.generate_job_id()
        yield generated
        for suffix in range(2, _MAX_SUFFIX):
            yield f"{generated[:124]}-{suffix}"

    # Work, on the training thread...

    def step(self, step: int, loop: TrainingLoop, epoch: float | None = None) -> None:
        """Note that ``step`` is done, and apply what is pending. Every rank, after every step."""
        self._progress.beat(step, epoch)
        if threading.get_ident() != self._thread.ident:
            self._thread = threading.current_thread()  # begun on one thread, trained on another
        if self._group.due(step):
            self._apply(step, loop)

    def beat(self, step: int, epoch: float | None = None) -> None:
        """Note that ``step`` is done, where what is pending is to be applied a little later."""
        self._progress.beat(step, epoch)

    def _apply(self, step: int, loop: TrainingLoop) -> None:
        calls = self._group.receive(step)
        if calls:
            self._ledger.apply(calls, loop, step, self._group)

    def log(self, logs: Mapping[Any, Any]) -> None:
        """Keep the latest value of each name. Any rank; never a collective, never a synchronisation."""
        self._metrics = metrics.merge(self._metrics, metrics.hold(logs))
        self._logged += 1

    def saved(self, step: int, path: str) -> None:
        """Note that a checkpoint is complete on disk, or this rank's part of it, whoever asked for it."""
        self._ledger.saved(step, path, self._group)

    def saves_nothing(self) -> None:
        """Note that the checkpoint that was asked for has no part that this rank writes. Not on rank 0."""
        self._ledger.saves_nothing(self._group)

    def save_failed(self, reason: str) -> None:
        """Note that the checkpoint that was asked for will not come, or this rank's part of it."""
        self._ledger.fail_saves(self._group, reason, reason)

    @property
    def last_step(self) -> int:
        """The last step that is done."""
        return self._progress.step

    def call(self, command: str) -> None:
        """Have all ranks carry out a command. On any rank, in a signal handler, too: it takes no lock."""
        self._group.request(command)

    # End...

    def close(self, reason: str | None = None, fault: str | None = None) -> None:
        """End the control of this job: every command gets its last state, every waiter its answer.

        On the training thread, or at the interpreter's exit. The directory goes first: who reads
        that a stop is finished must not find the job still listed. May be called twice.

        Args:
            reason: why training did not end as it should; ``None`` if it did.
            fault: why control ends though training goes on, so that the other ranks can agree on nothing any more.
        """
        if self._closed or self._abandoned:
            return
        self._closed = True
        _controllers.discard(self)
        self._remove_directory()
        self._ledger.fail_saves(self._group, reason or "training ended before the checkpoint was saved", reason)
        self._group.close(CLOSE_TIMEOUT, fault)
        self._census.close()
        self._ledger.end(self._progress.step, reason, self._group)
        self._mailbox.close(JobEnding(reason or "training ended before the command could be applied"))
        self._server.close(CLOSE_TIMEOUT)
        self._leave()

    def orphan(self, reason: str) -> None:
        """End control because whoever drove it is gone. For finalizers, so on any thread.

        The garbage collector may run on the server thread while that holds the mailbox's lock;
        there, only a note is left for the next tick.
        """
        if threading.current_thread() in (self._thread, threading.main_thread()):
            self.close(reason)
        else:
            self._orphaned = reason

    def _remove_directory(self) -> None:
        mine = self._directory
        if mine is None or not self._directory_lock.acquire(timeout=CLOSE_TIMEOUT):
            return  # a tick hangs in the file system: what stays is found to be dead, and cleaned up
        try:
            if self._file_requests is not None and self._file_requests.end() and not self._server.is_this_thread:
                mine.unlist()
                self._leaving = mine
            else:
                mine.remove()
        except ControlError as err:
            log.warning("the job directory stays behind: %s", err)
        finally:
            self._directory = None
            self._directory_lock.release()

    def _leave(self) -> None:
        """Take away what was left for those who wait for a reply by file, once they had time to read it."""
        if self._leaving is None or self._file_requests is None:
            return
        self._file_requests.linger(limits.CLOSE_GRACE)
        try:
            self._leaving.remove()
        except ControlError as err:
            log.warning("the job directory stays behind: %s", err)

    def abandon(self) -> None:
        """In a forked child: this copy controls nothing; its locks may be held by threads that do not exist here."""
        self._abandoned = True
        self._mailbox = Mailbox(lambda: None)
        self._group = SingleProcess(self)

    # As group.Home: on any thread, as it says there...

    @property
    def pending(self) -> bool:
        """Whether commands wait to be applied."""
        return self._mailbox.pending

    def take(self) -> list[ScheduledCommand]:
        """Take them."""
        return self._ledger.take()

    def put_back(self, commands: list[ScheduledCommand]) -> None:
        """Queue them again."""
        self._ledger.put_back(commands)

    def all_applied(
        self,
        commands: list[ScheduledCommand],
        step: int,
        outcomes: dict[int, dict[str, Outcome]],
        fault: str | None,
    ) -> None:
        """All ranks applied them, or not all."""
        self._ledger.confirm(commands, step, fault)

    def awaits_report(self, name: str) -> bool:
        """Whether the command of this name finishes by rank reports."""
        return builtin.BUILTIN[name].rank_report is not None

    def submit(self, command: str) -> None:
        """A signal on some rank asks for this command."""
        self._ledger.submit(command)
        self._group.command_queued()

    def describe(self) -> dict[str, Any]:
        """What the other ranks are told of this process."""
        return self._census.about()

    def answer(self, what: str) -> dict[str, Any]:
        """What this rank answers to a question."""
        return self._census.tell(what)

    def all_joined(self, about: dict[int, dict[str, Any]]) -> None:
        """All ranks are there."""
        self._census.meet(about)
        with self._directory_lock:
            if self._directory is not None:
                self._census.write(self._directory.path)

    def answers_changed(self) -> None:
        """An answer came in."""
        self._server.wake()

    def agreement_lost(self, why: str) -> None:
        """Nothing can be agreed any more: what is queued fails, what comes is refused, and training goes on."""
        if self._closed:
            return
        if self.is_main:
            log.warning("%s", failures.control_off(why))
        self._mailbox.refuse(JobEnding(failures.refused(why)))

    # On the server thread...

    def _answer(self, request: jsonrpc.Request, sink: ReplySink) -> Any:
        if request.method == "rpc.discover":
            return discovery.document(builtin.BUILTIN)
        method = builtin.BUILTIN.lookup(request.method)
        params = method.bind(request.params)
        if not method.is_command:
            return method.run(self, **params)
        if params["wait"] != states.COMMAND_ACCEPTED and not isinstance(request.id, jsonrpc.NoId):
            self._server.check_room()  # who is told that there is none must not be carried out all the same
        record = self._mailbox.submit(method.name, params["command_id"])
        self._group.command_queued()
        return self._wait(record, params["wait"], params["timeout"])

    def _wait(self, record: CommandRecord, until: str, timeout: float | None) -> Any:
        deadline = None if timeout is None else time.monotonic() + timeout

        def poll() -> Any:
            now = self._mailbox.get(record.command_id)
            if now.is_final or now.state == until:
                return now.to_json()
            if deadline is not None and time.monotonic() >= deadline:
                raise DeadlinePassed(f"{now.command} is {now.state} after {timeout:g} s; it goes on", **now.to_json())
            return PENDING

        if until == states.COMMAND_ACCEPTED:
            return record.to_json()
        return Deferred(poll, deadline) if (answer := poll()) is PENDING else answer

    def _tick(self) -> None:
        if self._orphaned is not None or not self._thread.is_alive():
            reason = self._orphaned or "the thread that trained has ended"
            log.warning("this job is no longer controllable: %s", reason)
            self.close(reason)
            return
        if not self._directory_lock.acquire(blocking=False):
            return
        try:
            if self._directory is not None and self._directory.restore():
                log.warning("the job directory was damaged; it is restored")
                self._census.write(self._directory.path)
                if self._file_requests is not None:
                    self._file_requests.renew()
            if self._directory is not None and self._file_requests is not None:
                self._file_requests.tick()
        except ControlError as err:
            if str(err) != self._warned:
                log.warning("this job cannot be found at present: %s", err)
            self._warned = str(err)
            if isinstance(err, JobIdTaken):
                self._directory = None  # it is the other job's now
        finally:
            self._directory_lock.release()

    def _mark(self) -> object:
        """What tells that ``status`` has something new to say."""
        return self._progress.step, self._word(), self._logged, self._mailbox.changes

    def _last_look(self) -> None:
        if self._leaving is not None and self._file_requests is not None:
            self._file_requests.take_last()

    # ... as commands.Job

    def ping(self) -> dict[str, Any]:
        """Who is there."""
        return {
            "job_id": self.job_id,
            "pid": os.getpid(),
            "protocol": PROTOCOL,
            "version": VERSION,
            "time": time.time(),
        }

    def status(self) -> jsonrpc.Encoded:
        """How far it is."""
        return self._snapshot.text()

    def _tell(self) -> dict[str, Any]:
        """Logged names stand in ``metrics``, where they cannot overwrite ours."""
        return {
            "job_id": self.job_id,
            "status": self._word(),
            **self._progress.report(),
            "metrics": metrics.plain(self._metrics),
            "world_size": self._group.size,
            "started_at": self._started_at,
            "commands": [command.to_json() for command in self._recent()],
        }

    def _word(self) -> str:
        if self._closed:
            return states.STATUS_ENDED
        return states.STATUS_STOPPING if self._ledger.ends and self.phase == states.STATUS_TRAINING else self.phase

    def _recent(self) -> list[CommandRecord]:
        records = self._mailbox.records()
        over = [record for record in records if record.is_final][-LAST_FEW:]
        return [record for record in records if not record.is_final or record in over]

    def get_command(self, command_id: str) -> CommandRecord:
        """The record of one command."""
        return self._mailbox.get(command_id)

    def cancel_command(self, command_id: str) -> CommandRecord:
        """Take one back that is not applied yet."""
        return self._mailbox.cancel(command_id)

    def list_commands(self) -> list[CommandRecord]:
        """All records kept."""
        return self._mailbox.records()

    def ranks(self, timeout: float) -> Any:
        """Where each rank is."""
        return self._census.ask(self._group, "ranks", timeout)

    def stacks(self, timeout: float) -> Any:
        """Which code each rank's threads are in."""
        return self._census.ask(self._group, "stacks", timeout)

    def list_jobs(self) -> list[dict[str, Any]]:
        """The jobs of the jobs directory, judged by their processes; asking them would block this thread."""
        records = registry.scan(jobs_dir())[0]
        return [
            {**{name: getattr(record, name) for name in _PUBLIC}, "state": self._judge(record)} for record in records
        ]

    def _judge(self, record: JobRecord) -> str:
        if record.job_id == self.job_id and record.pid == os.getpid():
            return states.JOB_LIVE
        state = registry.judge(record)
        return (
            states.JOB_RUNNING if state == states.JOB_SILENT else state
        )  # nobody asked it, so it was not silent either


_PUBLIC: Final = ("job_id", "host", "port", "pid", "started_at", "world_size", "user", "version")


# As in ``server``: one handler for all, since a fork handler cannot be taken back.
_controllers: weakref.WeakSet[Controller] = weakref.WeakSet()


def _after_fork() -> None:
    for controller in list(_controllers):
        controller.abandon()
    _controllers.clear()


os.register_at_fork(after_in_child=_after_fork)
