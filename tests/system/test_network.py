"""A job on another host: in a network namespace at the other end of a virtual cable.

The client's host has its own jobs directory, so that it knows only the address and the token of the job.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ..support.harness import ROOT, SOON, needs, needs_root, until
from .test_two_hosts import HOSTS, Host, hosts, needs_namespaces

__all__ = ["hosts"]  # a fixture

pytestmark = [pytest.mark.once, needs_root, needs("ip"), needs("unshare"), needs("openssl"), needs_namespaces]

#: The job; its certificate is for 127.0.0.1, so that a client can trust it only by its fingerprint.
JOB = """
import logging, sys, time
from forgather_control import TrainingJob

logging.basicConfig(format="%(levelname)s %(message)s")
files = dict(zip(("certfile", "keyfile"), sys.argv[2:]))
with TrainingJob("far", max_steps=100_000, port="auto", host=sys.argv[1], **files) as job:
    print("ready", flush=True)
    for step in range(1, 100_001):
        time.sleep(0.01)
        job.step(step)
        if job.should_stop:
            break
print("ended", job.aborted, flush=True)
"""

#: What a web page can make a browser send to the port: a POST with a text of the page, without a preflight request.
BROWSER = """
import sys, urllib.request
body = b'{"jsonrpc":"2.0","id":1,"method":"abort"}\\n' * 100
request = urllib.request.Request(sys.argv[1], body, {"Content-Type": "text/plain", "Origin": "http://evil.example"})
try:
    print(urllib.request.urlopen(request, timeout=20).read())
except OSError as err:
    print(type(err).__name__)
"""


def there(host: Host, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run Python with these words on a host."""
    return subprocess.run(
        [*host.words, sys.executable, *words],
        cwd=ROOT,
        env={**os.environ, **env},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=3 * SOON,
    )


@contextmanager
def job(jobs_dir: Path, address: str, *files: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """Run the job on the first host; yields it and its record, and kills it on exit if it still runs."""
    words = [*HOSTS[0].words, sys.executable, "-u", "-c", JOB, address, *files]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(words, cwd=ROOT, text=True, **pipes) as process:  # type: ignore[call-overload]
        try:
            assert process.stdout.readline() == "ready\n"
            yield process, json.loads((jobs_dir / "far" / "endpoint.json").read_text())
        finally:
            process.kill()


@pytest.mark.parametrize("address", [HOSTS[0].address, "0.0.0.0"])
def test_a_client_with_the_token_controls_it_and_others_do_nothing(hosts, jobs_dir, tmp_path, address):
    """status, list and stop work; a wrong token, none, and a browser's POST do not; the job logs one warning."""
    with job(jobs_dir, address) as (process, known):
        at = f"tcp://{HOSTS[0].address}:{known['port']}"
        mine = {"FORGATHER_JOBS_DIR": str(tmp_path / "mine")}

        def control(*words: str, token: str = "") -> subprocess.CompletedProcess[str]:
            return there(HOSTS[1], "-m", "forgather_control", *words, **mine, FORGATHER_CONTROL_TOKEN=token)

        assert known["port"] >= 8900
        for token, code in (("", 2), ("guess", 1), (known["token"][:-1], 1)):
            refused = control("abort", "--force", "--connect", at, token=token)
            assert (refused.returncode, refused.stdout) == (code, "") and known["token"] not in refused.stderr
        posted = there(HOSTS[1], "-c", BROWSER, at.replace("tcp", "http"))
        assert posted.returncode == 0 and posted.stdout.strip() in (
            "RemoteDisconnected",
            "ConnectionResetError",
            "URLError",
        )
        status = control("status", "--json", "--connect", at, token=known["token"])
        assert json.loads(status.stdout)["status"] == "training" and not json.loads(status.stdout)["commands"]
        listed = control("list", "--json", "--remote", at.removeprefix("tcp://"), token=known["token"])
        assert [row["job_id"] for row in json.loads(listed.stdout)] == ["far"] and known["token"] not in listed.stdout
        stopped = control("stop", "--timeout=60", "--connect", at, token=known["token"])
        assert stopped.returncode == 0, stopped.stderr
        said, complained = process.communicate(timeout=SOON)
        assert said == "ended False\n" and complained.count("WARNING") == 2, complained
        assert "open to the network without TLS" in complained and "did not send the job's token" in complained


def test_a_port_of_loopback_cannot_be_reached_from_outside(hosts, jobs_dir, tmp_path):
    """Not even by a client with the token."""
    with job(jobs_dir, "127.0.0.1") as (_process, known):
        at = f"tcp://{HOSTS[0].address}:{known['port']}"
        done = there(HOSTS[1], "-m", "forgather_control", "status", "--connect", at, FORGATHER_CONTROL_TOKEN="any")
        assert done.returncode == 4 and "Nothing listens" in done.stderr


def test_over_tls_it_is_known_by_its_fingerprint(hosts, jobs_dir, tmp_path, pem):
    """By a copy of its endpoint.json; no token is sent to an untrusted certificate, nor over plain TCP."""
    with job(jobs_dir, HOSTS[0].address, pem.cert, pem.key) as (process, known):
        at = f"tls://{HOSTS[0].address}:{known['port']}"
        mine = {"FORGATHER_JOBS_DIR": str(tmp_path / "mine"), "FORGATHER_CONTROL_TOKEN": known["token"]}
        unknown = there(HOSTS[1], "-m", "forgather_control", "status", "--connect", at, **mine)
        assert unknown.returncode == 1 and "is not trusted" in unknown.stderr
        plain = there(HOSTS[1], "-m", "forgather_control", "status", "--connect", at.replace("tls", "tcp"), **mine)
        assert plain.returncode == 1 and "This port speaks TLS" in plain.stderr
        (tmp_path / "mine" / "far").mkdir(parents=True)
        copy = tmp_path / "mine" / "far" / "endpoint.json"
        other = {**known, "tls_sha256": "0" * 64}
        for record, code in ((other, 1), (known, 0)):
            copy.write_text(json.dumps({**record, "socket": None}))
            for words in (("far",), ("--connect", at)):
                done = there(HOSTS[1], "-m", "forgather_control", "status", "--json", *words, **mine)
                assert done.returncode == code, (words, done)
                assert code == 0 or "is not the job's" in done.stderr
        stopped = there(HOSTS[1], "-m", "forgather_control", "stop", "--timeout=60", "far", **mine)
        assert stopped.returncode == 0, stopped.stderr
        until(lambda: process.poll() is not None)
        assert process.stdout.read() == "ended False\n" and "WARNING" not in process.stderr.read()
