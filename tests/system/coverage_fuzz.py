"""Coverage-guided fuzzing (atheris) of everything that parses foreign input, each target in a separate process.

``python tests/system/coverage_fuzz.py`` runs every target for FUZZ_SECONDS (60), as many at once as there are cores;
``python tests/system/coverage_fuzz.py TARGET [libFuzzer's arguments]`` runs one until it is interrupted, or on given
files. The exit code is 1 if a target failed, and its input is printed. A target takes bytes and asserts what must hold
for any input; ``test_fuzz`` runs the same targets on seeded random bytes, without atheris.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import logging
import math
import os
import re
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch


def _instrumented() -> Any:
    """Return the context to import the package in: it counts branches where this file is the program."""
    if __name__ != "__main__" or len(sys.argv) == 1:
        return contextlib.nullcontext()
    import atheris

    return atheris.instrument_imports(include=["forgather_control"])


with _instrumented():
    from forgather_control.cli import job_table, output, parser
    from forgather_control.client import recovery, target
    from forgather_control.errors import ControlError, InternalError, InvalidParams, InvalidRequest, ParseError
    from forgather_control.jobs import rank_processes, record, registry
    from forgather_control.processes import liveness
    from forgather_control.server import auth, connection, dispatcher, file_requests, limits
    from forgather_control.wire import addresses, builtin, jsonrpc, records

SECONDS = float(os.environ.get("FUZZ_SECONDS", "60"))
TOKEN = "0123456789abcdef" * 2


# What must hold of a line: an independent reading of JSON-RPC 2.0...


class _Pairs(tuple):
    """The members of an object, in order, duplicates included."""


def reference(line: bytes) -> Any:
    """Return the JSON value of a line, from Python's own parser and one walk.

    Raises:
        ValueError: parsers disagree about it, or it is nested too deeply.
    """
    try:
        return _walk(json.loads(line.decode("utf-8"), object_pairs_hook=_Pairs), 0)
    except RecursionError as err:
        raise ValueError("too deep") from err


def _walk(value: Any, depth: int) -> Any:
    if isinstance(value, (_Pairs, list)):
        depth += 1
        if depth > jsonrpc.MAX_DEPTH:
            raise ValueError("too deep")
    if isinstance(value, _Pairs):
        if len({name for name, _ in value}) < len(value):
            raise ValueError("a name twice")
        return {_walk(name, depth): _walk(item, depth) for name, item in value}
    if isinstance(value, list):
        return [_walk(item, depth) for item in value]
    if isinstance(value, str):
        value.encode("utf-8")
    if isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isfinite(_double(value)):
        raise ValueError("no double")
    return value


def _double(value: float) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf


class Expected(NamedTuple):
    """The expected answer to a line: an id and whether it is an error for each reply; ``None`` for notifications."""

    replies: list[tuple[Any, bool]] | None
    is_batch: bool = False


def expected(line: bytes, refuses: Callable[[str], bool]) -> Expected:
    """Return what the specification says about a line.

    Args:
        refuses: whether a request of this method is answered by an error.
    """
    refusal = Expected([(None, True)])
    if len(line) > jsonrpc.MAX_LINE:
        return refusal
    try:
        value = reference(line)
    except ValueError:
        return refusal
    if not isinstance(value, list):
        one = _expected_of(value, refuses)
        return Expected(None if one is None else [one])
    if not 0 < len(value) <= jsonrpc.MAX_BATCH:
        return refusal
    found = [one for one in (_expected_of(item, refuses) for item in value) if one is not None]
    return Expected(found or None, is_batch=True)


def _expected_of(value: Any, refuses: Callable[[str], bool]) -> tuple[Any, bool] | None:
    if not isinstance(value, dict):
        return None, True
    id_ = value.get("id")
    if type(id_) not in (str, int, float, type(None)):
        return None, True
    right = value.get("jsonrpc") == "2.0" and isinstance(value.get("method"), str)
    right = right and isinstance(value.get("params", {}), (dict, list))
    if not right or value.keys() - {"jsonrpc", "method", "params", "id"}:
        return id_, True
    return (id_, refuses(value["method"])) if "id" in value else None


def strict(line: bytes) -> Any:
    """Parse one line as a parser in another language does."""
    assert line.endswith(b"\n") and line.count(b"\n") == 1, line
    return reference(line.decode("ascii").encode()) if len(line) < 1 << 16 else json.loads(line)


def agrees(answer: bytes, want: Expected) -> None:
    """Assert that a reply line is the expected one."""
    if want.replies is None:
        assert answer == b"", answer
        return
    value = strict(answer)
    assert isinstance(value, list) == want.is_batch, answer
    given = value if want.is_batch else [value]
    assert len(given) == len(want.replies), (answer, want)
    for reply, (id_, is_error) in zip(given, want.replies):
        assert json.dumps(reply["id"]) == json.dumps(id_) and reply["jsonrpc"] == "2.0", (reply, want)
        assert reply.keys() == {"jsonrpc", "id", "error" if is_error else "result"}, (reply, want)
        assert not is_error or _is_error(reply["error"]), reply


def _is_error(value: Any) -> bool:
    return type(value["code"]) is int and isinstance(value["message"], str) and value["message"].isprintable()


class Sink(dispatcher.ReplySink):
    """A reply sink in place of a connection."""

    def __init__(self) -> None:
        super().__init__(dispatcher.Peer())
        self.data, self.listens = b"", True

    def send(self, data: bytes) -> None:
        self.data += data

    def stop_reading(self) -> None:
        self.listens = False


def echo(request: jsonrpc.Request, sink: dispatcher.ReplySink) -> Any:
    """Answer any method; "refuse" answers an error, "break" raises."""
    if request.method == "refuse":
        raise InvalidParams("no", given=request.params)
    if request.method == "break":
        raise RuntimeError("broken")
    return {"method": request.method, "params": request.params}


def echo_refuses(method: str) -> bool:
    """Whether ``echo`` answers an error."""
    return method in ("refuse", "break")


def answered(line: bytes) -> bytes:
    """Return the reply to a line, with ``echo`` as the handler."""
    sink = Sink()
    dispatcher.Dispatcher(echo).dispatch(sink, line)
    assert sink.open == 0 and sink.listens == (len(line) <= jsonrpc.MAX_LINE)
    return sink.data


# The targets: they take bytes; any exception is a finding...


def target_line(data: bytes) -> None:
    """A line: answered as the specification says, twice alike, and encoded requests are parsed as the same."""
    line = data.replace(b"\n", b" ")
    answer = answered(line)
    agrees(answer, expected(line, echo_refuses))
    assert answered(line) == answer
    try:
        message = jsonrpc.parse_message(line)
    except (ParseError, InvalidRequest) as err:
        assert len(str(err)) < 1000
        return
    for item in message.items:
        if isinstance(item, jsonrpc.Request) and not isinstance(item.id, jsonrpc.NoId):
            again = jsonrpc.request(item.method, item.params, item.id)[:-1]
            if len(again) <= jsonrpc.MAX_LINE:
                assert jsonrpc.parse_message(again).items == (item,), again
    assert jsonrpc.parse_json(jsonrpc.encode(jsonrpc.parse_json(line))) == reference(line)


#: The longest line here; short, so that inputs grow beyond it.
LIMIT = 64


def target_framing(data: bytes) -> None:
    """A stream, cut at the places in its first eight bytes: the same lines as uncut, and as ``split`` finds."""
    cuts, stream = data[:8], data[8:]
    pieces, at = [], 0
    for cut in cuts:
        pieces.append(stream[at : at + cut])
        at += cut
    whole = _framed([stream])
    assert whole == _framed([*pieces, stream[at:]])
    lines = stream.split(b"\n")
    lines = lines if lines[-1] else lines[:-1]
    end = next((place + 1 for place, line in enumerate(lines) if len(line) > LIMIT), None)
    assert whole == [line[: LIMIT + 1] for line in lines[:end]]


def _framed(pieces: list[bytes]) -> list[bytes]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        taken = connection.Connection(ours, LIMIT)
        found: list[bytes] = []
        for piece in [*pieces, None]:
            if piece is None:
                theirs.shutdown(socket.SHUT_WR)
            else:
                theirs.sendall(piece)
            for _ in range(len(piece or b"") // LIMIT + 2):
                taken.read()
                while (line := taken.take_line()) is not None:
                    found.append(line[: LIMIT + 1])
                    if len(line) > LIMIT:
                        taken.stop_reading()
        assert not taken.broken and taken.at_end
    return found


def target_token(data: bytes) -> None:
    """The first line over TCP: accepted with the token alone, a reply for a wrong one, none for anything else."""
    line = data.partition(b"\n")[0]
    judge, (ours, theirs) = auth.TokenAuthenticator(TOKEN), socket.socketpair()
    with ours, theirs, patch.object(limits, "AUTH_FAILURE_DELAY", 0.0):
        client = connection.Connection(ours, limits.MAX_FIRST_LINE, dispatcher.Peer("tcp"))
        accepted = judge.admit(client, line)
        verdict = "accepted" if accepted else "not authenticate" if client.broken else "wrong token"
        assert verdict == _verdict(line), verdict
        assert (client.subscription is not None) == (verdict == "wrong token")
        if client.subscription is not None:
            agrees(client.subscription.pull(1), expected(line, lambda method: True))
        for end in range(len(line) + 1) if accepted else ():
            client._received[:] = line[:end]
            judge.check_start(client)
        assert judge.refused == (not accepted)


def _verdict(line: bytes) -> str:
    want = expected(line, lambda method: method != "authenticate")
    if len(line) > limits.MAX_FIRST_LINE or want.replies is None:
        return "not authenticate"
    first = reference(line)[0] if want.is_batch else reference(line) if not want.replies[0][1] else None
    if not isinstance(first, dict) or "id" not in first or want.replies[0][1]:
        return "not authenticate"
    params = first.get("params", {})
    shown = params.get("token") if isinstance(params, dict) else params[0] if len(params) == 1 else None
    return "accepted" if shown == TOKEN else "wrong token"


def target_record(data: bytes) -> None:
    """An endpoint.json: a ValueError in one short line, or a record that all its users accept."""
    try:
        found = record.parse_record(data, "job")
    except ValueError as err:
        _is_short(err)
        return
    assert record.parse_record(json.dumps(found.to_json()).encode(), "job") == found
    if len(data) % 16 == 0:  # system calls take longer than everything else
        assert registry.judge(found) in ("silent", "dead", "foreign")
    if (port := target._port(found)) is not None:
        assert 0 < port.port < 65536 and isinstance(str(port), str)
    job = registry.Job(**{name: getattr(found, name) for name in registry._SHARED}, state="dead")
    assert len(job_table.job_table([job], colour=False).splitlines()) == 2
    strict(jsonrpc.encode(job.to_json()))


def target_ranks(data: bytes) -> None:
    """A ranks.json: a ValueError in one short line, or ranks in order that can be judged."""
    try:
        ranks = rank_processes.parse_ranks(data)
    except ValueError as err:
        _is_short(err)
        return
    assert [rank.rank for rank in ranks] == sorted({rank.rank for rank in ranks})
    assert rank_processes.parse_ranks(json.dumps([rank._asdict() for rank in ranks]).encode()) == ranks
    for rank in ranks[:3] if len(data) % 16 == 0 else ():
        assert liveness.judge(rank.identity) in ("running", "gone", "elsewhere")


def _is_short(err: ValueError) -> None:
    assert len(str(err)) < 400 and str(err).isprintable(), str(err)


def target_reply(data: bytes) -> None:
    """A reply: parsed, or an InternalError; the same holds for what the client builds from it."""
    try:
        reply = jsonrpc.parse_reply(data)
    except InternalError:
        return
    if reply.error is not None:
        assert isinstance(reply.error, ControlError) and isinstance(output.safe(reply.error), str)
        jsonrpc.encode(jsonrpc.error_object(reply.error))
        return
    strict_enough(jsonrpc.encode(reply.result))
    with contextlib.suppress(InternalError):
        assert isinstance(records.CommandRecord.from_json(reply.result).trouble, (str, type(None)))
    with contextlib.suppress(InternalError):
        rows = [
            registry.Job.from_json(row) for row in (reply.result if isinstance(reply.result, list) else [reply.result])
        ]
        job_table.job_table(rows, colour=False)
    with contextlib.suppress(InternalError):
        output.rank_table(recovery.from_reply(reply.result).rows, colour=False)
        output.stacks_text(recovery.from_reply(reply.result).rows)


def strict_enough(line: bytes) -> None:
    """Assert that what is printed of a reply is JSON, whatever the reply was."""
    json.loads(line.decode("ascii"), parse_constant=lambda name: 1 // 0)


def target_address(data: bytes) -> None:
    """An address: its text is parsed as the same address; otherwise InvalidParams."""
    text = data.decode("utf-8", "surrogateescape")
    try:
        found = addresses.parse(text)
    except InvalidParams as err:
        assert len(str(err)) < 300 and str(err).isprintable()
        return
    assert addresses.parse(str(found)) == found
    if isinstance(found, addresses.TcpEndpoint):
        assert 0 < found.port < 65536 and found.host
        addresses.is_loopback(found.host)


def target_words(data: bytes) -> None:
    """A command line, its words separated by NUL: arguments, a usage error or help; never a traceback."""
    words = [os.fsdecode(word) for word in data.split(b"\0")]
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            args = parser.parse(words, "forgather-control")
        except SystemExit as ended:
            assert ended.code in (0, 2) and said.getvalue(), words
            return
    assert args.verb in ("cleanup", "rpc", "dial-stdio") or args.method in builtin.BUILTIN


_servers: list[tuple[Path, file_requests.FileRequestServer, list[bytes]]] = []


def _file_server() -> tuple[Path, file_requests.FileRequestServer, list[bytes]]:
    """Return a job's directory, made once in a process, its server, and the lines that were dispatched."""
    if not _servers:
        home = Path(tempfile.mkdtemp(prefix="fuzz"))
        dispatched: list[bytes] = []
        dispatch = dispatcher.Dispatcher(echo).dispatch

        def note(sink: dispatcher.ReplySink, line: bytes) -> None:
            dispatched.append(line)
            dispatch(sink, line)

        server = file_requests.FileRequestServer(str(home), note, dict, lambda: 0, builtin.BUILTIN)
        _servers.append((home, server, dispatched))
    return _servers[0]


