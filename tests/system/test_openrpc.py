"""A client that @open-rpc/generator makes of ``rpc.discover``: the document is valid, and the client compiles.

Only in ``tox -e openrpc``: npm fetches the generator and the compiler.
"""

from __future__ import annotations

import json
import subprocess

import pytest

from ..support.harness import needs, running_loop

pytestmark = [pytest.mark.openrpc, needs("npm"), pytest.mark.timeout(600)]

INSTALL = ("npm", "install", "--no-audit", "--no-fund", "--fetch-retries=1")
GENERATOR, TYPESCRIPT = "@open-rpc/generator@1.22.3", "typescript@5.9.3"

VALIDATE = """
const {validateOpenRPCDocument} = require("@open-rpc/schema-utils-js");
const result = validateOpenRPCDocument(JSON.parse(require("fs").readFileSync("openrpc.json")));
if (result !== true) throw result;
"""
#: What a developer writes with the client; each line after @ts-expect-error must not compile.
PROGRAM = """
import { ForgatherControl, JobStatus } from "./index";

export async function use(job: ForgatherControl): Promise<string | null> {
  const record = await job.save_checkpoint("finished", 60, null, null, "before the night", true);
  // @ts-expect-error: the state is one of five words
  if (record.state === "done") return null;
  // @ts-expect-error: wait is one of three words
  await job.abort("now");
  // @ts-expect-error: a timeout is a number
  await job.ranks("5");
  const status: JobStatus = await job.status();
  const step: number = status.global_step;
  const events = await job.subscribe(0, ["checkpoint", "ended"]);
  const by = record.requested_by;
  return record.state === "finished" && step > events.next && by !== null ? by.user : status.commands[0].command_id;
}
"""


def run(folder, *words):
    """Run a program; the test fails with its output where the program fails."""
    done = subprocess.run(words, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout[-5000:]


@pytest.fixture(scope="module")
def tools(tmp_path_factory):
    """The generator and the compiler, installed."""
    folder = tmp_path_factory.mktemp("tools")
    run(folder, *INSTALL, "--prefix", ".", GENERATOR, TYPESCRIPT)
    return folder / "node_modules" / ".bin"


def test_a_generated_client_compiles(tools, tmp_path):
    """The document of a live job fits the meta schema; its client, and a program with it, are well typed."""
    from forgather_control import connect

    with running_loop(), connect("job") as job:
        (tmp_path / "openrpc.json").write_text(json.dumps(job.call("rpc.discover")))
    words = ("-d", "openrpc.json", "-o", ".", "-t", "client", "-l", "typescript", "-n", "forgather")
    run(tmp_path, tools / "open-rpc-generator", "generate", *words)
    client = tmp_path / "client" / "typescript"
    run(client, *INSTALL, "--omit=dev")
    (client / "openrpc.json").write_text((tmp_path / "openrpc.json").read_text())
    run(client, "node", "-e", VALIDATE)
    (client / "src" / "use.ts").write_text(PROGRAM)
    run(client, tools / "tsc", "--noEmit", "-p", ".")
