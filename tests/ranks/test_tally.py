"""Answers of several ranks, collected one by one."""

from __future__ import annotations

from forgather_control.ranks.tally import Tally


def test_the_first_answer_of_each_rank_counts():
    """Later ones, and those of ranks that are not asked, change nothing."""
    tally = Tally((0, 2))
    tally.add(2, "two")
    tally.add(2, "again")
    tally.add(1, "one")
    assert (tally.missing, tally.answers) == ({0}, {2: "two"})


def test_a_dropped_rank_answers_nothing_or_is_at_fault():
    """The first fault stands; a rank that has answered is not at fault."""
    tally = Tally(range(4))
    tally.add(0, "done")
    tally.drop(0, "late fault")
    tally.drop(1, None)
    tally.drop(2, "it broke")
    tally.drop(3, "it broke, too")
    assert (tally.missing, tally.answers, tally.fault) == (set(), {0: "done", 1: {}}, "it broke")
    assert tally.ranks == {0, 1, 2, 3}
