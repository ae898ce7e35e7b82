"""Exit codes: one place for their numbers, their meaning and the errors that give them."""

from __future__ import annotations

import pytest

from forgather_control import errors
from forgather_control.cli import exit_codes
from forgather_control.cli.exit_codes import exit_code


def test_the_help_names_every_exit_code():
    """The help and the constants say the same."""
    said = exit_codes.HELP.partition("exit codes: ")[2].replace("\n", " ")
    codes = {int(part.split()[0]) for part in said.split(", ")}
    assert codes == {value for name, value in vars(exit_codes).items() if name.isupper() and isinstance(value, int)}


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (errors.NoSuchJob, 3),
        (errors.AmbiguousJob, 2),
        (errors.JobDead, 4),
        (errors.JobNotAnswering, 4),
        (errors.DeadlinePassed, 5),
        (errors.CommandFailed, 1),
        (errors.NotAuthenticated, 1),
        (errors.ControlError, 1),
    ],
)
def test_the_code_of_an_error(kind, code):
    """What is in no row of the table was refused."""
    assert exit_code(kind("why")) == code


def test_a_missing_token_is_usage():
    """No job has been asked; a token that a job refused is another matter."""
    assert exit_code(errors.NotAuthenticated("which?", needs="token")) == 2
