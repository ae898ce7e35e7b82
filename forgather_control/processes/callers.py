"""Name the user and the program of another process, for records of commands."""

from __future__ import annotations

from . import proc


def user_name(uid: int | None) -> str | None:
    """Return the name of a user id; ``None`` if the system has none for it."""
    import pwd

    try:
        return None if uid is None else pwd.getpwuid(uid).pw_name
    except (KeyError, OverflowError):
        return None


def program_name(pid: int | None) -> str | None:
    """Return the name of the program that a process runs; ``None`` if it is gone or may not be read."""
    psutil = proc.psutil()
    if pid is None or psutil is None:
        return None
    try:
        return str(psutil.Process(pid).name())[:100]
    except (psutil.Error, OSError, ValueError):
        return None
