"""The exit codes of the command line: what each means, and which error gives which."""

from typing import Final

from .. import states
from ..errors import AmbiguousJob, ControlError, DeadlinePassed, JobDead, JobNotAnswering, NoSuchJob

DONE: Final = 0
REFUSED: Final = 1
USAGE: Final = 2
NO_SUCH_JOB: Final = 3
NO_ANSWER: Final = 4
TOO_LATE: Final = 5
INTERRUPTED: Final = 130

#: For the help of every verb.
HELP: Final = """\
exit codes: 0 done, 1 the job refused or failed it, 2 usage, 3 no such job,
4 the job is dead or does not answer, 5 the deadline passed, 130 interrupted"""

#: An error of another class was refused.
_BY_CLASS: Final[dict[type[ControlError], int]] = {
    AmbiguousJob: USAGE, NoSuchJob: NO_SUCH_JOB, DeadlinePassed: TOO_LATE,
    JobDead: NO_ANSWER, JobNotAnswering: NO_ANSWER,
}  # fmt: skip


def exit_code(error: ControlError) -> int:
    """Return the exit code of an error; that a token must be given is no answer of a job."""
    return USAGE if error.data.get("needs") == "token" else _BY_CLASS.get(type(error), REFUSED)


def kill_code(outcomes: set[str], missing: int) -> int:
    """Return the exit code of processes that were to end; ``missing`` of them are not recorded, and were left alone."""
    if outcomes & {states.KILL_REFUSED, states.KILL_STUCK}:
        return REFUSED
    return NO_ANSWER if missing or states.KILL_ELSEWHERE in outcomes else DONE
