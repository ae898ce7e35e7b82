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
    close()                               ─▶ stops are finished, the rest has failed, the directory is gone
"""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections.abc import Mapping
from typing import Any

from .. import states
from ..errors import JobEnding
from ..processes import usage
from ..ranks import failures, select
from ..ranks.group import RankGroup, SingleProcess
from ..wire.builtin import BUILTIN, TrainingLoop
from ..wire.methods import MethodTable
from ..wire.records import CommandRecord
from . import limits
from .command_queue import CommandQueue
from .command_tracker import CommandTracker
from .job_queries import JobQueries
from .job_server import JobServer
from .options import ControlOptions
from .rank_report import RankReporter
from .run_state import RunState

log = logging.getLogger("forgather_control")


class Controller:
    """The control of one training run on one rank.

    Args:
        options: what the user chose.
        loop: what commands may ask of the training loop.
        step: where training begins.
        max_steps: where it ends, if known.
        log_steps: after how many steps the trainer logs, if known.
    """

    def __init__(
        self,
        options: ControlOptions,
        loop: TrainingLoop,
        step: int = 0,
        max_steps: int | None = None,
        log_steps: int | None = None,
    ) -> None:
        self._options, self._loop, self._log_steps = options, loop, log_steps
        self._thread = threading.current_thread()
        #: The methods of this job; more can be added until the first step.
        self.methods = MethodTable(BUILTIN)
        self.state = RunState(step, max_steps, self._wake)
        self.state.job_id = options.job_id
        self._group: RankGroup = SingleProcess(self)
        self._queue = CommandQueue(self._record_changed)
        self._tracker = CommandTracker(self._queue, self.methods, self.state, options.fresh_seconds)
        self._reporter = RankReporter(self.state.progress, lambda: self._thread.ident)
        # What ranks ask of these two as RankGroupDelegate.
        self.take, self.put_back = self._tracker.take, self._tracker.put_back
        self.all_applied = self._tracker.all_applied
        self.describe, self.answer = self._reporter.describe, self._reporter.answer
        self.answers_changed = self._wake
        self._queries: JobQueries | None = None  # of rank 0
        self._server: JobServer | None = None  # of rank 0
        self._closed = False  # or abandoned in a forked child
        self._orphaned: str | None = None

    # Start...

    def start(self) -> None:
        """Join the agreement of the ranks; rank 0 claims the id, serves and publishes.

        Raises:
            StartError: why this job cannot be controlled; nothing is left behind.
        """
        try:
            step, poll_steps = self.state.progress.step, self._options.poll_steps
            self._group = select.select_group(self, self._options.job_id or "", step, poll_steps, self._log_steps)
            self._join()
        except BaseException:
            self._closed = True
            self._reporter.close()
            if self._server is not None:
                self._server.unpublish()
                self._server.close()
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

    def _publish(self) -> None:
        usage.process_stats()  # the first call only sets the mark to measure processor time from
        self._server = JobServer(
            self._options, self._group.size, self._handle, self._is_controlled, self._reporter.write
        )
        self._queries = JobQueries(
            self.state,
            self._queue,
            self._group,
            self._reporter,
            self.methods,
            self._loop,
            process_stats=usage.process_stats,
            check_capacity=self._server.check_capacity,
        )
        self.state.job_id = self._server.publish(self._queries.status, self._queries.mark, self.methods)
        step, size = self.state.progress.step, self._group.size
        self.state.events.publish(
            states.EVENT_STARTED, job_id=self.state.job_id, pid=os.getpid(), step=step, world_size=size
        )

    @property
    def job_id(self) -> str | None:
        """The job id, once one is claimed; before that the one that was asked for."""
        return self.state.job_id

    @property
    def phase(self) -> states.TrainingStatus:
        """What training is doing; set by the integration on the training thread."""
        return self.state.phase

    @phase.setter
    def phase(self, phase: states.TrainingStatus) -> None:
        self.state.phase = phase

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which keeps the records and the files."""
        return self._group.rank == 0

    # Work, on the training thread...

    def step(self, step: int, epoch: float | None = None) -> None:
        """Note that ``step`` is finished, and apply what is pending. Every rank, after every step."""
        self.state.progress.beat(step, epoch)
        if threading.get_ident() != self._thread.ident:
            self._thread = threading.current_thread()  # started on one thread, trained on another
        if not self.methods.frozen:
            self._freeze()
        if self._group.due(step):
            commands = self._group.receive(step)
            if commands:
                self._tracker.apply(commands, self._loop, step, self._group)

    def _freeze(self) -> None:
        """Fix the methods at the first step, and have rank 0 compare what each rank added."""
        self.methods.frozen = True
        added = self.methods.added()
        if added:
            self._group.describe({"methods": added})

    def beat(self, step: int, epoch: float | None = None) -> None:
        """Note that ``step`` is finished, where what is pending is to be applied a little later."""
        self.state.progress.beat(step, epoch)

    def log(self, logs: Mapping[Any, Any]) -> None:
        """Keep the latest value of each name. Any rank; never a collective, never a synchronisation."""
        self.state.log(logs)

    def saved(self, step: int, path: str, evaluated: bool = False) -> None:
        """Note that a checkpoint is complete on disk, or this rank's part of it, whatever caused it.

        Args:
            evaluated: whether the save evaluated the model first.
        """
        self._tracker.saved(step, path, evaluated, self._group)
        if self.is_main:
            self.state.events.publish(states.EVENT_CHECKPOINT, step=step, path=path)

    def evaluated(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Note that this rank has evaluated, and with which metrics (numbers)."""
        self._tracker.evaluated(step, dict(metrics), self._group)

    def nothing_to_save(self) -> None:
        """Note that this rank writes no part of the checkpoint that was asked for. Not on rank 0."""
        self._tracker.nothing_to_save(self._group)

    def save_failed(self, reason: str) -> None:
        """Note that the checkpoint that was asked for, or this rank's part of it, was not written."""
        self._tracker.fail(states.WHEN_SAVED, reason, self._group)

    def evaluation_failed(self, reason: str) -> None:
        """Note that the evaluation that was asked for was not made on this rank."""
        self._tracker.fail(states.WHEN_EVALUATED, reason, self._group)

    @property
    def last_step(self) -> int:
        """The last finished step."""
        return self.state.progress.step

    def request(self, command: str) -> None:
        """Have all ranks carry out a command. On any rank, in a signal handler, too: it takes no lock."""
        self._group.request(command)

    # End...

    def close(self, reason: str | None = None, fault: str | None = None) -> None:
        """End the control of this job: every command gets its last state, every waiting client its answer.

        On the training thread, or at the interpreter's exit. The directory goes first: a client that reads
        that a stop is finished must not find the job still listed. May be called twice.

        Args:
            reason: why training did not end as it should; ``None`` if it did.
            fault: why control ends though training continues, so that the ranks can no longer agree on commands.
        """
        if self._closed:
            return
        self._closed = self.state.ended = True
        _controllers.discard(self)
        if self._server is not None:
            self._server.unpublish()
        self._tracker.close_reports(reason, self._group)
        self._group.close(limits.CLOSE_TIMEOUT, fault)
        self._reporter.close()
        self._tracker.end(self.last_step, reason, self._group)
        self._queue.close(JobEnding(reason or "training ended before the command could be applied"))
        self.state.events.publish(states.EVENT_ENDED, step=self.last_step, reason=reason)
        if self._server is not None:
            self._server.close()

    def orphan(self, reason: str) -> None:
        """End control because its integration is gone. For finalizers, so on any thread.

        The garbage collector may run on the server thread while that holds the queue's lock;
        there, only a note is left for the next tick.
        """
        if threading.current_thread() in (self._thread, threading.main_thread()):
            self.close(reason)
        else:
            self._orphaned = reason

    def abandon(self) -> None:
        """In a forked child: control nothing; locks may be held by threads that do not exist here."""
        self._closed = True
        self._queue = CommandQueue(lambda record: None)
        self._group = SingleProcess(self)

    # As RankGroupDelegate, beside what __init__ takes from the tracker and the reporter...

    @property
    def pending(self) -> bool:
        """Whether commands wait to be applied."""
        return self._queue.pending

    def awaits_report(self, name: str) -> bool:
        """Return whether a command finishes by reports of all ranks."""
        return self.methods[name].rank_report is not None

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
        if self._queries is not None and any("methods" in found for found in descriptions.values()):
            self._queries.unavailable = _not_shared(
                [found.get("methods", {}) for _, found in sorted(descriptions.items())]
            )

    def agreement_lost(self, why: str) -> None:
        """Fail what is queued and refuse what comes; training continues."""
        if self._closed:
            return
        if self.is_main:
            log.warning("%s", failures.control_off(why))
            self.state.events.publish(states.EVENT_RANK, state="lost", reason=why)
        self._queue.refuse(JobEnding(failures.refused(why)))

    # On any thread...

    def _wake(self) -> None:
        if self._server is not None:
            self._server.wake()

    def _record_changed(self, record: CommandRecord) -> None:
        if self.is_main:
            self.state.events.publish(states.EVENT_COMMAND, **record.to_json())

    # On the server thread...

    def _handle(self, request: Any, sink: Any) -> Any:
        assert self._queries is not None
        return self._queries.answer(request, sink)

    def _is_controlled(self) -> bool:
        """Return whether the training thread and its integration still exist; end control if not."""
        if self._orphaned is None and self._thread.is_alive():
            return True
        reason = self._orphaned or "the training thread has ended"
        log.warning("Control is off: %s.", reason)
        self.close(reason)
        return False


def _not_shared(added: list[dict[str, str]]) -> dict[str, str]:
    """Return why methods cannot be run that not all ranks added alike, by name; ``added`` has a digest per method."""
    unavailable = {}
    for name in sorted({name for methods in added for name in methods}):
        ranks = [rank for rank, methods in enumerate(added) if methods.get(name) != added[0].get(name)]
        if ranks:
            which = ", ".join(map(str, ranks))
            unavailable[name] = f"rank {which} did not register it as rank 0 did; register it on every rank alike"
    return unavailable


# As in ``server``: one handler for all, since a fork handler cannot be removed.
_controllers: weakref.WeakSet[Controller] = weakref.WeakSet()


def _after_fork() -> None:
    for controller in list(_controllers):
        controller.abandon()
    _controllers.clear()


os.register_at_fork(after_in_child=_after_fork)
