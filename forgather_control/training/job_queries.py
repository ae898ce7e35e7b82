"""Answers to requests: dispatch by the method table, read-only answers from a snapshot, commands into the queue.

Runs on the server thread of rank 0 only, where nothing may block, except ``host_status`` and the list of jobs.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from .. import states
from ..deadline import Deadline
from ..errors import CommandExpired, CommandRefused, ControlError, DeadlinePassed, JobsDirUnusable
from ..jobs import registry
from ..jobs.record import JobRecord, jobs_dir
from ..processes import callers, usage
from ..ranks.group import RankGroup
from ..server.dispatcher import PENDING, Deferred, Peer, ReplySink, Subscription
from ..version import PROTOCOL, VERSION
from ..wire import discovery, jsonrpc
from ..wire.builtin import BUILTIN, TrainingLoop
from ..wire.methods import Method, MethodTable
from ..wire.records import CommandRecord
from . import limits, metrics, outcomes
from .command_queue import CommandQueue, Submission
from .metrics_history import MetricsHistory
from .progress import RunState
from .rank_report import RankReporter
from .rule import Rule, check
from .rules import Rules
from .settings import Settings
from .worker import Task, Worker

#: The members of a job's record that ``list_jobs`` answers.
_PUBLIC: Final = ("job_id", "host", "port", "pid", "started_at", "world_size", "user", "version")


@dataclass(eq=False)
class JobQueries:
    """Answers the requests of clients about one run. Each query of the method table is a method of the same name."""

    state: RunState
    queue: CommandQueue
    group: RankGroup
    reporter: RankReporter
    methods: MethodTable
    loop: TrainingLoop
    settings: Settings
    rules: Rules
    on_request: Callable[[], None]  #: Called before each request.

    def __post_init__(self) -> None:
        #: Raises TooManyCommands where an answer that has to wait could not be kept; set by the server.
        self.check_capacity: Callable[[], None] = lambda: None
        #: Has deferred answers polled again; set by the server.
        self.wake: Callable[[], None] = lambda: None
        self._devices = metrics.DeviceReader(lambda: self.wake())
        self._sink: ReplySink | None = None  # of the request that is being answered
        self._unavailable: dict[str, str] = {}  # why a method that ranks do not share is refused, by name
        self._all_told = False  # whether each rank has told what it registered; one that registered nothing does not
        self._status = jsonrpc.Encoded()
        self._status_mark: object = None
        self._status_at = self._stats_at = float("-inf")  # monotonic
        self._stats: dict[str, Any] = {}
        self._status_lock = threading.Lock()  # guards the four above: status.json has a thread of its own
        self._scan: Task[tuple[float, list[dict[str, Any]]]] | None = None  # the last list of jobs, and when it began
        self._list_at = float("-inf")  # not before
        self.rules.give = self._give
        self.rules.can_give = self._can_give
        self.state.history = MetricsHistory()
        usage.process_stats()  # the first call only sets the mark to measure processor time from

    def answer(self, request: jsonrpc.Request, sink: ReplySink) -> Any:
        """Answer one request; see ``dispatcher.Handler``."""
        self.on_request()
        if request.method == "rpc.discover":
            return discovery.document(self.methods)
        method = self.methods[request.method]
        params = method.bind(request.params)
        self._sink = sink
        if not method.is_command:
            return getattr(self, method.name)(**params)
        return self._command(method, params, sink.peer, not isinstance(request.id, jsonrpc.NoId))

    # Commands...

    def compare(self, added: list[dict[str, str]]) -> None:
        """Refuse methods that not all ranks added alike; ``added`` has a digest by name for each rank."""
        self._all_told = all(added)
        for name in sorted(set().union(*added)):
            ranks = [rank for rank, digests in enumerate(added) if digests.get(name) != added[0].get(name)]
            which = ", ".join(map(str, ranks))
            text = (
                f"rank {which} did not register it as rank 0 did, or has not ended its first step; "
                "register it on every rank alike, before the first step"
            )
            self._unavailable[name] = text if ranks else ""

    def _command(self, method: Method, params: dict[str, Any], peer: Peer, wants_reply: bool) -> Any:
        own = method.own_params(params)
        if self.queue.find(params["command_id"]) is None:
            self._check(method, own, params["expires_at"])
        if params["wait"] != states.COMMAND_ACCEPTED and wants_reply:
            self.check_capacity()  # a request that is answered with "no room" must not be carried out all the same
        by = requested_by(peer)
        record = self.queue.submit(method.name, params["command_id"], own, params["reason"], by)
        self.group.command_queued()
        saves = not method.ends_unsaved or self.loop.no_stop_save is None
        note = {} if saves else {"note": f"nothing will be saved: {self.loop.no_stop_save}"}
        return self._wait(record, params["wait"], params["timeout"], note)

    def _check(self, method: Method, own: dict[str, Any], expires_at: float | None) -> None:
        late = 0.0 if expires_at is None else time.time() - expires_at
        if late > 0:
            raise CommandExpired(f"{method.name} expired {late:.1f} s before the job read it; nothing was done")
        if why := self._unavailable.get(method.name) or self.group.obstacle() or self._not_compared(method.name):
            raise CommandRefused(f"{method.name} cannot be run: {why}")
        for need in method.needs:
            if why := self.loop.cannot(need, own):
                raise CommandRefused(f"{method.name} was refused: {why}", needs=need)

    def _not_compared(self, name: str) -> str | None:
        is_known = self.group.size == 1 or name in BUILTIN or name in self._unavailable
        return None if is_known else "the ranks compare what each registered when their first step has ended"

    def _can_give(self, name: str) -> bool:
        """Return whether a rule may give a command: a rank that lacks it may not have ended its first step."""
        return self._not_compared(name) is None and (self._all_told or not self._unavailable.get(name))

    def _give(self, commands: list[Submission]) -> list[CommandRecord | ControlError]:
        """Give the commands of rules: all that are accepted at one step. On the training thread, too."""
        refused: dict[int, ControlError] = {}
        for index, command in enumerate(commands):
            try:
                self._check(self.methods[command.command], command.params, None)
            except ControlError as err:
                refused[index] = err
        records = iter(self.queue.submit_all(each for index, each in enumerate(commands) if index not in refused))
        self.group.command_queued()
        return [refused.get(index) or next(records) for index in range(len(commands))]

    def _wait(self, record: CommandRecord, until: str, timeout: float | None, note: dict[str, str]) -> Any:
        deadline = Deadline(timeout)

        def poll() -> Any:
            now = self.queue.get(record.command_id)
            if now.is_final or now.state == until:
                return {**now.to_json(), **note}
            if deadline.passed():
                text = f"{now.command} is {now.state} after {timeout:g} s, and will still run; get_command shows it"
                raise DeadlinePassed(text, **now.to_json())
            return PENDING

        if until == states.COMMAND_ACCEPTED:
            return {**record.to_json(), **note}
        return Deferred(poll, deadline.at) if (answer := poll()) is PENDING else answer

    # Queries, as the method table describes them...

    def ping(self) -> dict[str, Any]:
        known = {"job_id": self.state.job_id, "pid": os.getpid(), "protocol": PROTOCOL, "version": VERSION}
        return {**known, "time": time.time()}

    def status(self) -> Any:
        """Return how far the job is; deferred for a moment while metrics are read from a device."""
        if self._devices.is_read(self.state.metrics):
            return self.host_status()
        self._devices.read(self.state.metrics)
        began_at = self._devices.began_at
        deadline = began_at + limits.DEVICE_READ_TIMEOUT

        def poll() -> Any:
            is_read = self._devices.read_at >= began_at
            return self.host_status() if is_read or time.monotonic() >= deadline else PENDING

        return Deferred(poll, deadline) if (answer := poll()) is PENDING else answer

    def host_status(self) -> jsonrpc.Encoded:
        """Return how far the job is, from what is known without a device; written once for each change."""
        with self._status_lock:
            now, mark = time.monotonic(), (self.mark(), self._devices.read_at)
            if mark != self._status_mark or now - self._status_at >= limits.STATUS_AGE:
                if now - self._stats_at >= limits.PROCESS_STATS_AGE:
                    self._stats, self._stats_at = usage.process_stats(), now
                # A change after the mark was read changes the next mark.
                self._status = jsonrpc.encoded({**self._build_status(), **self._stats})
                self._status_mark, self._status_at = mark, now
            return self._status

    def mark(self) -> object:
        """Return a value that differs when ``status`` has something new."""
        return self.state.mark(), self.queue.changes, self.rules.changes

    def _build_status(self) -> dict[str, Any]:
        records = self.queue.records()
        recent = [record for record in records if record.is_final][-limits.RECENT_COMMANDS :]
        commands = [outcomes.brief(record) for record in records if not record.is_final or record in recent]
        values, missing = self._devices.known(self.state.metrics)
        lacks: dict[str, list[Any]] = {"pending_metrics": missing, "ranks_not_joined": self.group.not_joined()}
        lacks["rules"] = self.rules.listed()
        lacks["running"] = self.state.running.report(self.group)
        known = {"metrics": values, "world_size": self.group.size, "commands": commands}
        known["stop_saves"] = self.loop.no_stop_save is None
        known.update((name, names) for name, names in lacks.items() if names)
        return {**self.state.report(), **known}

    def authenticate(self, token: Any) -> dict[str, Any]:
        return self.ping()  # over TCP the token was checked before

    def get_command(self, command_id: str) -> dict[str, Any]:
        return self.queue.get(command_id).to_json()

    def cancel_command(self, command_id: str) -> dict[str, Any]:
        return self.queue.cancel(command_id).to_json()

    def list_commands(self) -> list[dict[str, Any]]:
        return [outcomes.brief(record) for record in self.queue.records()]

    def metrics_history(self, names: list[str] | None, points: int) -> dict[str, list[list[float]]]:
        assert self.state.history is not None
        return self.state.history.report(names, points)

    def list_settings(self) -> Any:
        """Return the settings with their values, deferred until the training thread has read those, for a moment.

        Where a step or an evaluation takes longer, older values say of which step they are.
        """
        number, deadline = self.settings.want_snapshot(), Deadline(limits.SETTINGS_TIMEOUT)

        def poll() -> Any:
            if self.settings.snapshots == number and not deadline.passed():
                return PENDING
            step = self.settings.read_at_step
            is_new = self.settings.snapshots > number or step == self.state.progress.step
            return [{**each, **({} if is_new else {"read_at_step": step})} for each in self.settings.snapshot]

        return Deferred(poll, deadline.at)

    def add_rule(self, when: str, do: str, params: dict[str, Any], not_before: int | None) -> dict[str, Any]:
        assert self._sink is not None
        by = {**requested_by(self._sink.peer), "via": states.VIA_RULE}
        rule = Rule(when, do, check(self.methods[do], params), not_before, by)
        self._check(self.methods[do], rule.params, None)
        return self.rules.add(rule)

    def remove_rule(self, id: int) -> dict[str, Any]:
        return self.rules.remove(id)

    def list_rules(self) -> list[dict[str, Any]]:
        return self.rules.listed()

    def ranks(self, timeout: float) -> Any:
        return self.reporter.ask(self.group, "ranks", timeout)

    def stacks(self, timeout: float, internal: bool) -> Any:
        return self.reporter.ask(self.group, "all stacks" if internal else "stacks", timeout)

    def list_jobs(self) -> Any:
        """Return the jobs of the jobs directory, judged by their processes: to ask them would take too long.

        Deferred, because the file system may hang: another thread lists them, and rests to use little processor time.
        """
        asked, deadline = time.monotonic(), Deadline(limits.LIST_TIMEOUT)

        def poll() -> Any:
            if self._scan is not None and self._scan.wait():
                began_at, jobs = self._scan.result()
                if began_at >= asked:
                    return jobs
            if self._scan is None or self._scan.wait():
                lister = Worker("forgather-list")
                self._scan = lister.submit(self._list, lambda task: self.wake())
                lister.close()
            if deadline.passed():
                raise JobsDirUnusable(f"the jobs directory could not be listed within {limits.LIST_TIMEOUT:g} s")
            return PENDING

        return Deferred(poll, deadline.at) if (answer := poll()) is PENDING else answer

    def _list(self) -> tuple[float, list[dict[str, Any]]]:
        time.sleep(max(0.0, self._list_at - time.monotonic()))
        began_at, used = time.monotonic(), time.thread_time()
        jobs = [
            {**{name: getattr(record, name) for name in _PUBLIC}, "state": self._judge(record)}
            for record in registry.scan(jobs_dir())[0]
        ]
        self._list_at = time.monotonic() + (time.thread_time() - used) / limits.LIST_SHARE
        return began_at, jobs

    def _judge(self, record: JobRecord) -> str:
        if record.job_id == self.state.job_id and record.pid == os.getpid():
            return states.JOB_LIVE
        state = registry.judge(record)
        return states.JOB_RUNNING if state == states.JOB_SILENT else state  # it was not asked, so it is not silent

    # Events...

    def subscribe(self, since: int | None, kinds: list[str] | None) -> Subscription:
        subscriber = self.state.events.subscribe(since, kinds)
        return Subscription({"next": self.state.events.next_seq}, subscriber.pull, subscriber.next_at)

    def unsubscribe(self) -> dict[str, Any]:
        assert self._sink is not None
        self._sink.end_subscription()
        return {"subscribed": False}


def requested_by(peer: Peer) -> dict[str, Any]:
    """Return the caller of a command as its record shows it, from what the kernel says of the peer."""
    user, program = callers.user_name(peer.uid), callers.program_name(peer.pid)
    return {"via": peer.via, "uid": peer.uid, "user": user, "pid": peer.pid, "program": program}
