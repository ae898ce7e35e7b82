"""Time-outs, periods and bounds of the client; all times are seconds."""

from typing import Final

#: For connecting, and for a call that waits for nothing but the answer.
CALL_TIMEOUT: Final = 10.0
#: That the client waits longer than the time-out it gave to the job, which answers first.
REPLY_GRACE: Final = 5.0
#: Between the expiry of a request and the moment at which the client gives up, so that a late reply still arrives.
EXPIRY_MARGIN: Final = 1.0
#: For the answers of all jobs together when they are listed.
LIST_TIMEOUT: Final = 2.0
#: Between two checks that the job is still there while a wait has no deadline ...
PING_INTERVAL: Final = 15.0
#: ... and without any sign of life, after which the wait is given up.
SILENCE: Final = 60.0
#: For a process to exit after it closed its sockets (it frees its devices meanwhile).
EXIT_TIME: Final = 1.0
#: Between SIGTERM and SIGKILL for the processes of a job that does not end.
KILL_GRACE: Final = 10.0
#: Events that are kept for :meth:`Client.events` while other calls are made; then the oldest are dropped.
MAX_EVENTS: Final = 10_000
#: For a login over ssh and the start of a Python on the other side, on top of the time-out for connecting.
SSH_START: Final = 20.0
#: For a user to type a passphrase; sshd waits as long (LoginGraceTime).
SSH_TYPING: Final = 120.0
#: For ssh to exit by itself before it gets a signal.
SSH_EXIT: Final = 0.5
#: Bytes that the shell of the other side may print at its start; a message of the day is shorter.
SSH_NOISE: Final = 64 * 1024
#: Bytes of ssh's stderr that are kept.
SSH_ERRORS: Final = 16 * 1024
#: Bytes of a list of jobs; 1,000 jobs with their status are two million.
SSH_LIST: Final = 16 * 1024 * 1024
#: Seconds between two looks of ``wait`` at a job, that an answer may take, and how many points of a metric it asks for.
LOOK_PERIOD: Final = 0.5
LOOK_TIMEOUT: Final = 5.0
POINTS: Final = 1000
#: Least seconds without a step after which a job has stalled; and how many times longer while it saves or evaluates.
STALLED_AFTER: Final = 60.0
STALLED_FACTOR: Final = 10

#: Seconds until a job that was lost is looked for again, and between two looks at what no event tells.
FOLLOW_PERIOD: Final = 1.0
RENEW_PERIOD: Final = 3.0
#: Seconds between two questions to the ranks of a job that is watched, and that they may take to answer.
RANKS_PERIOD: Final = 5.0
RANKS_TIMEOUT: Final = 2.0
#: Events and commands of a job that are kept for a screen, and points of a curve that are asked for.
EVENTS_SHOWN: Final = 8
CURVE_POINTS: Final = 120
#: Jobs that are called at a time where a verb or a function takes several, unless the caller chooses.
PARALLEL: Final = 8
