"""Descriptors that stay open for long. Other code may close them (os.closerange), and their numbers are used again.

A write to such a number, or closing it, would damage a file of the training.
"""

import os
from typing import NamedTuple


class Kept(NamedTuple):
    """A descriptor, and which file it was when this package opened it."""

    number: int
    device: int
    inode: int

    @classmethod
    def of(cls, number: int) -> "Kept":
        """Note an open descriptor."""
        facts = os.fstat(number)
        return cls(number, facts.st_dev, facts.st_ino)

    def is_open(self) -> bool:
        """Return whether the number is still that of the file. Epoll descriptors are all the same file."""
        try:
            return Kept.of(self.number) == self
        except OSError:
            return False

    def close(self) -> None:
        """Close it, unless other code has."""
        if self.is_open():
            os.close(self.number)
