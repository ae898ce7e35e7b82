"""Seeded random lines against a live job: it answers or closes, never stumbles, and trains to the same weights.

FUZZ_LINES and FUZZ_SEED choose more, and others; ``tox -e fuzz`` sends a million.
"""

from __future__ import annotations

import json
import logging
import os
import random
from concurrent.futures import ThreadPoolExecutor

from .world import Wire, running_loop

#: A tenth of them on each further Python.
LINES = int(os.environ.get("FUZZ_LINES", "10000" if os.environ.get("FORGATHER_TEST_LIGHT") == "1" else "100000"))
SEED = int(os.environ.get("FUZZ_SEED", "20261122"))

METHODS = [
    "ping",
    "status",
    "get_command",
    "cancel_command",
    "list_commands",
    "rpc.discover",
    "nosuch",
    "__class__",
    "",
]
VALUES = [None, True, 0, -1, 1e308, "", "x" * 200, "\ud800", "\x00", [], {}, [[]], {"wait": "finished"}, 10**30]


def request(dice: random.Random) -> bytes:
    """Something like a request: right, nearly right, or far from it."""
    message: dict = {"jsonrpc": "2.0", "method": dice.choice(METHODS), "id": dice.choice(VALUES)}
    if dice.random() < 0.5:
        message["params"] = {dice.choice(["command_id", "wait", "timeout", "x"]): dice.choice(VALUES)}
    if dice.random() < 0.2:
        message[dice.choice(["jsonrpc", "method", "params", "id", "more"])] = dice.choice(VALUES)
    text = json.dumps([message] * dice.randrange(3) if dice.random() < 0.1 else message)
    return text.encode()


def mutated(dice: random.Random, line: bytes) -> bytes:
    """The same with bytes changed, cut, doubled or from another world."""
    data = bytearray(line)
    for _ in range(dice.randrange(4)):
        place = dice.randrange(len(data) + 1)
        kind = dice.randrange(4)
        if kind == 0:
            data[place : place + dice.randrange(5)] = dice.randbytes(dice.randrange(5))
        elif kind == 1:
            del data[place:]
        elif kind == 2:
            data[place:place] = dice.choice(
                [b"[" * 50, b"{", b'"', b"\\u", b"\xff\xfe", b"1" * 5000, b"NaN", b"\0", b"\r"]
            )
        else:
            data += data[place:]
    return bytes(data).replace(b"\n", b" ")[:65536]


def attack(path: os.PathLike, seed: int, lines: int) -> int:
    """Send ``lines`` of them on one connection after the other, in pieces of any size; how many were sent."""
    dice = random.Random(seed)
    sent = 0
    while sent < lines:
        with Wire(path) as wire:
            some = min(200, lines - sent)
            data = b"".join(mutated(dice, request(dice)) + dice.choice([b"\n", b"\r\n"]) for _ in range(some))
            while data:
                cut = dice.choice([1, 7, 100, 4096, 1 << 20])
                wire.send(data[:cut])
                data = data[cut:]
            wire.still_answers()
            sent += some
    return sent


def test_random_lines_do_nothing_but_get_answers(jobs_dir, caplog, monkeypatch):
    """After every two hundred of them the connection still answers a valid request; the loop never felt any."""
    from forgather_control import server

    # The budget would make this last for hours; it is tested by itself, in test_server.
    monkeypatch.setattr(server, "SHARE", 1.0)
    with running_loop() as run, caplog.at_level(logging.WARNING):
        path = jobs_dir / "job" / "control.sock"
        with ThreadPoolExecutor(2) as pool:
            assert sum(pool.map(lambda part: attack(path, SEED + part, LINES // 2), range(2))) == LINES // 2 * 2
        assert run.thread.is_alive() and run.saves == [] and not run.job.should_stop
    assert [record for record in caplog.records if record.exc_info] == []
