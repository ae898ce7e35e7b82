"""One connection: requests, waits and explanations of a missing answer, against peers that misbehave."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from pathlib import Path

import pytest

from forgather_control import connect, errors
from forgather_control.client import limits
from forgather_control.client.connection import Client
from forgather_control.client.target import Target
from forgather_control.jobs.record import JobRecord, parse_record
from forgather_control.wire.addresses import TcpEndpoint, UnixEndpoint

from ..support.harness import MS, SOON, TOKEN, descriptors


class Peer:
    """A server for a test: accept one connection and run ``act(file, socket)`` with it.

    At ``path`` in the folder, or, without one, at the port of ``at``.
    """

    def __init__(self, folder: Path | None, act, host: str = "127.0.0.1", port: int = 0) -> None:
        if folder is None:
            self._listener = socket.create_server((host, port))
            self.at = self._listener.getsockname()[:2]
        else:
            self.path = str(folder / "peer.sock")
            self._listener = socket.socket(socket.AF_UNIX)
            self._listener.bind(self.path)
            self._listener.listen(1)
        self._listener.settimeout(SOON)
        self._leaving = False
        self._thread = threading.Thread(target=self._serve, args=(act,))
        self._thread.start()

    def _serve(self, act) -> None:
        sock, _ = self._listener.accept()
        with sock, sock.makefile("rb") as file:
            if not self._leaving:
                act(file, sock)

    def leave(self) -> None:
        """Stop waiting for a connection, at the end of a test that must not connect."""
        self._leaving = True
        socket.create_connection(self.at, SOON).close()

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.join(SOON)
        self._listener.close()
        assert not self._thread.is_alive()


def record_of(job_id: str, **members) -> JobRecord:
    """The record of a job in this process."""
    mine = {"job_id": job_id, "host": socket.gethostname(), "port": None, "pid": os.getpid(), "started_at": 1.0}
    return parse_record(json.dumps({**mine, **members}).encode(), job_id)


#: What a job describes that knows methods which this version does not.
NEWER = {
    "methods": [
        {
            "name": "user.sample",
            "params": [{"name": name} for name in ("wait", "timeout", "command_id", "expires_at", "n")],
        },
        {"name": "older", "params": [{"name": name} for name in ("wait", "timeout", "command_id")]},
        {"name": "news", "params": [{"name": "since"}]},
    ]
}


def to(peer: Peer, record: JobRecord | None = None) -> Target:
    """The peer at its socket; with a record, the client knows its protocol without asking."""
    return Target("peer", record=record, endpoint=UnixEndpoint(peer.path))


def at_port(peer: Peer, record: JobRecord | None = None) -> Target:
    """The peer at its port, which wants the token."""
    return Target("job", record and record.job_id, record, TcpEndpoint(*peer.at), TOKEN)


@pytest.fixture
def folder(jobs_dir: Path) -> Path:
    jobs_dir.mkdir(parents=True, exist_ok=True)
    return jobs_dir


def test_a_job_that_hangs_up_and_lives_is_not_called_dead(folder, monkeypatch):
    """Its process runs and its record is there, so all that is known is that it does not answer."""
    monkeypatch.setattr(limits, "EXIT_TIME", 50 * MS)
    mine = {"job_id": "peer", "host": socket.gethostname(), "port": None, "pid": os.getpid(), "started_at": 1.0}
    (folder / "peer").mkdir()
    with Peer(folder, lambda file, sock: file.readline()) as peer:
        (folder / "peer" / "endpoint.json").write_text(json.dumps({**mine, "socket": peer.path}))
        with connect("peer") as job:
            with pytest.raises(
                errors.JobNotAnswering,
                match=f"closed the connection .* though pid {os.getpid()} .* still runs; whether",
            ):
                job.call("save_checkpoint")


@pytest.mark.parametrize(
    "answer",
    [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\xff\xfe\n", b"[]\n", b"{}\n", b'{"jsonrpc":"2.0","id":1}\n', b"null\n"],
)
def test_a_peer_that_is_none_of_us_is_named(folder, answer):
    """Garbage instead of a reply is a ControlError, not a traceback of json."""

    def act(file, sock) -> None:
        file.readline()
        sock.sendall(answer)

    with Peer(folder, act) as peer, Client(to(peer)) as job:
        with pytest.raises(errors.InternalError):
            job.call("ping")


def test_a_patient_wait_asks_whether_anybody_is_there(folder, monkeypatch):
    """Without a deadline a silent peer gets pings, and is given up after the silence; one that answers is not."""
    monkeypatch.setattr(limits, "PING_INTERVAL", 30 * MS)
    monkeypatch.setattr(limits, "SILENCE", 150 * MS)
    asked: list[str] = []

    def act(file, sock) -> None:
        for line in file:
            message = json.loads(line)
            asked.append(message["method"])
            if message["method"] == "ping" and len(asked) < 12:
                sock.sendall(b'{"jsonrpc":"2.0","id":null,"result":{}}\n')

    with Peer(folder, act) as peer, Client(to(peer, record_of("peer"))) as job:
        with pytest.raises(errors.JobNotAnswering):
            job.call("save_checkpoint", wait="finished")
    assert asked[0] == "save_checkpoint" and len(asked) >= 12


def test_replies_of_earlier_calls_are_not_taken_for_later_ones(folder):
    """A reply with another id is skipped."""

    def act(file, sock) -> None:
        file.readline()
        sock.sendall(b'{"jsonrpc":"2.0","id":99,"result":"old"}\n{"jsonrpc":"2.0","id":1,"result":"new"}\n')

    with Peer(folder, act) as peer, Client(to(peer)) as job:
        assert job.call("ping") == "new"


def test_a_reply_without_a_record_is_named(folder):
    """A peer that answers a command with something else is an error of ours."""

    def act(file, sock) -> None:
        file.readline()
        sock.sendall(b'{"jsonrpc":"2.0","id":1,"result":{"state":"finished"}}\n')

    with Peer(folder, act) as peer, Client(to(peer, record_of("peer"))) as job:
        with pytest.raises(errors.InternalError, match="no command record"):
            job.command("abort")


def test_only_commands_are_waited_for_without_a_deadline(folder):
    """A query whose first parameter, by position, is no wait keeps its deadline."""
    with Peer(folder, lambda file, sock: file.readline() and file.readline()) as peer:
        with Client(to(peer), 100 * MS) as job:
            with pytest.raises(errors.JobNotAnswering):
                job.call_raw("get_command", ["some-id"])


def test_a_closed_client_says_so(folder):
    """Calls, commands, events and an iterator from before raise one error that says what to do."""
    with Peer(folder, streaming([], event(1))) as peer, Client(to(peer, record_of("peer", protocol=2))) as client:
        events = client.events()
        assert next(events)["seq"] == 1
        client.close()
        for use in (lambda: client.call("ping"), lambda: client.command("abort"), client.events, lambda: next(events)):
            with pytest.raises(errors.ControlError, match=r"by close\(\)\. Call connect\(\) again") as caught:
                use()
            assert type(caught.value) is errors.ControlError


# The token...


def answering(seen, *replies):
    """Answers each line with the next reply, and keeps what came."""

    def act(file, sock) -> None:
        for reply in replies:
            line = file.readline()
            if not line:
                return
            seen.append(json.loads(line))
            sock.sendall(json.dumps({"jsonrpc": "2.0", "id": seen[-1]["id"], **reply}).encode() + b"\n")
        seen.append(file.readline())

    return act


def test_the_token_is_shown_first_and_once():
    """Then the calls; each has an id of its own."""
    seen = []
    with Peer(None, answering(seen, {"result": {"job_id": "job"}}, {"result": 1})) as peer:
        with Client(at_port(peer, record_of("job"))) as job:
            assert job.call("ping") == 1
    assert [(one["method"], one["params"]) for one in seen[:2]] == [("authenticate", {"token": TOKEN}), ("ping", {})]
    assert seen[2] == b"" and seen[0]["id"] != seen[1]["id"]


@pytest.mark.parametrize("found", [{"job_id": "other\x1b[2J"}, {"job_id": None}, {}, [], None, "job"])
def test_another_job_at_the_port_is_not_taken_for_this_one(found):
    """Whatever it answers, the connection is closed before another request is sent."""
    seen = []
    before = descriptors()
    with Peer(None, answering(seen, {"result": found})) as peer:
        with pytest.raises(errors.NotAuthenticated, match="Another job answers at the port of job") as caught:
            Client(at_port(peer, record_of("job")))
        assert str(caught.value).isprintable()
    assert seen[1:] == [b""] and descriptors() == before


def test_a_refused_token_is_the_error_that_the_job_sent():
    """Its class and its message; nothing stays open."""
    before = descriptors()
    with Peer(None, answering([], {"error": {"code": -31025, "message": "not it"}})) as peer:
        with pytest.raises(errors.NotAuthenticated, match=r"^not it$"):
            Client(at_port(peer))
    assert descriptors() == before


def test_who_hangs_up_on_a_token_is_no_job():
    """The sentence asks whether it is the job's port, and does not hold the token."""
    with Peer(None, lambda file, sock: file.readline()) as peer:
        with pytest.raises(errors.JobDead, match="is this the job's port") as caught:
            Client(at_port(peer))
    assert TOKEN not in repr(caught.value) + repr(caught.value.data)