def target_requests(data: bytes) -> None:
    """Request files, ``NAME\\0CONTENT``, separated by two NUL: each dispatched once and answered as its line is."""
    home, server, dispatched = _file_server()
    try:
        put = dict(_put_files(home, data))
        server.tick()
        wanted = {name: content for name, content in put.items() if _is_wanted(name)}
        assert {path.name for path in (home / "requests").iterdir()} == put.keys() - wanted.keys()
        lines = [content.removesuffix(b"\n") for name, content in wanted.items() if _is_line(name, content)]
        lines += [jsonrpc.request(name, {}, name) for name, content in wanted.items() if _is_touch(name, content)]
        assert sorted(dispatched) == sorted(lines), (dispatched, lines)
        for name, content in wanted.items():
            if f"{name}.json" not in wanted and name.removesuffix(".json") not in wanted.keys() - {name}:
                _answered_by_file(home, name, content)
        written = {name.removesuffix(".json") + ".json" for name in wanted}
        assert {path.name for path in (home / "replies").iterdir()} <= written
    finally:
        dispatched.clear()
        server._replies._replies.clear()
        for path in [*(home / "requests").iterdir(), *(home / "replies").iterdir()]:
            path.unlink()


def _put_files(home: Path, data: bytes) -> Iterator[tuple[str, bytes]]:
    for chunk in data.split(b"\0\0")[:4]:
        name, _, content = chunk.partition(b"\0")
        name = name.replace(b"/", b"_")[:200]
        if name not in (b"", b".", b".."):
            (home / "new").write_bytes(content)
            os.rename(home / "new", os.fsencode(home / "requests") + b"/" + name)
            yield os.fsdecode(name), content


