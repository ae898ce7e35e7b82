"""What a client learns of the job at the other end: protocol, clock, methods; asked for once, and only if needed."""

from __future__ import annotations

import time

import pytest

from forgather_control.client import limits
from forgather_control.client.connection import Client

from .test_connection import NEWER, Peer, at_port, folder, job, record_of, to

__all__ = ["folder"]  # a fixture


@pytest.mark.parametrize("protocol", [1, None, "2", True])
def test_an_older_job_gets_no_new_parameters(folder, protocol):
    """Neither expires_at nor reason, where the record or else the answer to ping names an older protocol, or none."""
    seen = []
    with Peer(folder, job(seen, ping={"job_id": "peer", "protocol": protocol})) as peer, Client(to(peer)) as client:
        client.command("save_checkpoint", reason="why")
        client.command("abort")
    assert [method for method, _ in seen] == ["ping", "save_checkpoint", "abort"], "asked once"
    assert seen[1][1] == seen[2][1] == {}


def test_a_reason_reaches_a_job_that_keeps_it(folder):
    """Protocol 2, as the answer to ping says."""
    seen = []
    with Peer(folder, job(seen, ping={"job_id": "peer", "protocol": 2})) as peer, Client(to(peer)) as client:
        client.command("save_checkpoint", reason="why", timeout=None)
    assert seen[1][1].keys() == {"reason", "expires_at"} and seen[1][1]["reason"] == "why"


def test_the_clock_is_the_jobs():
    """Over TCP the job's clock may be an hour ahead; its answer to authenticate tells."""
    seen = []
    answer = {"job_id": "job", "protocol": 2, "time": time.time() + 3600}
    far = record_of("job", protocol=2, host="elsewhere")
    with Peer(None, job(seen, authenticate=answer)) as peer, Client(at_port(peer, far)) as client:
        client.call("abort")
    assert 3600 < seen[1][1]["expires_at"] - time.time() < 3600 + limits.CALL_TIMEOUT


def test_a_clock_that_is_not_known_gives_no_expiry():
    """A job that does not send its time gets no expiry."""
    seen = []
    far = record_of("job", protocol=2, host="elsewhere")
    with Peer(None, job(seen, authenticate={"job_id": "job"}, ping={})) as peer, Client(at_port(peer, far)) as client:
        client.call("abort")
    assert seen[-1] == ("abort", {})


# Methods of a newer job...


def test_an_unknown_method_is_discovered(folder):
    """Once a connection, and only for a method that this version does not know; then it is a command like others."""
    seen = []
    with Peer(folder, job(seen, **{"rpc.discover": NEWER})) as peer, Client(to(peer, record_of("peer"))) as client:
        client.call("ping")
        client.call("user.sample", n=1)
        client.call_raw("user.sample", ["accepted", None, "id", None, 2])
        client.call("older")
        client.call("news")
        client.call("nosuch")
    assert [method for method, _ in seen].count("rpc.discover") == 1 and seen[1][0] == "rpc.discover"
    assert seen[2][1].keys() == {"n", "expires_at"}
    assert seen[3][1] == ["accepted", None, "id", None, 2], "an expiry of the caller's, even null, is left"
    assert seen[4][1] == seen[5][1] == seen[6][1] == {}


@pytest.mark.parametrize("document", [[], None, 7, {}, {"methods": [1]}, {"methods": [{"name": [], "params": []}]}])
def test_a_document_that_is_none_discovers_nothing(folder, document):
    """The call is made all the same."""
    seen = []
    answers = {"rpc.discover": lambda params: document if document is not None else "x", "new": 5}
    with Peer(folder, job(seen, **answers)) as peer, Client(to(peer, record_of("peer"))) as client:
        assert client.call("new") == 5
