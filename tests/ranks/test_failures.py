"""The sentences about lost ranks."""

from __future__ import annotations

from forgather_control.ranks import failures


def test_control_off_says_what_happened_to_what_and_what_next():
    """As the log shows it."""
    why = failures.LOST_CONNECTION % (1, "Connection reset by peer")
    assert failures.CONTROL_OFF % why == (
        "Control is off: rank 1 lost its connection to the store (Connection reset by peer), so ranks can no longer "
        "agree on commands. Training continues."
    )


def test_ranks_that_never_joined_are_named():
    """With the time and what to do; of many ranks a few, and their number."""
    assert failures.not_joined([1]) == (
        "rank 1 never joined within 20 s; control must be on in every rank of the process group, with the same job_id "
        "(callback or TrainingJob)"
    )
    assert failures.not_joined(range(1, 1000)).startswith("ranks 1, 2, 3, 4, 5, 6, 7, 8 and 991 more never joined")


def test_ranks_are_listed_in_the_singular_and_the_plural():
    """As English does."""
    assert failures.not_reported([3]) == (
        "it is unknown whether rank 3 completed it: no report had come when rank 0 ended"
    )
    assert "whether ranks 1, 2 completed it" in failures.not_reported([1, 2])
