"""Private files: written whole or not at all, read only where no other user can have written them."""

from __future__ import annotations

import os
import socket
import stat

import pytest

from forgather_control.jobs import private_files

from ..support.harness import descriptors, needs_root


@pytest.fixture
def opened(tmp_path):
    """A directory, and its descriptor."""
    (tmp_path / "it").mkdir(mode=0o700)
    with private_files.opened(str(tmp_path / "it")) as directory:
        yield tmp_path / "it", directory


# Directories...


def test_only_a_directory_is_opened(tmp_path):
    """A link, a file and nothing are told apart from errors by their errno; no descriptor is left open."""
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path)
    before = descriptors()
    for name in ("file", "link", "none"):
        with pytest.raises(OSError) as caught, private_files.opened(str(tmp_path / name)):
            pass
        assert caught.value.errno in private_files.NO_DIRECTORY
    with private_files.opened(str(tmp_path)) as directory:
        with pytest.raises(OSError), private_files.opened("none", directory):
            pass
    assert descriptors() == before


def test_directories_are_made_private(tmp_path):
    """Each missing one above is 0700 whatever the umask; existing ones stay as they are."""
    (tmp_path / "open").mkdir(mode=0o755)
    before = os.umask(0)
    try:
        private_files.make_directories(str(tmp_path / "open" / "a" / "b"))
    finally:
        os.umask(before)
    private_files.make_directories(str(tmp_path / "open" / "a" / "b"))
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("open", "open/a", "open/a/b")]
    assert modes == [0o755, 0o700, 0o700]


@pytest.mark.parametrize(
    ("mode", "writers", "may"),
    [
        (0o777, stat.S_IWOTH, True),
        (0o1777, stat.S_IWOTH, False),
        (0o775, stat.S_IWOTH, False),
        (0o775, stat.S_IWGRP, True),
        (0o755, stat.S_IWGRP | stat.S_IWOTH, False),
    ],
)
def test_who_may_replace_entries(tmp_path, mode, writers, may):
    """Writers of a directory may, unless it is sticky (as /tmp is)."""
    tmp_path.chmod(mode)
    assert private_files.may_replace(tmp_path.stat(), writers) == may
    assert private_files.is_safe(str(tmp_path)) == (mode in (0o755, 0o1777))
    assert not private_files.is_safe(str(tmp_path / "none"))


# Writing...


@pytest.mark.parametrize("sync", [False, True])
def test_written_whole_and_private(opened, sync):
    """A file has its bytes and mode 0600 whatever the umask; no other file is left; it is replaced as a whole."""
    path, directory = opened
    before = os.umask(0)
    try:
        for data in (b"abc", b"x" * 1_000_000):
            private_files.write(directory, "a.json", data, sync=sync)
            assert (path / "a.json").read_bytes() == data
    finally:
        os.umask(before)
    assert os.listdir(path) == ["a.json"]
    assert (path / "a.json").stat().st_mode & 0o777 == 0o600


def test_what_cannot_be_written_leaves_nothing(opened):
    """Where the name is taken by a directory, the error is raised and the hidden file is removed."""
    path, directory = opened
    (path / "a.json").mkdir()
    with pytest.raises(OSError):
        private_files.write(directory, "a.json", b"abc")
    assert os.listdir(path) == ["a.json"]


def test_writing_touches_no_existing_file(opened):
    """A file that has the hidden name may be a second name of a file elsewhere."""
    path, directory = opened
    precious = path.parent / "precious"
    precious.write_text("precious")
    os.link(precious, path / f".a.json.{os.getpid()}")
    with pytest.raises(FileExistsError):
        private_files.write(directory, "a.json", b"abc")
    assert precious.read_text() == "precious" and not (path / "a.json").exists()


def test_writing_follows_no_link(opened):
    """A link where the hidden file would be is not written through."""
    path, directory = opened
    (path / f".a.json.{os.getpid()}").symlink_to(path.parent / "victim")
    with pytest.raises(OSError):
        private_files.write(directory, "a.json", b"abc")
    assert not (path.parent / "victim").exists()


# Reading...


def test_reading_is_bounded(opened):
    """At most as many bytes as asked for, and the facts of the whole file."""
    path, directory = opened
    (path / "a").write_bytes(b"abc")
    data, facts = private_files.read(directory, "a", 2)
    assert (data, facts.st_size) == (b"ab", 3)
    with pytest.raises(FileNotFoundError):
        private_files.read(directory, "b", 2)


@pytest.mark.parametrize("kind", ["link", "fifo", "socket", "directory"])
def test_only_a_regular_file_is_read(opened, kind):
    """Anything else is an error at once: it is not followed, and reading it does not block."""
    path, directory = opened
    (path.parent / "other").write_text("other")
    before = descriptors()
    with socket.socket(socket.AF_UNIX) as sock:
        {
            "link": lambda: (path / "a").symlink_to(path.parent / "other"),
            "fifo": lambda: os.mkfifo(path / "a"),
            "socket": lambda: sock.bind(f"/proc/self/fd/{directory}/a"),
            "directory": (path / "a").mkdir,
        }[kind]()
        with pytest.raises((OSError, ValueError)):
            private_files.read(directory, "a", 10)
        with pytest.raises(ValueError):
            private_files.read_trusted(str(path), "a", 10)
    assert descriptors() == before


def test_trusted_content_or_none(opened):
    """The content up to the limit; ``None`` without a file, or a directory; longer is an error."""
    path, _ = opened
    (path / "a").write_bytes(b"abc")
    assert private_files.read_trusted(str(path), "a", 3) == b"abc"
    with pytest.raises(ValueError, match="a is longer than 2 bytes"):
        private_files.read_trusted(str(path), "a", 2)
    (path.parent / "link").symlink_to(path)
    for place, name in ((path, "b"), (path / "none", "a"), (path / "a", "a"), (path.parent / "link", "a")):
        assert private_files.read_trusted(str(place), name, 3) is None


def test_what_others_may_write_is_not_trusted(opened):
    """A file, or its directory, that the group or all users may write."""
    path, _ = opened
    (path / "a").write_bytes(b"abc")
    for changed, mode, usual in (("a", 0o620, 0o600), ("a", 0o602, 0o600), (".", 0o770, 0o700), (".", 0o703, 0o700)):
        (path / changed).chmod(mode)
        with pytest.raises(ValueError, match="can be written by other users; chmod go-w"):
            private_files.read_trusted(str(path), "a", 3)
        (path / changed).chmod(usual)
    assert private_files.read_trusted(str(path), "a", 3) == b"abc"


@needs_root
def test_root_reads_the_files_of_any_user(opened):
    """Root may look after the jobs of others."""
    path, _ = opened
    (path / "a").write_bytes(b"abc")
    for name in ("a", "."):
        os.chown(path / name, 65534, 65534)
    assert private_files.read_trusted(str(path), "a", 3) == b"abc"