def _is_wanted(name: str) -> bool:
    is_name = re.fullmatch(r"(?a:\w)[A-Za-z0-9._-]{0,127}", name) is not None
    return is_name and (name.endswith(".json") or name in builtin.BUILTIN)


def _is_line(name: str, content: bytes) -> bool:
    """Whether it can be a request; otherwise it is refused before it is parsed."""
    return name.endswith(".json") and (content.rstrip().endswith((b"}", b"]")) or len(content) > jsonrpc.MAX_LINE)


def _is_touch(name: str, content: bytes) -> bool:
    return not name.endswith(".json") and not content.strip()


def _answered_by_file(home: Path, name: str, content: bytes) -> None:
    if _is_line(name, content):
        want = expected(content.removesuffix(b"\n"), echo_refuses)
    else:
        want = Expected([(name, False)] if _is_touch(name, content) else [(None, True)])
    try:
        answer = (home / "replies" / (name.removesuffix(".json") + ".json")).read_bytes()
    except FileNotFoundError:
        answer = b""
    agrees(answer, want)


# Seeds...


def _line(**members: Any) -> bytes:
    return json.dumps({"jsonrpc": "2.0", "method": "ping", "id": 1, **members}).encode()


_RECORD = {
    "job_id": "job", "host": socket.gethostname(), "port": 8900, "pid": os.getpid(), "started_at": 1.7e9,
    "socket": "/nowhere/s", "process_started_at": 1.7e9, "boot_id": "b", "world_size": 2, "protocol": 1,
    "version": "1", "user": "me", "address": "0.0.0.0", "token": TOKEN, "tls_sha256": "ab" * 32,
    "launch": {"slurm_job_id": 5, "run_id": "r", "restart_count": 1}, "booted_at": 1.6e9, "pid_namespace": 4,
}  # fmt: skip
_RANK = {"rank": 0, "host": "h", "pid": 5, "started_at": 1.5, "boot_id": None, "stack_fd": 3}
_COMMAND = {
    "command_id": "c", "command": "save_checkpoint", "state": "failed", "requested_at": 1.0, "applied_at_step": 3,
    "result": {"step": 3, "path": "/p"}, "error": {"code": -32002, "message": "no"},
}  # fmt: skip
_LINES = [
    _line(),
    _line(id=None, params={"wait": "finished", "timeout": 1e3}),
    _line(id="\u00e4", method="refuse", params=[1, -0.5, None, True]),
    _line(method="break", id=1.5),
    b'{"jsonrpc": "2.0", "method": "notify"}',
    b"[%b, %b, 1, [], {}]" % (_line(), _line(more=1)),
    b"[]",
    b'{"jsonrpc":"2.0","method":"\\ud83d\\ude00","id":1e400,"params":{"a":NaN,"a":1}}',
    b'{"jsonrpc":"2.0","method":"status","method":"abort","id":1}',
    b"[" * 33 + b"]" * 33,
]


