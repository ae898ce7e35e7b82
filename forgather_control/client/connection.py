"""One connection to a job: call its methods, wait for replies, follow its events, and explain a missing answer."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from .. import states
from ..deadline import Deadline
from ..errors import CommandFailed, ControlError, InternalError, JobDead, JobNotAnswering, NoSuchJob, NotAuthenticated
from ..wire import jsonrpc
from . import limits
from .events import EventQueue
from .peer import Peer
from .target import Target

if TYPE_CHECKING:
    from ..wire.records import CommandRecord  # only commands need it
_Params = dict[str, Any] | list[Any]


class Client:
    """One connection to one job; belongs to one thread at a time. Arguments and errors: see :func:`api.connect`."""

    def __init__(self, target: Target, timeout: float = limits.CALL_TIMEOUT) -> None:
        self._target, self._timeout = target, timeout
        self._transport, token = target.open(Deadline(timeout))
        #: What messages call the job: its id, where that is known, else its address.
        self.name = self._transport.job_id or target.name
        self._last_id, self._is_closed, self._events = 0, False, EventQueue()
        record = target.record
        self._peer = Peer(self.call, record and record.protocol, self._transport.is_same_host)
        try:
            self._shake_hands(token)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection. A command that was accepted is still carried out."""
        self._is_closed = True
        self._transport.close()

    def _shake_hands(self, token: str | None) -> None:
        """Show the token, and make sure that the job is the one that was meant."""
        target = self._target
        if token is not None:
            try:
                self._peer.identify("authenticate", token=token)
            except JobDead as err:
                text = f"{self.name} closed the connection when it was shown a token: is this the job's port?"
                raise JobDead(text) from err
        elif target.endpoint is None:
            return
        if target.job_id is None or self._peer.job_id == target.job_id:
            return
        found = ascii(self._peer.job_id)[:140]
        if target.record is not None:
            raise NotAuthenticated(f"Another job answers at the port of {target.job_id}: {found}")
        text = f"Another job answers there, {found}, not {ascii(target.job_id)[:140]}"
        raise NoSuchJob(text, job=target.job_id)

    @property
    def job_id(self) -> str:
        """The id of the job that answers. InternalError: it answers none."""
        known = self._transport.job_id or self._target.job_id or self._peer.job_id
        if known is None:
            raise InternalError("the other side sent no job id")
        return known

    # Calling...

    def call(self, method: str, /, **params: Any) -> Any:
        """Return the result of one call.

        With ``wait="applied"`` or ``"finished"`` it lasts until then, or for ``timeout`` seconds.

        Raises:
            ControlError: the error that the job answered, as its class; or the client is closed.
            JobDead: the job ended meanwhile, or was restarted as another process.
            JobNotAnswering: it does not answer, or closed the connection though it lives.
        """
        return self.call_raw(method, params)

    def call_raw(self, method: str, params: _Params) -> Any:
        """As :meth:`call`, with parameters by name or by position as they stand on the wire."""
        params, seconds, lost, late = self._prepared(method, params)
        self._last_id += 1
        with self._explained(lost):
            try:
                self._transport.send(jsonrpc.request(method, params, self._last_id), self._timeout)
                reply = self._reply(self._last_id, seconds, late)
            except BaseException:  # Ctrl-C, too: nothing will read the reply
                self._transport.withdraw()
                raise
        if reply.error is not None:
            raise reply.error
        return reply.result

    def command(self, name: str, /, **params: Any) -> "CommandRecord":
        """Give a command and return its record; parameters as on the wire, ``None`` left out.

        Raises:
            CommandFailed: it failed, or was cancelled, while this call waited.
            DeadlinePassed: ``timeout`` passed first; the command is still carried out.
        """
        from ..wire.records import CommandRecord

        record = CommandRecord.from_json(self.give(name, **params))
        if record.trouble is not None:
            raise CommandFailed(record.trouble, **record.to_json())
        return record

    def give(self, name: str, /, **params: Any) -> Any:
        """As :meth:`command`, but return the record as the job sent it, failed or not.

        A job that is too old to keep a ``reason`` does not get it.
        """
        given = {key: value for key, value in params.items() if value is not None}
        if "reason" in given and not self._peer.takes(name, "reason"):
            del given["reason"]
        return self.call(name, **given)

    def _prepared(self, method: str, params: _Params) -> tuple[_Params, float | None, str, str]:
        """Decide how long to wait, and add an expiry to a command, so that it is not carried out after that.

        Returns the parameters, the seconds (``None``: as long as the job shows that it lives), and what a lost
        connection and a missing reply mean for the request, to append to a sentence.
        """
        names = self._peer.parameters(method)
        named = dict(zip(names, params)) if isinstance(params, list) else params
        seconds = self._patience(named)
        if not ("wait" in names and "command_id" in names):
            return params, seconds, "", ""
        lost = f"; whether its {method} was carried out is not known"
        late = f"{lost}, and it may still be carried out"
        has_own = self._transport.can_withdraw or "expires_at" in named or len(named) < len(params)
        now = self._peer.time() if not has_own and self._peer.takes(method, "expires_at") else None
        if now is not None:
            limit = self._transport.silence if seconds is None else seconds
            params = {**named, "expires_at": now + limit - min(limits.EXPIRY_MARGIN, limit / 10)}
            late = (
                f". The {method} expired: the job refuses it if it reads it now. "
                f"See whether it had accepted it before: forgather-control commands {self.name}"
            )
        return params, seconds, lost, late

    def _patience(self, named: dict[str, Any]) -> float | None:
        """Return the seconds to wait for a reply; ``None`` for as long as the job lives."""
        if named.get("wait", states.COMMAND_ACCEPTED) == states.COMMAND_ACCEPTED:
            return self._timeout
        asked = named.get("timeout")
        return asked + limits.REPLY_GRACE if isinstance(asked, (int, float)) and 0 <= asked <= 1e9 else None

    # Receiving...

    def _reply(self, id_: int, seconds: float | None, late: str) -> jsonrpc.Reply:
        """Return the reply to ``id_``; others, for example to our own pings, are skipped."""
        deadline = Deadline(seconds)
        while (message := self._next(deadline)) is not None:
            if isinstance(message, jsonrpc.Reply):
                if message.id == id_ or (message.id is None and message.error is not None):
                    return message
        raise self._unanswered(seconds, late)

    def _next(self, deadline: Deadline) -> jsonrpc.Reply | jsonrpc.Notification | None:
        """Return the next message; ``None`` after the deadline or, without one, after too long a silence."""
        is_patient = deadline.at is None
        while True:
            line = self._transport.receive(Deadline(self._transport.probe_interval) if is_patient else deadline)
            if line is not None:
                break
            if not is_patient or not self._transport.probe():
                return None
        message = jsonrpc.parse_incoming(line)
        if isinstance(message, jsonrpc.Notification):
            self._events.put(message)
        return message

    def _unanswered(self, seconds: float | None, late: str) -> ControlError:
        if self._transport.withdraw():
            late = ": the request was not read. It was taken back, and nothing was done"
        waited = self._transport.silence if seconds is None else seconds
        return JobNotAnswering(f"Job {self.name} did not answer within {waited:g} s{late}", job=self.name)

    @contextmanager
    def _explained(self, note: str = "") -> Iterator[None]:
        """Turn errors of the connection into ours; ``note`` says what its loss means, to append to a sentence."""
        if self._is_closed:
            raise ControlError(f"The connection to job {self.name} was closed here, by close(). Call connect() again")
        try:
            yield
        except ControlError:
            raise
        except TimeoutError as err:
            raise JobNotAnswering(f"Job {self.name} does not read", job=self.name) from err
        except OSError as err:
            why, record = self._transport.why_lost(), self._target.record
            if why is not None:
                raise JobNotAnswering(f"{why} before job {self.name} answered{note}", job=self.name) from err
            if record is None:
                text = f"Job {self.name} closed the connection before it answered{note}"
                raise JobDead(text, job=self.name) from err
            from .diagnosis import connection_lost

            raise connection_lost(record, note) from err

    # Events...

    def events(self, since: int | None = None, kinds: Iterable[str] | None = None) -> Iterator[dict[str, Any]]:
        """Subscribe to the job's events and return an iterator over them, which ends when training does.

        Each event is an object with ``seq``, ``time``, ``kind`` and its facts; ``lost`` says how many events
        before it were dropped. Other calls may be made meanwhile. A new iterator replaces the one before.

        Args:
            since: replay the events after this ``seq``, as far back as the job keeps them; ``None`` for new ones only.
            kinds: which kinds; ``None`` for all.

        Raises:
            ControlError: as :meth:`call`. The job does not know events, or the way to it cannot carry them.
        """
        wanted = None if kinds is None else list(kinds)
        params: dict[str, Any] = {} if since is None else {"since": since}
        if wanted is not None:  # "ended" in any case: it ends the iterator
            params["kinds"] = list(dict.fromkeys([*wanted, states.EVENT_ENDED]))
        self._events = EventQueue()
        self.call_raw("subscribe", params)
        return self._follow(wanted)

    def _follow(self, wanted: list[str] | None) -> Iterator[dict[str, Any]]:
        is_over = False
        try:
            while not is_over:
                event = self._events.take()
                if event is None:
                    with self._explained():
                        if self._next(Deadline(None)) is None:
                            raise self._unanswered(None, "")
                    continue
                is_over = event["kind"] == states.EVENT_ENDED
                if wanted is None or event["kind"] in wanted:
                    yield event
        finally:
            if not is_over and not self._is_closed:
                with suppress(ControlError):  # the iterator was left early; a lost connection shows at the next call
                    self.call_raw("unsubscribe", {})