def test_who_says_nothing_to_a_token_is_given_up():
    """By the time-out of the connection."""
    done = threading.Event()
    with Peer(None, lambda file, sock: done.wait(SOON)) as peer:
        with pytest.raises(errors.JobNotAnswering) as caught:
            Client(at_port(peer), 100 * MS)
        done.set()
    assert TOKEN not in repr(caught.value)


def test_without_a_token_none_is_shown(folder):
    """Over the socket the first line is the first call."""
    seen = []
    with Peer(folder, answering(seen, {"result": 1})) as peer, Client(to(peer)) as job:
        job.call("ping")
    assert [one and one["method"] for one in seen] == ["ping", b""]


# Commands that expire...


def job(seen, **answers):
    """A job of this version: answers by method, a value or a function of the parameters; the others with a record."""
    record = {"command_id": "i", "command": "c", "state": "finished", "requested_at": 1.0}

    def act(file, sock) -> None:
        for line in file:
            request = json.loads(line)
            seen.append((request["method"], request["params"]))
            answer = answers.get(request["method"], record)
            answer = answer(request["params"]) if callable(answer) else answer
            if answer is not None:
                sock.sendall(json.dumps({"jsonrpc": "2.0", "id": request["id"], "result": answer}).encode() + b"\n")

    return act


