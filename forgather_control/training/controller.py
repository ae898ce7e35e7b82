"""The control side of one training run, in each of its ranks; rank 0 also serves clients.

``start``, ``step``, ``log``, ``saved``, ``evaluated`` and ``close`` run on the training thread of every rank. The
methods of ``RankGroupDelegate`` run on the threads that its docstrings name.

The loop, with each call of an integration in its place::

    start()                               ─▶ published: from here on commands are accepted
    for each step:
        forward, backward, optimizer
        step(n)                           ─▶ if commands are pending: all ranks get the same list,
                                             each runs it against ``loop`` (flags only), applied at n
        log(metrics)                         when the trainer logs
        phase = evaluating | saving          while it does
        evaluated(n, metrics)             ─▶ evaluations are finished
        saved(n, path)                    ─▶ when the checkpoint is on disk: saves are finished
    close()                               ─▶ after saves in the background and other ranks' reports: stops are finished,
                                             the rest has failed, the directory is gone
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

from .. import states
from ..errors import CommandRefused, JobEnding, Unsupported
from ..processes import stacks, threads
from ..ranks import failures, select
from ..ranks.group import RankGroup
from ..ranks.polling_group import SingleProcess
from ..wire.builtin import BUILTIN
from ..wire.methods import MethodTable
from ..wire.records import CommandRecord
from . import limits, open_runs, outcomes, run_log
from .command_queue import CommandQueue
from .command_tracker import CommandTracker
from .events import EventLog
from .job_queries import JobQueries
from .job_server import JobServer
from .loop_actions import RequestedActions
from .options import ControlOptions
from .pause import Pause
from .progress import RunState
from .rank_report import RankReporter
from .rules import Rules
from .settings import Settings

log = logging.getLogger("forgather_control")


class Controller:
    """The control of one training run on one rank.

    Args:
        loop: what commands may ask of the training loop.
        step: where training begins.
        max_steps: where it ends, if known.
        log_steps: after how many steps the trainer logs, if known.
    """

    def __init__(
        self,
        options: ControlOptions,
        loop: RequestedActions,
        step: int = 0,
        max_steps: int | None = None,
        log_steps: int | None = None,
    ) -> None:
        self._options, self._loop, self._log_steps = options, loop, log_steps
        self._thread = threading.current_thread()
        #: The methods of this job; more can be added until the first step.
        self.methods = MethodTable(BUILTIN)
        #: Called with each finished step, before commands are applied; must not raise. Training thread only.
        self.on_step: list[Callable[[int], None]] = []
        self.settings = Settings(self.on_step, self._wake, lambda: self.last_step)  #: What clients can change.
        self.state = RunState(step, max_steps, self._wake)
        self.state.job_id = options.job_id
        self.rules = Rules(self.state, self.on_step, loop)  #: of rank 0
        self._group: RankGroup = SingleProcess(self)
        self.rank = 0  #: This one.
        self._queue = CommandQueue(self._record_changed, run_log.note)
        self._tracker = CommandTracker(
            self._queue, self.methods, self.state, loop, lambda: self._group, options.fresh_seconds
        )
        self._reporter = RankReporter(self.state.progress, lambda: self._thread.ident)
        self._server: JobServer | None = None  # of rank 0
        self._queries: JobQueries | None = None  # of rank 0
        self.closed = False  #: Whether control has ended; in a forked child, that of its parent.
        self.pid = os.getpid()  #: Of the process that controls.
        self._pause = Pause(loop, self.state, self.settings, self._tracker, lambda: self.closed)
        self._orphaned: str | None = None
        self._warned = False  # of ranks that never joined
        self._call: stacks.Call | None = None  # of the trainer, in which the run began
        self.ended = threading.Event()  #: Set once control has ended.
        # What integrations note on the training thread of any rank; see the methods that are behind it.
        self.beat = self.state.progress.beat
        self.evaluated = self._tracker.evaluated
        self.begin_save = self._tracker.begin_save
        self.finish_save, self.fail_save = self._tracker.finish_save, self._tracker.fail_save  # on any thread
        self.evaluation_failed = partial(self._tracker.report, states.WHEN_EVALUATED)
        self.save_failed = partial(self._tracker.report, states.WHEN_SAVED)
        self.nothing_to_save = partial(self._tracker.report, states.WHEN_SAVED, None)
        # What the group asks for; see ``RankGroupDelegate``.
        self.take, self.all_applied = self._tracker.take, self._tracker.all_applied
        self.put_back = self._queue.put_back
        self.describe, self.answer = self._reporter.describe, self._reporter.answer
        self.is_gone = self._reporter.is_gone
        self.answers_changed = self._wake
        self.is_atomic = lambda name: self.methods[name].is_atomic
        self.awaits_report = lambda name: self.methods[name].rank_report is not None

    # Start...

    def start(self) -> None:
        """Join the agreement of the ranks; rank 0 claims the id, serves and publishes.

        Raises:
            StartError: why this job cannot be controlled; nothing is left behind.
        """
        open_runs.end_earlier(self._options.job_id)
        self._call = stacks.training_call()
        try:
            step, poll_steps = self.last_step, self._options.poll_steps
            self._group = select.select_group(self, self._options.job_id or "", step, poll_steps, self._log_steps)
            self._loop.settings, self._loop.no_pause = self.settings, self._group.no_hold
            self.rank = self._group.rank
            try:
                threads.check()
                if self.is_main:
                    self._publish()
            except Exception as err:
                with suppress(Unsupported):
                    self._group.start(str(err))  # the others may be waiting for rank 0
                raise
            self._group.start()
            if self._server is not None:
                self._server.settle()
        except BaseException:
            self.closed = True
            self._reporter.close()
            if self._server is not None:
                self._server.unpublish()
                self._server.close()
            raise
        open_runs.add(self)

    def _publish(self) -> None:
        parts = self.state, self._queue, self._group, self._reporter, self.methods, self._loop, self.settings
        self._queries = JobQueries(*parts, self.rules, self._look)
        self._server = JobServer(self._options, self._queries, self._is_controlled, self._reporter.write)
        self.state.job_id = self._server.publish()
        facts = {"job_id": self.job_id, "pid": os.getpid(), "step": self.last_step, "world_size": self._group.size}
        self.state.events.publish(states.EVENT_STARTED, **facts)

    @property
    def job_id(self) -> str | None:
        """The job id, once one is claimed; before that the one that was asked for."""
        return self.state.job_id

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which keeps the records and the files."""
        return self.rank == 0

    @property
    def last_step(self) -> int:
        """The last finished step."""
        return self.state.progress.step

    @property
    def phase(self) -> states.TrainingStatus:
        """What training is doing; set by the integration on the training thread."""
        return self.state.phase

    @phase.setter
    def phase(self, phase: states.TrainingStatus) -> None:
        self.state.note(phase)

    # Work, on the training thread...

    def step(self, step: int, epoch: float | None = None) -> None:
        """Note that ``step`` is finished, and apply what is pending. Every rank, after every step.

        Raises:
            Unsupported: at the first step, the job was opened before this process became one of several ranks.
        """
        self.beat(step, epoch)
        if self.on_step:
            for call in (*self.on_step,):
                call(step)
        if threading.get_ident() != self._thread.ident:
            self._thread = threading.current_thread()  # started on one thread, trained on another
        if not self.methods.frozen:
            select.check_alone(self._group)
            self.methods.frozen = True
            if added := self.methods.added():  # rank 0 compares what each rank added
                self._group.describe({"methods": added})
        if self._group.due(step) and (commands := self._group.receive(step)):
            self._tracker.apply(commands, step)
        if self._loop.paused:
            self._pause.hold(self._group, step)

    def log(self, logs: Mapping[Any, Any]) -> None:
        """Keep the latest value of each name. Any rank; never a collective, never a synchronisation."""
        held = self.state.log(logs)
        if self.rules.waiting:
            self.rules.logged(held)

    def saved(self, step: int, path: str, evaluated: bool = False) -> None:
        """Note that a checkpoint, or this rank's part of it, is complete on disk, and if the save evaluated first."""
        self.finish_save(self.begin_save(step), path, evaluated)

    def request(self, command: str) -> bool:
        """Have all ranks carry out a command; return ``False`` if none can reach them any more.

        On any rank, in a signal handler, too: it takes no lock.
        """
        if self._group.is_broken:
            return False
        self._group.request(command)
        return True

    # End...

    def close(self, reason: str | None = None, fault: str | None = None) -> None:
        """End the control of this job: every command gets its last state, every waiting client its answer.

        On the training thread, or at the interpreter's exit. While saves in the background and other ranks have their
        part of a command to do, the job stays, for at most ``close_timeout``. Then the directory goes first: a client
        that reads that a stop is finished must not find the job still listed. May be called twice.

        Args:
            reason: why training did not end as it should; ``None`` if it did.
            fault: why control ends though training continues, so that the ranks can no longer agree on commands.
        """
        if self.closed:
            return
        self.closed = True
        open_runs.discard(self)
        ending = JobEnding(reason or "training ended before the command could be applied")
        self._queue.close(ending, pending_only=True)
        if threading.current_thread() is self._thread:
            self._loop.close()
        may_wait = fault is None and threading.current_thread() is self._thread
        try:
            self._tracker.close(reason, fault, self._options.close_timeout if may_wait else limits.CLOSE_TIMEOUT)
        finally:  # Ctrl-C may end the wait
            self.state.ended = True
            if self._server is not None:
                self._server.unpublish(reason)
            self._reporter.close()
            self._tracker.end(self.last_step, reason)
            self._queue.close(ending)
            self.state.events.publish(states.EVENT_ENDED, step=self.last_step, reason=reason)
            if self._server is not None:
                self._server.close()
            self.ended.set()

    def end_if_over(self, reason: str) -> None:
        """End this run if its training is over: its thread is dead, or now begins another run outside its call."""
        nested = self._call is not None and stacks.is_executed(self._call)
        over = self._thread is threading.current_thread() and not nested
        if over or not self._thread.is_alive() or self._orphaned is not None:
            self.close(reason)
            self.ended.wait(limits.CLOSE_TIMEOUT)  # the server thread may be closing it

    def orphan(self, reason: str) -> None:
        """End control because its integration is gone. For finalizers, so on any thread."""
        if threading.current_thread() in (self._thread, threading.main_thread()):
            self.close(reason)
        else:  # the garbage collector may run on the server thread while that holds the queue's lock: at the next tick
            self._orphaned = reason

    def abandon(self) -> None:
        """In a forked child: control nothing; locks may be held by threads that do not exist here."""
        self.closed, self._server = True, None
        self._queue = CommandQueue(lambda record: None)
        self._tracker.abandon(self._queue)
        self.state.events = EventLog()
        self._group = SingleProcess(self)

    # As RankGroupDelegate, beside what ``__init__`` takes from the tracker and the reporter...

    @property
    def pending(self) -> bool:
        """Whether commands wait to be applied."""
        return self._queue.pending

    def submit(self, command: str) -> None:
        """Queue the command of a signal that some rank received."""
        self._tracker.submit(command)
        self._group.command_queued()

    def all_joined(self, descriptions: dict[int, dict[str, Any]]) -> None:
        """Note that all ranks have joined, or that a description has changed."""
        if self._reporter.all_joined(descriptions):
            self.state.events.publish(states.EVENT_RANK, state="joined", ranks=len(descriptions))
        if self._server is not None:
            self._server.write(self._reporter.write)
        if self._queries is not None:
            self._queries.compare([found.get("methods", {}) for _, found in sorted(descriptions.items())])

    def agreement_lost(self, why: str) -> None:
        """Fail what is queued and refuse what comes; training continues."""
        if self.closed:
            return
        if self.is_main:
            log.warning(failures.CONTROL_OFF, why)
            self.state.events.publish(states.EVENT_RANK, state="lost", reason=why)
        self._queue.close(JobEnding(failures.REFUSED % why), pending_only=True)

    # On any thread...

    def _wake(self) -> None:
        if self._server is not None:
            self._server.wake()

    def _record_changed(self, record: CommandRecord) -> None:
        if self.is_main:
            self.state.events.publish(states.EVENT_COMMAND, **outcomes.brief(record))

    # On the server thread...

    def _look(self) -> None:
        """Before each request and tick: note that the trainer's call has gone, and refuse what would not be done."""
        if self._call is not None and not stacks.is_executed(self._call):
            self._call, self.state.ended = None, True
            self._orphaned = self._orphaned or "training ended by an exception"
            self._queue.close(JobEnding(self._orphaned), pending_only=True)
        if (why := self._group.obstacle()) is not None:
            if not self._warned:
                log.warning(failures.NOT_JOINED, why)
            self._warned = True
            self._queue.fail_pending(CommandRefused(f"the command was not carried out: {why}"))

    def _is_controlled(self) -> bool:
        """Return whether the training thread, its integration and the trainer's call exist; end control if not."""
        if self._server is not None and (fault := self._server.fault) is not None:
            log.warning("Control is off: %s. Training continues.", fault)
            self.close(fault, fault)
            return False
        self._look()
        if self._orphaned is None and self._thread.is_alive():
            return True
        reason = self._orphaned or "the training thread has ended"
        log.warning("Control is off: %s.", reason)
        self.close(reason)
        return False
