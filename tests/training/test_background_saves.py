"""Futures of saves in the background: which are known, and what ends the save. Loops are in ``test_loop``."""

from __future__ import annotations

from concurrent.futures import Future
from types import SimpleNamespace

import pytest

from forgather_control.errors import CommandFailed, InvalidParams
from forgather_control.training.background_saves import check, exists, follow


class Run:
    """A controller that notes how a save ended."""

    def __init__(self) -> None:
        self.ended = []

    def finish_save(self, *facts):
        """As ``Controller``."""
        self.ended.append(facts)

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
        assert run.ended == []
        if fault is None:
            future.set_result(7)
            assert run.ended == [("save", str(tmp_path), True)]
        else:
            future.set_exception(fault)
            assert run.ended == [("save", {"no way": "no way", "no": "ValueError: no"}[str(fault)])]


def test_what_is_there(tmp_path):
    """A file is looked for; a remote path counts at once."""
    path = tmp_path / "x.ckpt"
    assert exists("gs://bucket/x.ckpt") and not exists(str(path))
    path.touch()
    assert exists(str(path)) and exists(str(tmp_path))
