"""What a client knows of the job that answers: its id, its protocol, its clock, and the parameters of its methods."""

import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from ..errors import WireError
from ..wire.builtin import BUILTIN


class Peer:
    """The job at the other end; it is asked once for each fact that is needed and not known yet.

    Args:
        call: makes a call on the connection.
        protocol: that the job published, if its record was read.
        is_same_host: whether its clock is this host's.
    """

    def __init__(self, call: Callable[..., Any], protocol: int | None, is_same_host: bool) -> None:
        self._call, self._protocol = call, protocol
        self._identity: dict[str, Any] | None = None
        self._clock_offset = 0.0 if is_same_host else None
        self._discovered: dict[str, tuple[str, ...]] | None = None

    def identify(self, method: str, **params: Any) -> None:
        """Ask the job what it is, by ``ping`` or ``authenticate``."""
        answer = self._call(method, **params)
        self._identity = answer if isinstance(answer, dict) else {}
        now = self._identity.get("time")
        if self._clock_offset is None and isinstance(now, (int, float)):
            self._clock_offset = now - time.time()

    def _said(self, name: str, kind: type) -> Any:
        if self._identity is None:
            self.identify("ping")
        value = (self._identity or {}).get(name)
        return value if type(value) is kind else None

    @property
    def job_id(self) -> str | None:
        """The id that the job answers; ``None`` if it answers none."""
        found: str | None = self._said("job_id", str)
        return found

    def time(self) -> float | None:
        """Return the time on the job's clock, in seconds since the epoch; ``None`` if it does not tell."""
        if self._clock_offset is None:
            self._said("time", float)
        return None if self._clock_offset is None else time.time() + self._clock_offset

    def parameters(self, method: str) -> tuple[str, ...]:
        """Return the names of a method's parameters; those that this version does not know, the job describes."""
        known = BUILTIN.get(method)
        if known is not None:
            return tuple(param.name for param in known.params)
        if self._discovered is None:
            self._discovered = {}
            with suppress(WireError):  # an older job, or another program: the call itself will tell
                document = self._call("rpc.discover")
                with suppress(LookupError, TypeError):
                    self._discovered = {
                        method["name"]: tuple(p["name"] for p in method["params"]) for method in document["methods"]
                    }
        return self._discovered.get(method, ())

    def takes(self, method: str, param: str) -> bool:
        """Whether the job's version of a method has a parameter that protocol 2 brought."""
        if param not in self.parameters(method):
            return False
        if method in BUILTIN and self._protocol is None:
            self._protocol = self._said("protocol", int) or 1
        return method not in BUILTIN or (self._protocol or 1) >= 2