class Fuzzed(NamedTuple):
    """A target, the inputs to start from, and words to build inputs with."""

    run: Callable[[bytes], None]
    seeds: list[bytes]
    words: tuple[str, ...] = ()


_JSON_WORDS = ("{", "}", "[", "]", '"', "\\u", "\\ud800", "null", "true", "NaN", "1e999", "-0", ":", ",", "\ufeff")
_WIRE_WORDS = (*_JSON_WORDS, '"jsonrpc":"2.0"', '"method":', '"params":', '"id":', "refuse", "break", "[{}]")
TARGETS = {
    "line": Fuzzed(target_line, _LINES, _WIRE_WORDS),
    "framing": Fuzzed(target_framing, [b"\1\2\3\4\5\6\7\x40" + b"\n".join(_LINES), b"\0" * 8 + b"x" * 65 + b"\n\n"]),
    "token": Fuzzed(
        target_token,
        [
            _line(method="authenticate", params={"token": TOKEN}),
            _line(method="authenticate", params=["wrong"]),
            b'{"jsonrpc": "2.0", "method": "authenticate", "params": ["%b"]}' % TOKEN.encode(),
            b" \t" + _line(method="authenticate", params=[TOKEN], id=None),
            b"GET / HTTP/1.1\r\n",
        ],
        (*_WIRE_WORDS, TOKEN, "authenticate", '"token":'),
    ),
    "record": Fuzzed(
        target_record, [json.dumps(_RECORD).encode(), b'{"job_id": "job"}'], (*_JSON_WORDS, *map(json.dumps, _RECORD))
    ),
    "ranks": Fuzzed(
        target_ranks,
        [json.dumps([_RANK, {**_RANK, "rank": 1}]).encode(), json.dumps([_RANK, _RANK]).encode()],
        (*_JSON_WORDS, *map(json.dumps, rank_processes.RankRecord._fields)),
    ),
    "reply": Fuzzed(
        target_reply,
        [
            *(jsonrpc.response(1, value) for value in (_COMMAND, [_RANK], [{**_RECORD, "state": "live"}])),
            jsonrpc.response(1, InvalidParams("no", parameter="x")),
            b'{"jsonrpc":"2.0","id":1,"result":%bNaN%b}' % (b"[" * 900, b"]" * 900),
            b'{"jsonrpc":"2.0","id":1,"result":{"job_id":"job","state":"dead","x":%bNaN%b}}' % (b"[" * 600, b"]" * 600),
        ],
        (*_JSON_WORDS, *map(json.dumps, [*_RECORD, *_COMMAND, *_RANK, "result", "error", "message", "2.0"])),
    ),
    "requests": Fuzzed(
        target_requests,
        [b"\0\0".join(b"%d.json\0%b" % pair for pair in enumerate(_LINES[:4])), b"ping\0\0\0status.json\0[", b"-\0x"],
        (*_WIRE_WORDS, ".json", *builtin.BUILTIN),
    ),
    "address": Fuzzed(
        target_address,
        [b"unix:/tmp/s", b"tcp://127.0.0.1:8900", b"tls://[::1]:1", b"tcp://h:0"],
        ("unix:", "tcp://", "tls://", "[", "]", ":", "%"),
    ),
    "words": Fuzzed(
        target_words,
        [
            b"status\0job\0--json",
            b"--ssh\0me@gpu\0save\0--timeout=5\0job",
            b"rpc\0job\0ping\0{}",
            b"abort\0--kill-after\0001",
            b"list\0--remote\0h:1",
            b"ranks\0--timeout=1e9\0--help",
        ],
        (*(method.verb for method in builtin.BUILTIN.values() if method.verb), *("rpc", "cleanup", "dial-stdio"))
        + ("--wait", "--json", "--connect", "--token-file", "--ssh", "--timeout", "--kill-after", "--", "=", "tcp://"),
    ),
}


