"""Count the answers of several ranks to one question, and know whose are missing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


class Tally:
    """The answers of several ranks: those that came, which are ``missing``, and why some will never come."""

    def __init__(self, ranks: Iterable[int] = ()) -> None:
        self.ranks = frozenset(ranks)
        self.missing = set(self.ranks)
        self.answers: dict[int, Any] = {}
        self.fault: str | None = None

    def add(self, rank: int, answer: Any) -> None:
        """Note an answer; only the first one of a rank that is asked counts."""
        if rank in self.missing:
            self.missing.remove(rank)
            self.answers[rank] = answer

    def drop(self, rank: int, fault: str | None) -> None:
        """Expect no answer from a rank any more: it has nothing to tell, or ``fault`` says why it cannot."""
        if fault is None:
            self.add(rank, {})
        elif rank in self.missing:
            self.missing.remove(rank)
            self.fault = self.fault or fault