def test_a_command_expires_when_the_client_gives_up(folder):
    """A job of protocol 2 gets an expiry shortly before the client gives up; a query or an own expiry is kept."""
    seen = []
    with Peer(folder, job(seen)) as peer, Client(to(peer, record_of("peer", protocol=2)), 8.0) as client:
        before = time.time()
        client.call("save_checkpoint")
        client.call("save_checkpoint", wait="applied", timeout=100)
        client.call("save_checkpoint", wait="finished")
        client.call_raw("save_checkpoint", ["accepted", None, "id"])
        client.call("save_checkpoint", expires_at=7.5)
        client.call("status")
    expiries = [params.get("expires_at") for _, params in seen]
    waits = [expiry and round(expiry - before) for expiry in expiries]
    assert waits[:4] == [7, 104, 59, 7] and expiries[4:] == [7.5, None]
    assert seen[3][1]["wait"] == "accepted" and seen[3][1]["command_id"] == "id"


@pytest.mark.parametrize(
    ("method", "protocol", "said"),
    [
        ("save_checkpoint", 2, "The save_checkpoint expired: the job refuses it if it reads it now. See whether"),
        ("save_checkpoint", 1, "whether its save_checkpoint was carried out is not known, and it may still be"),
        ("status", 2, r"did not answer within 0.1 s$"),
    ],
)
def test_a_time_out_says_what_can_still_happen(folder, method, protocol, said):
    """An expired command is refused, an older job may carry it out later, a query has no effect."""
    silent = job([], **{method: None})
    with Peer(folder, silent) as peer, Client(to(peer, record_of("peer", protocol=protocol)), 100 * MS) as client:
        with pytest.raises(errors.JobNotAnswering, match=said):
            client.call(method)


@pytest.mark.parametrize("params", [{"wait": "finished"}, {"wait": "applied", "timeout": "x"}, ["finished"]])
def test_a_wait_of_an_unknown_command_has_no_deadline(folder, params):
    """By name or by position: the client waits as long as the job shows that it lives."""
    done = threading.Event()

    def sample(_params):
        done.wait(SOON)
        return 5

    answers = {"rpc.discover": NEWER, "user.sample": sample}
    with Peer(folder, job([], **answers)) as peer, Client(to(peer, record_of("peer")), 100 * MS) as client:
        threading.Timer(300 * MS, done.set).start()
        assert client.call_raw("user.sample", params) == 5


@pytest.mark.parametrize(
    ("params", "seconds"),
    [
        ({}, 10.0),
        ({"wait": "accepted", "timeout": 99}, 10.0),
        ({"wait": "finished"}, None),
        ({"wait": "finished", "timeout": None}, None),
        ({"wait": "applied", "timeout": 3}, 8.0),
        ({"wait": "finished", "timeout": float("nan")}, None),
        ({"wait": "finished", "timeout": float("inf")}, None),
        ({"wait": "finished", "timeout": "5"}, None),
    ],
)
def test_how_long_a_reply_is_waited_for(folder, params, seconds):
    """The time-out of the call, or the caller's wait and a little more; the job refuses what is no number."""
    with Peer(folder, lambda file, sock: file.readline()) as peer, Client(to(peer)) as client:
        assert client._patience(params) == seconds


