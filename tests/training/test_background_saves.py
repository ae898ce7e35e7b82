"""Futures of saves in the background: which are known, and what ends the save. Loops are in ``test_loop``."""

from __future__ import annotations

import itertools
import threading
from concurrent.futures import Future
from types import SimpleNamespace

import pytest

from forgather_control.errors import CommandFailed, InvalidParams
from forgather_control.training import limits
from forgather_control.training.applied_command import Save
from forgather_control.training.background_saves import check, exists, follow, watch

from ..support.harness import MS, SOON, until

SAVE = Save(7)


class Run:
    """A controller that notes how a save ended."""

    def __init__(self) -> None:
        self.saves, self.ended = [], threading.Event()

    def finish_save(self, *facts):
        """As ``Controller``."""
        self.saves.append(facts)

    fail_save = finish_save


@pytest.mark.parametrize("future", [None, 7, object, SimpleNamespace(add_done_callback=1)], ids=repr)
def test_what_is_no_future(future):
    """It is named by its type."""
    with pytest.raises(InvalidParams, match="must have add_done_callback, which"):
        check(future)


def test_a_save_ends_with_its_future(tmp_path):
    """Once, on the thread that completes the future; the error of a job is told as it is."""
    for future, fault in ((Future(), None), (Future(), CommandFailed("no way")), (Future(), ValueError("no"))):
        run = Run()
        follow(run, "save", str(tmp_path), True, future)
        assert run.saves == []
        if fault is None:
            future.set_result(7)
            assert run.saves == [("save", str(tmp_path), True)]
        else:
            future.set_exception(fault)
            assert run.saves == [("save", {"no way": "no way", "no": "ValueError: no"}[str(fault)])]


def test_a_save_ends_when_what_is_watched_for_is_there(monkeypatch):
    """Once it is complete, however long it is written; or when it is written no more, or the run has ended."""
    monkeypatch.setattr(limits, "WATCH_PERIOD", 2 * MS)
    monkeypatch.setattr(limits, "WRITE_TIMEOUT", 2 * SOON)
    done, writes, run, still, over = [], itertools.count(), Run(), Run(), Run()
    over.ended.set()
    watch(over, SAVE, lambda: (None, 0), False)
    until(lambda: over.saves)
    monkeypatch.setattr(limits, "WRITE_TIMEOUT", 100 * MS)
    watch(run, SAVE, lambda: (done[0] if done else None, next(writes)), False)
    watch(still, SAVE, lambda: (None, 0), False)
    until(lambda: still.saves)
    assert still.saves == over.saves and "no complete checkpoint-7" in still.saves[0][1] and run.saves == []
    done.append("/there")
    until(lambda: run.saves == [(SAVE, "/there", False)])
    until(lambda: not any(thread.name == "forgather-watch" for thread in threading.enumerate()))


def test_what_is_there(tmp_path):
    """A file is looked for; a remote path counts at once."""
    path = tmp_path / "x.ckpt"
    assert exists("gs://bucket/x.ckpt") and not exists(str(path))
    path.touch()
    assert exists(str(path)) and exists(str(tmp_path))