# Running the targets...


def fuzz(name: str, options: list[str]) -> None:
    """Run one target; the process ends with it. libFuzzer gets seeds and words as files."""
    import atheris

    logging.disable()
    found = TARGETS[name]
    with tempfile.TemporaryDirectory(prefix="fuzz") as folder:
        corpus = Path(folder) / "corpus"
        corpus.mkdir()
        for number, seed in enumerate(found.seeds):
            (corpus / str(number)).write_bytes(seed)
        words = [re.sub(rb'[^ -~]|["\\]', lambda byte: b"\\x%02x" % byte[0][0], word.encode()) for word in found.words]
        (Path(folder) / "words").write_bytes(b"".join(b'"%b"\n' % word for word in words))
        given = [] if any(os.path.exists(option) for option in options) else [str(corpus)]
        given += [f"-dict={folder}/words"] if words else []  # an empty one is an error
        limits = ["-timeout=20", "-rss_limit_mb=2048", "-max_len=4096", f"-artifact_prefix={folder}/"]
        atheris.Setup([sys.argv[0], *limits, *given, *options], found.run)
        atheris.Fuzz()


class Figures(NamedTuple):
    """The result of one target: inputs tried, edges and features reached, and the report if it failed."""

    name: str
    runs: int
    edges: int
    features: int
    trouble: str | None


