"""The spool: files are read only where they are what they seem, in the directory that was meant."""

from __future__ import annotations

import os
import socket

import pytest

from forgather_control.jobs import private_files, spool

from ..support.harness import needs_root


@pytest.fixture
def home(tmp_path):
    """A job's directory with a spool."""
    (tmp_path / "box").mkdir(mode=0o700)
    return tmp_path


@pytest.fixture
def box(home):
    """The spool, open."""
    with spool.opened(str(home), "box", spool.directory_id(str(home))) as box:
        yield box


@pytest.mark.parametrize("kind", ["link", "hard link", "fifo", "socket", "directory"])
def test_only_a_file_of_one_name_is_read(home, box, kind):
    """Whatever else has the name is no spool file, and reading it does not block."""
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
def test_another_users_file_is_no_spool_file(home, box):
    """A file of another user counts only where the spool is that user's."""
    (home / "box" / "a").write_text("a")
    os.chown(home / "box" / "a", 65534, 65534)
    assert spool.read(box, "a", 10) is None
    os.chown(home / "box", 65534, 65534)
    assert spool.read(box, "a", 10)[0] == b"a"


@needs_root
def test_another_users_directory_is_refused(home):
    """A spool that another user made in the job's directory is not opened."""
    os.chown(home / "box", 65534, 65534)
    with pytest.raises(PermissionError), spool.opened(str(home), "box", spool.directory_id(str(home))):
        pass


def test_only_the_directory_that_was_meant(home, tmp_path_factory):
    """Another directory of the same path counts as none; a link is not followed; a spool can be made."""
    other = tmp_path_factory.mktemp("other")
    known = spool.directory_id(str(other))
    with pytest.raises(FileNotFoundError), spool.opened(str(home), "box", known):
        pass
    (home / "link").symlink_to(other)
    with pytest.raises(OSError), spool.opened(str(home), "link", spool.directory_id(str(home))):
        pass
    with spool.opened(str(home), "new", spool.directory_id(str(home)), make=True):
        assert (home / "new").stat().st_mode & 0o777 == 0o700


def test_removed_once(box):
    """Removing a file tells whether it existed."""
    private_files.write(box, "a", b"")
    assert [spool.remove(box, "a"), spool.remove(box, "a")] == [True, False]
