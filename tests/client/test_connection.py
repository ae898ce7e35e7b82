"""One connection: what is asked, what is waited for, and why no answer came; against peers that misbehave."""

from __future__ import annotations

import json
import os
import socket
import threading
from pathlib import Path

import pytest

from forgather_control import connect, errors
from forgather_control.client import connection
from forgather_control.client.connection import Client
from forgather_control.jobs.record import parse_record
from forgather_control.wire.addresses import TcpEndpoint, UnixEndpoint

from ..support.harness import MS, SOON, TOKEN, descriptors


class Peer:
    """A server of the test's own: accepts one connection and does what ``act(file, socket)`` does.

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
        """Wait for nobody any more; for a peer that nobody should have met."""
        self._leaving = True
        socket.create_connection(self.at, SOON).close()

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.join(SOON)
        self._listener.close()
        assert not self._thread.is_alive()


@pytest.fixture
def folder(jobs_dir: Path) -> Path:
    jobs_dir.mkdir(parents=True, exist_ok=True)
    return jobs_dir


def test_a_job_that_hangs_up_and_lives_is_not_called_dead(folder, monkeypatch):
    """Its process runs, its record stands: it does not answer, which is all that is known."""
    monkeypatch.setattr(connection, "_DYING", 50 * MS)
    mine = {"job_id": "peer", "host": socket.gethostname(), "port": None, "pid": os.getpid(), "started_at": 1.0}
    (folder / "peer").mkdir()
    with Peer(folder, lambda file, sock: file.readline()) as peer:
        (folder / "peer" / "endpoint.json").write_text(json.dumps({**mine, "socket": peer.path}))
        with connect("peer") as job:
            with pytest.raises(
                errors.JobNotAnswering, match=f"hung up .* though pid {os.getpid()} .* still runs; whether"
            ):
                job.call("save_checkpoint")


@pytest.mark.parametrize(
    "answer",
    [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\xff\xfe\n", b"[]\n", b"{}\n", b'{"jsonrpc":"2.0","id":1}\n', b"null\n"],
)
def test_a_peer_that_is_none_of_us_is_named(folder, answer):
    """Garbage instead of a reply is an error of ours, not a traceback of json's."""

    def act(file, sock) -> None:
        file.readline()
        sock.sendall(answer)

    with Peer(folder, act) as peer, Client(UnixEndpoint(peer.path), "peer") as job:
        with pytest.raises(errors.InternalError):
            job.call("ping")


def test_a_patient_wait_asks_whether_anybody_is_there(folder, monkeypatch):
    """Without a deadline a silent peer is asked, and given up after the silence; one that answers is not."""
    monkeypatch.setattr(connection, "_ARE_YOU_THERE", 30 * MS)
    monkeypatch.setattr(connection, "_SILENCE", 150 * MS)
    asked: list[str] = []

    def act(file, sock) -> None:
        for line in file:
            message = json.loads(line)
            asked.append(message["method"])
            if message["method"] == "ping" and len(asked) < 12:
                sock.sendall(b'{"jsonrpc":"2.0","id":null,"result":{}}\n')

    with Peer(folder, act) as peer, Client(UnixEndpoint(peer.path), "peer") as job:
        with pytest.raises(errors.JobNotAnswering):
            job.call("save_checkpoint", wait="finished")
    assert asked[0] == "save_checkpoint" and len(asked) >= 12


def test_replies_of_earlier_calls_are_not_taken_for_later_ones(folder):
    """A reply with another id is passed over."""

    def act(file, sock) -> None:
        file.readline()
        sock.sendall(b'{"jsonrpc":"2.0","id":99,"result":"old"}\n{"jsonrpc":"2.0","id":1,"result":"new"}\n')

    with Peer(folder, act) as peer, Client(UnixEndpoint(peer.path), "peer") as job:
        assert job.call("ping") == "new"


def test_a_reply_without_a_record_is_named(folder):
    """A peer that answers a command with something else is an error of ours."""

    def act(file, sock) -> None:
        file.readline()
        sock.sendall(b'{"jsonrpc":"2.0","id":1,"result":{"state":"finished"}}\n')

    with Peer(folder, act) as peer, Client(UnixEndpoint(peer.path), "peer") as job:
        with pytest.raises(errors.InternalError, match="no command record"):
            job.command("abort")


def test_only_commands_are_waited_for_without_a_deadline(folder):
    """A query whose first parameter, by position, is no wait keeps its deadline."""
    with Peer(folder, lambda file, sock: file.readline() and file.readline()) as peer:
        with Client(UnixEndpoint(peer.path), "peer", timeout=100 * MS) as job:
            with pytest.raises(errors.JobNotAnswering):
                job.call_raw("get_command", ["some-id"])


# The token...


def record_of(job_id: str):
    mine = {"job_id": job_id, "host": socket.gethostname(), "port": None, "pid": os.getpid(), "started_at": 1.0}
    return parse_record(json.dumps(mine).encode(), job_id)


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
        with Client(TcpEndpoint(*peer.at), "job", record=record_of("job"), token=TOKEN) as job:
            assert job.call("ping") == 1
    assert [(one["method"], one["params"]) for one in seen[:2]] == [("authenticate", {"token": TOKEN}), ("ping", {})]
    assert seen[2] == b"" and seen[0]["id"] != seen[1]["id"]


@pytest.mark.parametrize("found", [{"job_id": "other\x1b[2J"}, {"job_id": None}, {}, [], None, "job"])
def test_another_job_at_the_port_is_not_taken_for_this_one(found):
    """Whatever it answers; the connection is closed before anything is asked of it."""
    seen = []
    before = descriptors()
    with Peer(None, answering(seen, {"result": found})) as peer:
        with pytest.raises(errors.NotAuthenticated, match="another job answers at the port of job") as caught:
            Client(TcpEndpoint(*peer.at), "job", record=record_of("job"), token=TOKEN)
        assert str(caught.value).isprintable()
    assert seen[1:] == [b""] and descriptors() == before


def test_a_refused_token_is_the_error_that_the_job_sent():
    """Its class, its sentence; and nothing stays open."""
    before = descriptors()
    with Peer(None, answering([], {"error": {"code": -31025, "message": "not it"}})) as peer:
        with pytest.raises(errors.NotAuthenticated, match=r"^not it$"):
            Client(TcpEndpoint(*peer.at), "job", token=TOKEN)
    assert descriptors() == before


def test_who_hangs_up_on_a_token_is_no_job():
    """The sentence asks whether it is the job's port, and does not hold the token."""
    with Peer(None, lambda file, sock: file.readline()) as peer:
        with pytest.raises(errors.JobDead, match="is this the job's port") as caught:
            Client(TcpEndpoint(*peer.at), "job", token=TOKEN)
    assert TOKEN not in repr(caught.value) + repr(caught.value.data)


def test_who_says_nothing_to_a_token_is_given_up():
    """By the time-out of the connection."""
    done = threading.Event()
    with Peer(None, lambda file, sock: done.wait(SOON)) as peer:
        with pytest.raises(errors.JobNotAnswering) as caught:
            Client(TcpEndpoint(*peer.at), "job", timeout=100 * MS, token=TOKEN)
        done.set()
    assert TOKEN not in repr(caught.value)


def test_without_a_token_none_is_shown(folder):
    """Over the socket the first line is the first call."""
    seen = []
    with Peer(folder, answering(seen, {"result": 1})) as peer, Client(UnixEndpoint(peer.path), "job") as job:
        job.call("ping")
    assert [one and one["method"] for one in seen] == ["ping", b""]
