"""Several jobs at once: one call to each of them, some at a time, and one answer or error for each."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

from ..errors import ControlError, InvalidParams
from ..wire.job_status import JobStatus
from . import limits
from .connection import Client
from .selection import select

if TYPE_CHECKING:
    from ..states import Wait
    from ..wire.records import CommandRecord
    from .target import Target

_Answer = TypeVar("_Answer")
_Results = dict[str, _Answer | ControlError]


class Calls(Generic[_Answer]):
    """One call to each of several jobs: an iterator of targets with their answers or errors, as they come.

    Calls run on other threads. Where the iterator is left early, calls that have begun go on, and ``not_begun`` has
    the targets of the others.

    Args:
        targets: the jobs.
        ask: what is done for each, on another thread; it may raise ControlError and OSError.
        parallel: how many calls run at a time.
    """

    def __init__(self, targets: list[Target], ask: Callable[[Target], _Answer], parallel: int) -> None:
        self.targets, self.not_begun = targets, deque(targets)
        self._ask, self._count = ask, len(targets)
        self._done: SimpleQueue[tuple[Target, _Answer | BaseException]] = SimpleQueue()
        self._parallel = min(parallel, self._count)
        self._lock, self._is_left = threading.Lock(), False  # the lock guards not_begun

    def __iter__(self) -> Iterator[tuple[Target, _Answer | ControlError]]:
        try:
            for number in range(self._parallel):  # daemons: Ctrl-C must not wait for jobs that do not answer
                threading.Thread(target=self._work, name=f"forgather-call-{number}", daemon=True).start()
            for _ in range(self._count):
                target, answer = self._done.get()
                if isinstance(answer, BaseException) and not isinstance(answer, ControlError):
                    if not isinstance(answer, OSError):
                        raise answer
                    answer = ControlError(str(answer))  # for example, this process is out of file descriptors
                yield target, answer
        finally:
            with self._lock:
                self._is_left = True

    def _next(self) -> Target | None:
        with self._lock:
            return None if self._is_left or not self.not_begun else self.not_begun.popleft()

    def _work(self) -> None:
        while (target := self._next()) is not None:
            try:
                answer: _Answer | BaseException = self._ask(target)
            except BaseException as err:  # boundary: a fault is raised where the answers are read
                answer = err
            self._done.put((target, answer))


class Jobs:
    """Several jobs (:func:`jobs`). Each method makes one call to each job, and returns a dictionary.

    Its keys are the ids of the jobs, in the order of the words, and the words that mean no job. Its values are what
    the job answered, or the :class:`ControlError` that a call to this job alone would raise. No error is raised.
    """

    def __init__(self, words: list[str | int], every: bool, parallel: int, ssh: str | None) -> None:
        found = select(words, every, ssh)
        self._targets, self._problems = found.targets, found.problems
        #: Jobs that a pattern or ``all`` may mean and that cannot be reached from here, and why, by id.
        self.left_out = found.left_out
        self._parallel = parallel

    def __iter__(self) -> Iterator[str]:
        """Iterate over the ids of the jobs."""
        return (target.name for target in self._targets)

    def __len__(self) -> int:
        return len(self._targets)

    def __repr__(self) -> str:
        return f"<Jobs {', '.join([*self, *self._problems])}>"

    def _each(self, ask: Callable[[Client], _Answer]) -> _Results[_Answer]:
        def call(target: Target) -> _Answer:
            with Client(target) as job:
                return ask(job)

        answers = {target.name: answer for target, answer in Calls(self._targets, call, self._parallel)}
        return {**{name: answers[name] for name in self}, **self._problems}

    def call(self, method: str, /, **params: Any) -> _Results[Any]:
        """Call a method of each job, as :meth:`Client.call`."""
        return self._each(lambda job: job.call(method, **params))

    def command(self, name: str, /, **params: Any) -> _Results[CommandRecord]:
        """Give a command to each job, as :meth:`Client.command`."""
        return self._each(lambda job: job.command(name, **params))

    def status(self) -> _Results[JobStatus]:
        """Ask how far each job is."""
        return self._each(lambda job: JobStatus.from_json(job.call("status")))

    def ranks(self, timeout: float = 5.0) -> _Results[list[dict[str, Any]]]:
        """Ask for the ranks of each job; ``timeout`` is how many seconds a rank may take to answer."""
        return self.call("ranks", timeout=timeout)

    def save(
        self, *, evaluate: Literal["auto"] | bool | None = None, wait: Wait = "accepted", **common: Any
    ) -> _Results[CommandRecord]:
        """Save checkpoints. ``common``: ``timeout``, ``command_id`` and ``reason``, as in :func:`save_checkpoint`."""
        return self.command("save_checkpoint", evaluate=evaluate, wait=wait, **common)

    def stop(self, *, wait: Wait = "accepted", **common: Any) -> _Results[CommandRecord]:
        """Finish the current step of each job and end it."""
        return self.command("graceful_stop", wait=wait, **common)

    def save_stop(
        self, *, evaluate: Literal["auto"] | bool | None = None, wait: Wait = "accepted", **common: Any
    ) -> _Results[CommandRecord]:
        """Save checkpoints, then end the jobs."""
        return self.command("save_and_stop", evaluate=evaluate, wait=wait, **common)

    def abort(self, *, wait: Wait = "accepted", **common: Any) -> _Results[CommandRecord]:
        """End the jobs at once without saving."""
        return self.command("abort", wait=wait, **common)

    def evaluate(
        self, *, counted: bool | None = None, wait: Wait = "accepted", **common: Any
    ) -> _Results[CommandRecord]:
        """Evaluate now; ``counted``: even where something counts evaluations."""
        return self.command("evaluate", counted=counted, wait=wait, **common)

    def pause(self, seconds: float | None = None, *, wait: Wait = "accepted", **common: Any) -> _Results[CommandRecord]:
        """Pause the jobs, at most for so many seconds."""
        return self.command("pause", seconds=seconds, wait=wait, **common)

    def resume(self, *, wait: Wait = "accepted", **common: Any) -> _Results[CommandRecord]:
        """Continue the jobs that are paused."""
        return self.command("resume", wait=wait, **common)

    def set(self, changes: Mapping[str, Any], *, wait: Wait = "accepted", **common: Any) -> _Results[CommandRecord]:
        """Change settings of each job, by name."""
        return self.command("change_settings", changes=dict(changes), wait=wait, **common)

    def when(self, condition: str, do: str, /, *, not_before: int | None = None, **params: Any) -> _Results[Any]:
        """Add a rule to each job: when the condition becomes true, give the command ``do`` with ``params``."""
        given = {"when": condition, "do": do, "params": params}
        return self.call("add_rule", **given, **({} if not_before is None else {"not_before": not_before}))


def jobs(*words: str | int, all: bool = False, parallel: int = limits.PARALLEL, ssh: str | None = None) -> Jobs:
    """Return several jobs, to which each call is made at once.

    Args:
        words: ids; what SLURM or torchrun call a job (the id of a SLURM array means all its tasks); patterns of ids,
            such as ``"run*"``, which mean all jobs that :func:`list_jobs` lists, dead ones, too.
        all: all live jobs, instead of words.
        parallel: how many jobs are called at a time; a call that waits keeps its place.
        ssh: ``[USER@]HOST``, on which the jobs are found and reached.

    Raises:
        InvalidParams: there are neither words nor ``all``, or both; ``parallel`` is not positive.
        JobsDirUnusable, FindError: the jobs directory, or that host, cannot be read.
    """
    if all == bool(words):
        raise InvalidParams("jobs() takes either words that name jobs, or all=True")
    if type(parallel) is not int or parallel < 1:
        raise InvalidParams(f"parallel must be a whole number of at least 1, not {parallel!r:.140}")
    return Jobs(list(words), all, parallel, ssh)