# Events...


def event(seq, kind="progress", **facts):
    return {"jsonrpc": "2.0", "method": "event", "params": {"seq": seq, "time": 1.0, "kind": kind, **facts}}


def streaming(seen, *events, tail=()):
    """A job that sends these events after the reply to subscribe, and the others before its next reply."""

    def act(file, sock) -> None:
        def send(*messages) -> None:
            sock.sendall(b"".join(json.dumps(message).encode() + b"\n" for message in messages))

        for line in file:
            request = json.loads(line)
            seen.append((request["method"], request["params"]))
            reply = {"jsonrpc": "2.0", "id": request["id"], "result": {"next": 1}}
            if request["method"] == "subscribe":
                send(reply, *events)
            else:
                send(*tail, reply)

    return act


def test_events_until_the_end(folder):
    """Each event as it was sent; the last one ends the iterator, and the connection serves on."""
    seen = []
    sent = [event(1, "started"), event(2, step=5), event(3, "ended")]
    with Peer(folder, streaming(seen, *sent)) as peer, Client(to(peer)) as client:
        assert list(client.events()) == [one["params"] for one in sent]
        assert client.call("ping") == {"next": 1}
    assert [method for method, _ in seen] == ["subscribe", "ping"], "nothing to unsubscribe from"


def test_events_of_some_kinds_end_as_well(folder):
    """The end is subscribed to in any case, and only passed on if it was asked for."""
    seen = []
    with Peer(folder, streaming(seen, event(4, "metrics"), event(5, "ended"))) as peer, Client(to(peer)) as client:
        assert [one["seq"] for one in client.events(since=3, kinds=("metrics",))] == [4]
    assert seen == [("subscribe", {"since": 3, "kinds": ["metrics", "ended"]})]


def test_events_and_replies_interleave(folder):
    """A call made meanwhile gets its reply, and the events before that are not lost; other notifications are."""
    seen = []
    other = {"jsonrpc": "2.0", "method": "news", "params": 7}
    tail = [event(2), other, event(3, "ended")]
    with Peer(folder, streaming(seen, event(1), tail=tail)) as peer, Client(to(peer)) as client:
        got = []
        for one in client.events():
            got.append(one["seq"])
            if one["seq"] == 1:
                assert client.call("ping") == {"next": 1}
        assert got == [1, 2, 3]


def test_an_iterator_that_is_left_unsubscribes(folder):
    """Left by break: unsubscribed at once. Left open when the connection is closed: nothing more is sent."""
    seen = []
    with Peer(folder, streaming(seen, event(1), event(2))) as peer, Client(to(peer)) as client:
        for _ in client.events():
            break
        assert client.call("ping") == {"next": 1}
        left = client.events()
        assert next(left)["seq"] == 1
    left.close()
    assert [method for method, _ in seen] == ["subscribe", "unsubscribe", "ping", "subscribe"]


def test_events_of_a_job_that_dies(folder):
    """The events come, then the reason."""
    with Peer(folder, lambda file, sock: file.readline() and sock.sendall(
        b'{"jsonrpc":"2.0","id":1,"result":{"next":1}}\n' + json.dumps(event(1)).encode() + b"\n")
    ) as peer, Client(to(peer)) as client:  # fmt: skip
        stream = client.events()
        assert next(stream)["seq"] == 1
        with pytest.raises(errors.JobDead, match="closed the connection"):
            next(stream)


def test_a_silent_stream_is_given_up(folder, monkeypatch):
    """While nothing happens the job is pinged; when it does not answer that either, the iterator says so."""
    monkeypatch.setattr(limits, "PING_INTERVAL", 30 * MS)
    monkeypatch.setattr(limits, "SILENCE", 150 * MS)
    seen = []

    def act(file, sock) -> None:
        sock.sendall(b'{"jsonrpc":"2.0","id":1,"result":{"next":1}}\n')
        for line in file:
            seen.append(json.loads(line)["method"])
            if len(seen) < 10:
                sock.sendall(b'{"jsonrpc":"2.0","id":null,"result":{}}\n')

    with Peer(folder, act) as peer, Client(to(peer), 100 * MS) as client:
        with pytest.raises(errors.JobNotAnswering, match="did not answer within"):
            next(client.events())
    assert seen.count("ping") >= 9


def test_a_refused_subscription_raises_at_once(folder):
    """events() itself raises, not the first step of the iterator."""
    with Peer(folder, answering([], {"error": {"code": -32601, "message": "no method"}})) as peer:
        with Client(to(peer)) as client, pytest.raises(errors.MethodNotFound):
            client.events()
