"""The server as hosts start it, with the SDK's own client over stdio, in both eras of the protocol."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from ..support.harness import ROOT, SOON, cli, needs, needs_mcp, running_loop, strict

pytestmark = [needs_mcp, pytest.mark.once]


def client(mode, *words):
    """The SDK's client, which starts a server and ends it."""
    from mcp import Client, StdioServerParameters

    env = {"FORGATHER_JOBS_DIR": os.environ["FORGATHER_JOBS_DIR"], "PYTHONPATH": str(ROOT)}
    words = ["-m", "forgather_control", "mcp", *words]
    return Client(StdioServerParameters(command=sys.executable, args=words, env=env), mode=mode)


@pytest.mark.parametrize("mode, version", [("legacy", "2025-11-25"), ("2026-07-28", "2026-07-28")])
def test_the_whole_path(mode, version):
    """Discover, read, be refused an act, be allowed it, and find the checkpoint on disk."""

    async def reads():
        async with client(mode) as server:
            assert server.protocol_version == version
            tools = {tool.name: tool for tool in (await server.list_tools()).tools}
            assert {"list", "status", "wait", "metrics_history", "events", "ranks", "stacks"} <= tools.keys()
            assert all(tool.annotations.read_only_hint for tool in tools.values()) and "save" not in tools
            listed = await server.call_tool("list")
            assert [row["job_id"] for row in listed.structured_content["data"]] == ["run1"]
            status = await server.call_tool("status", {"job": "run1"})
            assert status.structured_content["data"]["status"] == "training" and not status.is_error
            assert status.content[0].text.startswith("Job run1. ")
            refused = await server.call_tool("save", {"job": "run1"})
            assert refused.is_error and "without --allow save" in refused.content[0].text

    async def acts():
        async with client(mode, "--allow", "save,stop", "--job", "run1") as server:
            tools = {tool.name: tool for tool in (await server.list_tools()).tools}
            hints = {name: tools[name].annotations.destructive_hint for name in ("save", "stop")}
            assert hints == {"save": False, "stop": True} and not tools["save"].annotations.read_only_hint
            saved = await server.call_tool("save", {"reason": "asked to"})
            assert saved.structured_content["data"]["state"] == "finished"
            return saved.structured_content["data"]["result"]["path"]

    with running_loop("run1") as run:
        asyncio.run(reads())
        assert run.saves == []
        path = asyncio.run(acts())
        assert Path(path).is_dir() and run.saves == [path]


# As a process...

HELLO = {"protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": {"name": "test", "version": "1"}}


@contextmanager
def server(*words):
    """A server that has answered the first request."""
    words = [sys.executable, "-m", "forgather_control", "mcp", *words]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(words, cwd=ROOT, **pipes) as process:
        try:
            send(process, "initialize", HELLO, 1)
            assert strict(process.stdout.readline())["result"]["serverInfo"]["name"] == "forgather-control"
            send(process, "notifications/initialized")
            yield process
        finally:
            process.kill()


def send(process, method, params=None, id_=None):
    message = {"jsonrpc": "2.0", "method": method, **({} if params is None else {"params": params})}
    process.stdin.write(json.dumps(message | ({} if id_ is None else {"id": id_})).encode() + b"\n")
    process.stdin.flush()


@pytest.mark.parametrize("how, code", [("input", 0), ("interrupt", 130)])
def test_the_end(how, code):
    """The end of its input, and Ctrl-C, end it at once, also while a call waits; its output has only the protocol."""
    with running_loop("run1"), server() as process:
        send(process, "tools/call", {"name": "wait", "arguments": {"timeout": 600}}, 2)
        send(process, "tools/call", {"name": "status"}, 3)
        assert strict(process.stdout.readline())["id"] == 3
        if how == "input":
            process.stdin.close()
        else:
            process.send_signal(signal.SIGINT)
        assert process.wait(SOON) == code
        left = [strict(line) for line in process.stdout]
        assert [(reply["id"], "error" in reply) for reply in left] in ([], [(2, True)])
        assert b"Traceback" not in process.stderr.read()


def test_nonsense_and_a_reader_that_has_gone():
    """Lines that are no JSON are passed over, wrong requests are answered; a closed output ends it without a word."""
    with server() as process:
        process.stdin.write(b"nonsense\n\xff\n[]\n{}\n")
        send(process, "nonsense", id_=3)
        assert strict(process.stdout.readline())["error"]["code"] == -32601
        send(process, "tools/call", {"name": 5}, 4)
        assert strict(process.stdout.readline())["error"]["code"] == -32602
        process.stdout.close()
        send(process, "tools/list", id_=5)
        assert process.wait(SOON) == 0 and process.stderr.read() == b""


def test_without_the_sdk(tmp_path):
    """One sentence, which names the extra; also for a version that is too old."""
    (tmp_path / "mcp_types.py").write_text("raise ImportError('not here')")
    done = cli("mcp", env={"PYTHONPATH": f"{tmp_path}:{ROOT}"})
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == (
        "forgather-control mcp needs the Model Context Protocol SDK, version 2: pip install 'forgather_control[mcp]'\n"
    )


def test_wrong_words():
    """They are an error of usage, before anything is served."""
    done = cli("mcp", "--allow", "sav")
    assert done.returncode == 2 and "did you mean save?" in done.stderr and done.stdout == ""
    assert cli("mcp", "--ssh", "host").returncode == 2


@needs("npx")
@pytest.mark.openrpc
@pytest.mark.timeout(600)
def test_the_inspector(jobs_dir):
    """The protocol's own inspector lists the tools and calls them: a read, a save, and one that is refused."""

    def inspect(*words):
        start = ["-e", f"FORGATHER_JOBS_DIR={jobs_dir}", "-e", f"PYTHONPATH={ROOT}", sys.executable, "-m"]
        words = [*start, "forgather_control", "mcp", "--allow", "save", "--method", *words]
        words = ["npx", "-y", "@modelcontextprotocol/inspector@2.12.0", "--cli", *words]
        done = subprocess.run(words, capture_output=True, text=True, timeout=300)  # it fails where the tool does
        return json.loads(done.stdout)

    def call(name, *more):
        return inspect("tools/call", "--tool-name", name, *more)

    with running_loop("run1") as run:
        assert {"list", "status", "save"} <= {tool["name"] for tool in inspect("tools/list")["tools"]}
        assert call("status", "--tool-arg", "job=run1")["structuredContent"]["data"]["job_id"] == "run1"
        assert call("save")["structuredContent"]["data"]["result"]["path"] in run.saves
        assert call("save", "--tool-arg", "timeout=601")["isError"] is True and len(run.saves) == 1
