"""Letters: written whole or not at all, read only where they are what they seem, in the directory that was meant."""

from __future__ import annotations

import os
import socket

import pytest

from forgather_control.jobs import spool

from ..support.harness import needs_root


@pytest.fixture
def home(tmp_path):
    """A job's directory with a box."""
    (tmp_path / "box").mkdir(mode=0o700)
    return tmp_path


@pytest.fixture
def box(home):
    """The box, open."""
    with spool.opened(str(home), "box", spool.directory_id(str(home))) as box:
        yield box


def test_written_whole_and_private(home, box):
    """A letter has its bytes, its owner's mode whatever the umask, and leaves no other file."""
    before = os.umask(0)
    try:
        spool.write(box, "a.json", b"abc")
    finally:
        os.umask(before)
    assert os.listdir(home / "box") == ["a.json"]
    assert (home / "box" / "a.json").stat().st_mode & 0o777 == 0o600
    data, facts = spool.read(box, "a.json", 2)
    assert (data, facts.st_size) == (b"ab", 3)


def test_what_cannot_be_written_leaves_nothing(home, box):
    """Where the name is taken by a directory, the error comes out and the hidden file is gone."""
    (home / "box" / "a.json").mkdir()
    with pytest.raises(OSError):
        spool.write(box, "a.json", b"abc")
    assert os.listdir(home / "box") == ["a.json"]


def test_writing_touches_no_file_that_lies_there(home, box):
    """What has the name that is used before the rename may be a second name of a file elsewhere."""
    precious = home / "precious"
    precious.write_text("precious")
    os.link(precious, home / "box" / f".a.json.{os.getpid()}")
    with pytest.raises(FileExistsError):
        spool.write(box, "a.json", b"abc")
    assert precious.read_text() == "precious" and not (home / "box" / "a.json").exists()


def test_writing_follows_no_link(home, box):
    """A link where the hidden file would be is not written through."""
    (home / "box" / f".a.json.{os.getpid()}").symlink_to(home / "victim")
    with pytest.raises(OSError):
        spool.write(box, "a.json", b"abc")
    assert not (home / "victim").exists()


@pytest.mark.parametrize("kind", ["link", "hard link", "fifo", "socket", "directory"])
def test_only_a_file_of_one_name_is_read(home, box, kind):
    """Whatever else has the name is no letter, and reading it does not block."""
    path = home / "box" / "a"
    (home / "other").write_text("other")
    with socket.socket(socket.AF_UNIX) as sock:
        {
            "link": lambda: path.symlink_to(home / "other"),
            "hard link": lambda: path.hardlink_to(home / "other"),
            "fifo": lambda: os.mkfifo(path),
            "socket": lambda: sock.bind(f"/proc/self/fd/{box}/a"),
            "directory": path.mkdir,
        }[kind]()
        assert spool.read(box, "a", 10) is None
    with pytest.raises(FileNotFoundError):
        spool.read(box, "b", 10)


@needs_root
def test_a_strangers_file_is_no_letter(home, box):
    """A file of another user counts only where the box is that user's."""
    (home / "box" / "a").write_text("a")
    os.chown(home / "box" / "a", 65534, 65534)
    assert spool.read(box, "a", 10) is None
    os.chown(home / "box", 65534, 65534)
    assert spool.read(box, "a", 10)[0] == b"a"


@needs_root
def test_a_strangers_box_is_refused(home):
    """A box that another user put into the directory is not opened."""
    os.chown(home / "box", 65534, 65534)
    with pytest.raises(PermissionError), spool.opened(str(home), "box", spool.directory_id(str(home))):
        pass


def test_only_the_directory_that_was_meant(home, tmp_path_factory):
    """Another directory of the same path is as good as gone; a link as box is not followed; a box can be made."""
    other = tmp_path_factory.mktemp("other")
    known = spool.directory_id(str(other))
    with pytest.raises(FileNotFoundError), spool.opened(str(home), "box", known):
        pass
    (home / "link").symlink_to(other)
    with pytest.raises(OSError), spool.opened(str(home), "link", spool.directory_id(str(home))):
        pass
    with spool.opened(str(home), "new", spool.directory_id(str(home)), make=True):
        assert (home / "new").stat().st_mode & 0o777 == 0o700


def test_names():
    """As job ids: nothing hidden, nothing that leaves the box."""
    assert [spool.is_file_name(name) for name in ("a.json", "save_checkpoint", ".a", "-a", "a/b", "..", "")] == [
        True, True, False, False, False, False, False
    ]  # fmt: skip


def test_removed_once(box):
    """Who removes a letter knows whether it was there."""
    spool.write(box, "a", b"")
    assert [spool.remove(box, "a"), spool.remove(box, "a")] == [True, False]
