"""What an AI assistant does with a job, step by step: ``python examples/assistant.py``, with the extra ``mcp``.

It plays the host of an assistant: it starts ``forgather-control mcp``, and calls its tools by the protocol's own
client. A job is discovered, read, and waited for; a save is refused, then allowed, and its checkpoint is on disk.
"""

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from mcp import Client, StdioServerParameters

TRAINING = """
import sys, time
from pathlib import Path
from forgather_control import TrainingJob

with TrainingJob(job_id="run1", max_steps=10_000, quiet=True) as job:
    for step in range(1, 10_001):
        time.sleep(0.01)
        job.log(loss=1 / step)
        job.step(step)
        if job.should_save:
            path = Path(sys.argv[1]) / f"checkpoint-{step}"
            path.mkdir(parents=True)
            job.saved(path)
        if job.should_stop:
            break
"""

#: What is printed of an answer, if it has any of it; the whole is longer.
SHOWN = ("job_id", "kind", "state", "status", "global_step", "holds", "metrics", "applied_at_step", "result")


def server(*words: str) -> Client:
    """Return a client of a server that is started with these words; a host passes on few variables by itself."""
    names = ("FORGATHER_JOBS_DIR", "PYTHONPATH")
    env = {name: os.environ[name] for name in names if name in os.environ}
    arguments = ["-m", "forgather_control", "mcp", *words]
    return Client(StdioServerParameters(command=sys.executable, args=arguments, env=env))


async def ask(client: Client, tool: str, **arguments: Any) -> Any:
    """Call a tool, print what was said, and return what it answered; ``None`` if it was refused."""
    print(f"> {tool} {json.dumps(arguments)}")
    answer = await client.call_tool(tool, arguments)
    if answer.is_error:
        print(f"< error: {answer.structured_content['error']['message']}")
        return None
    data = answer.structured_content["data"]
    print(f"< {answer.structured_content['job'] or 'all jobs'}: {json.dumps(shown(data))}")
    return data


def shown(data: Any) -> Any:
    """Return the members of an answer that a reader of this output wants to see."""
    if isinstance(data, list):
        return [shown(each) for each in data]
    names = [name for name in SHOWN if name in data] if isinstance(data, dict) else []
    return {name: data[name] for name in names} or data


async def converse() -> str:
    """Read as an assistant that may only read; then save as one that is allowed to. Return the checkpoint's path."""
    print("$ forgather-control mcp")
    async with server() as client:
        tools = {tool.name for tool in (await client.list_tools()).tools}
        print("tools:", *sorted(tools))
        (job,) = await ask(client, "list")
        await ask(client, "wait", job=job["job_id"], until="step >= 300", timeout=30)
        await ask(client, "status", job=job["job_id"])
        await ask(client, "metrics_history", job=job["job_id"], points=2)
        await ask(client, "events", job=job["job_id"], last=1)
        if "save" in tools or await ask(client, "save", job=job["job_id"]) is not None:
            raise SystemExit("a save was not refused")
    print("$ forgather-control mcp --allow save,stop --job run1")
    async with server("--allow", "save,stop", "--job", "run1") as client:
        record = await ask(client, "save", reason="the loss is low")
        await ask(client, "stop")
    return str(record["result"]["path"])


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="fg") as folder:
        os.environ["FORGATHER_JOBS_DIR"] = f"{folder}/jobs"
        job = subprocess.Popen([sys.executable, "-c", TRAINING, folder])
        try:
            while not Path(folder, "jobs", "run1", "endpoint.json").exists() and job.poll() is None:
                time.sleep(0.05)
            path = asyncio.run(converse())
            job.wait(30)
        finally:
            job.kill()
            job.wait()
        print(f"{Path(path).name} is on disk: {Path(path).is_dir()}")


if __name__ == "__main__":
    main()
