"""A number is closed and written to only while it is the file that was opened."""

from __future__ import annotations

import os

from forgather_control.descriptors import Kept


def test_it_closes_its_own_file_only(tmp_path):
    """Closed by other code, its number means nothing, or another file, which stays open."""
    kept = Kept.of(os.open(tmp_path, os.O_RDONLY))
    assert kept.is_open()
    os.close(kept.number)
    assert not kept.is_open()
    other, another = os.pipe()
    os.dup2(other, kept.number)
    assert not kept.is_open()
    kept.close()
    os.fstat(kept.number)
    for number in {other, another, kept.number}:
        os.close(number)
    mine = Kept.of(os.open(tmp_path, os.O_RDONLY))
    mine.close()
    assert not mine.is_open()