def campaign(name: str) -> Figures:
    """Run one target in a separate process for ``SECONDS``."""
    options = [f"-max_total_time={math.ceil(SECONDS)}", "-print_final_stats=1"]
    fast = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="fuzz", dir=fast) as folder:  # for whatever it leaves behind
        try:
            done = subprocess.run(
                [sys.executable, __file__, name, *options, f"-artifact_prefix={folder}/"],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=SECONDS * 2 + 120,
                env={**os.environ, "TMPDIR": folder},
            )
            code, said = done.returncode, done.stdout + done.stderr
        except subprocess.TimeoutExpired as err:
            code, said = 1, (err.stdout or b"") + (err.stderr or b"") + b"\nit did not end"
        inputs = [path.read_bytes() for path in Path(folder).glob("*-*") if path.is_file()]
    text = said.decode("utf-8", "backslashreplace")
    reached = [(int(cov), int(ft)) for cov, ft in re.findall(r"cov: (\d+) ft: (\d+)", text)]
    runs = [int(number) for number in re.findall(r"^#(\d+)\b", text, re.MULTILINE)]
    counted = re.search(r"number_of_executed_units: (\d+)", text)
    trouble = None if code == 0 and counted else _essence(text, inputs)
    return Figures(name, int(counted[1]) if counted else max(runs, default=0), *max(reached, default=(0, 0)), trouble)


def _essence(text: str, inputs: list[bytes]) -> str:
    """Return the traceback, and the inputs that led to it in base64."""
    lines = [line for line in text.splitlines() if not re.match(r"#\d|INFO|WARNING|stat::|0x", line)]
    return "\n".join([*lines, *(base64.b64encode(data).decode() for data in inputs)])[-9000:]


def main(names: list[str]) -> int:
    """Run the targets; return 1 if one failed."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = []
        for each in pool.map(campaign, names):
            found.append(each)
            word = "ok" if each.trouble is None else "FOUND"
            print(
                f"{each.name:8} {each.runs:9,} inputs  {each.edges:5} edges  {each.features:6} features  {word}",
                flush=True,
            )
    for each in found:
        if each.trouble is not None:
            print(f"\n{each.name}:\n{each.trouble}", file=sys.stderr)
    troubled = sum(each.trouble is not None for each in found)
    runs = sum(each.runs for each in found)
    print(f"{len(found)} targets, {runs:,} inputs, {SECONDS:g} s each, {troubled} with findings")
    return 1 if troubled else 0


if __name__ == "__main__":
    if len(sys.argv) > 1:
        fuzz(sys.argv[1], sys.argv[2:])
    else:
        sys.exit(main(list(TARGETS)))
