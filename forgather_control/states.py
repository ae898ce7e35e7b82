"""All words for states that users, programs and log files see, each with its meaning.

Plain strings, because they travel as JSON and because the command line's start pays for every import.
The types below list the words of each group for the type checker and for ``typing.get_args``.
"""

from __future__ import annotations

from typing import Final, Literal, get_args

# A process, judged from this host (processes.liveness.judge).
PROCESS_RUNNING: Final = "running"  #: It exists, perhaps stopped.
PROCESS_GONE: Final = "gone"  #: It is proven to have ended.
PROCESS_ELSEWHERE: Final = "elsewhere"  #: It is on another host or in another PID namespace: unknown.
ProcessState = Literal["running", "gone", "elsewhere"]

# What became of a process that was to be ended (processes.terminate).
KILL_ENDED: Final = "ended"  #: It ended after SIGTERM.
KILL_KILLED: Final = "killed"  #: It ended after SIGKILL only.
KILL_GONE: Final = "gone"  #: It had ended before a signal was sent.
KILL_ELSEWHERE: Final = "elsewhere"  #: It is on another host or in another PID namespace; nothing was sent.
KILL_REFUSED: Final = "refused"  #: It is another user's, hidden, or this very process; nothing was sent.
KILL_STUCK: Final = "stuck"  #: It still exists after SIGKILL: it hangs in the kernel.
KillOutcome = Literal["ended", "killed", "gone", "elsewhere", "refused", "stuck"]

# A job, as ``list`` shows it.
JOB_LIVE: Final = "live"  #: The job itself answered.
JOB_SILENT: Final = "silent"  #: It runs, its socket did not answer.
JOB_DEAD: Final = "dead"  #: It is proven to have ended, and left its directory.
JOB_FOREIGN: Final = "foreign"  #: It is on another host: unknown.
JOB_RUNNING: Final = "running"  #: Its process runs, and its socket was not tried (in answers to ``list_jobs``).
JobState = Literal["live", "silent", "dead", "foreign", "running"]
JOB_STATES: Final[tuple[str, ...]] = get_args(JobState)

# How a job has ended, as ``list --ended`` shows it.
ENDING_FINISHED: Final = "finished"  #: Training reached its end.
ENDING_STOPPED: Final = "stopped"  #: A command ended it.
ENDING_ABORTED: Final = "aborted"  #: An abort ended it.
ENDING_FAILED: Final = "failed"  #: It was ended by an error, or control was.
ENDING_DIED: Final = "died"  #: Its process ended without a word, for example by ``kill -9``.
Ending = Literal["finished", "stopped", "aborted", "failed", "died"]
ENDINGS: Final[tuple[str, ...]] = get_args(Ending)

# A rank of a job, as ``ranks`` and ``stacks`` answer.
RANK_ANSWERING: Final = "answering"  #: It answered.
RANK_SILENT: Final = "silent"  #: It did not answer in time.
RANK_ENDED: Final = "ended"  #: Its training ended.
RANK_NEVER_JOINED: Final = "never joined"  #: It has not joined the agreement of the ranks, or not yet.
RANK_UNKNOWN: Final = "unknown"  #: It cannot be asked: the ranks only poll, or control failed there.
RANK_ABSENT: Final = "absent"  #: Its process is proven to have ended.
RankState = Literal["answering", "silent", "ended", "never joined", "unknown", "absent"]
RANK_STATES: Final[tuple[str, ...]] = get_args(RankState)

# A command, in the order of its life; the last three states are final.
COMMAND_ACCEPTED: Final = "accepted"  #: Queued: the job will apply it.
COMMAND_APPLIED: Final = "applied"  #: Every rank has applied it, at the same step.
COMMAND_FINISHED: Final = "finished"  #: All that it was to do is done.
COMMAND_FAILED: Final = "failed"  #: It ended with an error.
COMMAND_CANCELLED: Final = "cancelled"  #: A client took it back before it was applied.
CommandState = Literal["accepted", "applied", "finished", "failed", "cancelled"]
COMMAND_STATES: Final[tuple[str, ...]] = get_args(CommandState)
FINAL_STATES: Final = frozenset(COMMAND_STATES[2:])
#: The states that a caller can wait for.
AWAITED_STATES: Final = COMMAND_STATES[:3]
#: What a call that gives a command waits for: once it is queued, once every rank applied it, or once it is done.
Wait = Literal["accepted", "applied", "finished"]

# What must have happened before a command is finished (``Method.finishes_when``).
WHEN_APPLIED: Final = "applied"  #: Every rank has applied it.
WHEN_SAVED: Final = "saved"  #: Every rank has written its part of a checkpoint.
WHEN_EVALUATED: Final = "evaluated"  #: Every rank has evaluated.
WHEN_REPORTED: Final = "reported"  #: Every rank has reported its result.
WHEN_ENDED: Final = "ended"  #: Training has ended, on every rank unless each reports another event.
#: Those that each rank reports for itself, after it has applied the command; of several the first.
RANK_REPORTS: Final = (WHEN_SAVED, WHEN_EVALUATED, WHEN_REPORTED, WHEN_ENDED)

# How a command reached the job: ``requested_by.via`` in its record.
VIA_SOCKET: Final = "socket"
VIA_TCP: Final = "tcp"
VIA_FILE: Final = "file"
VIA_SIGNAL: Final = "signal"
VIA_RULE: Final = "rule"
Via = Literal["socket", "tcp", "file", "signal", "rule"]
VIAS: Final[tuple[str, ...]] = get_args(Via)

# The kinds of events (``subscribe``).
EVENT_STARTED: Final = "started"  #: The job can be controlled.
EVENT_PROGRESS: Final = "progress"  #: Step and speed; at most five a second, only while a client subscribes.
EVENT_PHASE: Final = "phase"  #: ``status`` changed.
EVENT_COMMAND: Final = "command"  #: A command's record changed.
EVENT_CHECKPOINT: Final = "checkpoint"  #: A checkpoint is complete on disk.
EVENT_METRICS: Final = "metrics"  #: Values were logged; at most five a second, only while a client subscribes.
EVENT_RANK: Final = "rank"  #: A rank joined, or can no longer be reached.
EVENT_ENDED: Final = "ended"  #: Training has ended.
EventKind = Literal["started", "progress", "phase", "command", "checkpoint", "metrics", "rank", "ended"]
EVENT_KINDS: Final[tuple[str, ...]] = get_args(EventKind)

# What training is doing: ``status`` in the answer to ``status``.
STATUS_STARTING: Final = "starting"  #: Before the first step.
STATUS_TRAINING: Final = "training"
STATUS_EVALUATING: Final = "evaluating"
STATUS_SAVING: Final = "saving"  #: A checkpoint is being written.
STATUS_PAUSED: Final = "paused"  #: All ranks wait until ``resume``.
STATUS_STOPPING: Final = "stopping"  #: A command that ends training was applied.
STATUS_ENDED: Final = "ended"
TrainingStatus = Literal["starting", "training", "evaluating", "saving", "paused", "stopping", "ended"]
TRAINING_STATUSES: Final[tuple[str, ...]] = get_args(TrainingStatus)
