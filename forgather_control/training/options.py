"""The options that every integration takes: documented, checked and stored once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..jobs.record import check_job_id
from ..server import tcp
from . import own_commands, rule, signals


@dataclass(frozen=True)
class ControlOptions:
    """How a training run can be controlled, the same on every rank.

    Raises:
        BadJobId: the job id has the wrong form.
        InvalidParams: another option has an impossible value. Files and ports are not tried before training starts.
    """

    #: The name of the job: 1 to 128 of ``A-Z a-z 0-9 . _ -``, not starting with a dot or dash; ``None`` generates one.
    job_id: str | None = None
    #: A TCP port beside the Unix socket, for clients on other hosts, which must send the token in ``endpoint.json``: a
    #: number, 0 for any free one, ``"auto"`` for the first free one from 8900.
    port: int | str | None = None
    host: str = "127.0.0.1"  #: the address to bind the port to; with ``"0.0.0.0"`` other hosts can connect
    enabled: bool = True  #: ``False`` switches control off
    #: With several ranks, check for commands in a small collective every so many steps. ``None`` checks without
    #: collectives where the store of ``torch.distributed`` can carry commands, else at every logging step
    #: (``logging_steps``, ``log_every_n_steps``, or 50 in a plain loop).
    poll_steps: int | None = None
    #: The command for each signal, such as ``{"SIGTERM": "save_and_stop"}``. A signal to one rank runs its command on
    #: all. Handlers that the script installed before are still called; Lightning's own for SIGTERM is not, as it ends
    #: training with an error.
    signals: Mapping[Any, str] | None = None
    fresh_seconds: float = 0.0  #: a signal's ``save_and_stop`` saves nothing if the last checkpoint is at most this old
    certfile: str | None = None  #: a PEM file with a certificate, to use TLS on the port
    keyfile: str | None = None  #: a PEM file with its private key, unless ``certfile`` contains it
    #: The most seconds that the end of training waits for saves in the background and for other ranks, where a command
    #: is not finished without them. A command that is not finished then has failed; its error says what is unknown.
    close_timeout: float = 60.0
    #: Functions that clients can run, as ``user.NAME``; see :mod:`~forgather_control.training.own_commands`.
    commands: Sequence[Callable[..., Any]] | None = None
    #: Settings that clients can change, beside those of the trainer; see :mod:`~forgather_control.training.settings`.
    settings: Sequence[Any] | Mapping[str, Mapping[str, Any]] | None = None
    #: Rules from the start, each as the parameters of ``add_rule``; see :mod:`~forgather_control.training.rules`. One
    #: that the run cannot carry out costs a warning at the first step.
    rules: Sequence[Mapping[str, Any]] | None = None
    #: ``True`` does not print how to control the job where logging is not configured at all.
    quiet: bool = False

    def __post_init__(self) -> None:
        if self.job_id is not None:
            check_job_id(self.job_id)
        steps = self.poll_steps
        is_count = steps is None or (type(steps) is int and steps >= 1)
        tcp.demand(is_count, "poll_steps", "a number of steps from 1, or None", steps)
        for name in ("fresh_seconds", "close_timeout"):
            seconds = getattr(self, name)
            is_time = isinstance(seconds, (int, float)) and not isinstance(seconds, bool) and 0 <= seconds <= 1e9
            tcp.demand(is_time, name, "a number of seconds from 0 to 1e9", seconds)
        if self.signals is not None:
            signals.parse(self.signals)
        own_commands.parse_all(self.commands or ())
        rule.declared(self.rules or ())
        self.tcp_options()

    def tcp_options(self) -> tcp.TcpOptions | None:
        """Return the TCP port to open; ``None`` without one."""
        return tcp.check(self.port, self.host, self.certfile, self.keyfile)
