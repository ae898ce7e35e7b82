"""One job on two hosts: two network namespaces joined by a virtual cable, each with its own host name.

Both share the file system, as the login and compute nodes of a cluster do. They also share the kernel, so that each
reaches the Unix socket, and sees the lock that proves that the job lives.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from forgather_control import list_jobs

from ..support.harness import ROOT, SOON, needs, needs_root, needs_success, needs_torch, until
from ..support.torchrun import ENVIRONMENT, Torchrun

needs_namespaces = needs_success(
    "network namespaces cannot be made here",
    f"ip netns add fgtry{os.getpid()} && ip netns delete fgtry{os.getpid()} && unshare --net ip link add type veth",
)
pytestmark = [needs_torch, needs_root, needs("ip"), needs("unshare"), needs_namespaces]

#: A port in the namespaces, where nothing else listens.
PORT = 29400

TRAINING = """
import os, pathlib, socket, sys, time
import torch.distributed as dist
from forgather_control import TrainingJob

dist.init_process_group("gloo")
rank = dist.get_rank()
for name in ("first", "second"):
    folder = pathlib.Path(sys.argv[1]) / name
    folder.mkdir(exist_ok=True)
    with TrainingJob(name, max_steps=1_000_000) as job:
        for step in range(1, 1_000_001):
            time.sleep(0.002 * (rank + 1))
            while rank == 1 and (folder.parent / "hang").exists():
                time.sleep(0.01)
            dist.barrier()
            if rank == 1:
                job.log(loss=1 / step)
            job.step(step)
            if job.should_save:
                path = folder / f"checkpoint-{step}"
                path.mkdir(exist_ok=True)
                time.sleep(0.05 * rank)
                (path / f"{socket.gethostname()}-{rank}").touch()
                job.saved(path)
            if job.should_stop:
                break
        (folder / f"ended-{rank}").write_text(str(step))
dist.destroy_process_group()
"""


class Host(NamedTuple):
    """One of the two hosts."""

    name: str
    namespace: str
    interface: str
    address: str

    @property
    def words(self) -> tuple[str, ...]:
        """The words before a command that make it run there."""
        inside = 'echo "$0" >/proc/sys/kernel/hostname && exec "$@"'
        return ("ip", "netns", "exec", self.namespace, "unshare", "--uts", "sh", "-c", inside, self.name)

    def torchrun(self, node: int, *words: str) -> Torchrun:
        """Start its half of the job; rank 0 is on node 0."""
        options = ("--nnodes=2", f"--node-rank={node}", f"--master-addr={HOSTS[0].address}", f"--master-port={PORT}")
        interface = ("env", f"GLOO_SOCKET_IFNAME={self.interface}")
        return Torchrun(*words, options=options, before=(*self.words, *interface))

    def control(self, *words: str) -> Any:
        """Return what a verb prints there as JSON; fail the test where the verb fails."""
        done = subprocess.run(
            [*self.words, sys.executable, "-m", "forgather_control", *words, "--json"],
            cwd=ROOT,
            env={**os.environ, **ENVIRONMENT},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=3 * SOON,
        )
        assert done.returncode == 0, (words, done.returncode, done.stderr)
        return json.loads(done.stdout)


HOSTS = tuple(
    Host(f"host-{letter}", f"fg{os.getpid()}{letter}", f"fg{letter}", f"10.199.77.{number}")
    for number, letter in enumerate("ab", 1)
)


def ip(*words: str) -> None:
    """Run ``ip`` with these words."""
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=SOON)


@pytest.fixture
def hosts() -> Iterator[tuple[Host, ...]]:
    """Two hosts and the cable between them."""
    one, other = HOSTS
    try:
        for host in HOSTS:
            ip("netns", "add", host.namespace)
        ip("link", "add", one.interface, "netns", one.namespace, "type", "veth",
           "peer", "name", other.interface, "netns", other.namespace)  # fmt: skip
        for host in HOSTS:
            ip("-n", host.namespace, "address", "add", f"{host.address}/24", "dev", host.interface)
            for interface in (host.interface, "lo"):
                ip("-n", host.namespace, "link", "set", interface, "up")
        yield HOSTS
    finally:
        for host in HOSTS:  # the cable goes with its ends
            subprocess.run(["ip", "netns", "delete", host.namespace], capture_output=True, timeout=SOON)


@contextmanager
def training(folder: Path) -> Iterator[tuple[Torchrun, Torchrun]]:
    """Run two jobs, one after the other, with a rank on each host."""
    script = folder / "training.py"
    script.write_text(TRAINING)
    with (
        HOSTS[0].torchrun(0, str(script), str(folder)) as here,
        HOSTS[1].torchrun(1, str(script), str(folder)) as there,
    ):
        yield here, there


def trains(job: str) -> bool:
    """Return whether the job can be found, and has made a step."""
    return any(found.job_id == job and found.global_step for found in list_jobs())


def stop(host: Host, folder: Path) -> None:
    """Stop the job from this host; both ranks end at the same step."""
    stopped = host.control("stop", "--timeout=60")
    ends = [folder / f"ended-{rank}" for rank in range(2)]
    until(lambda: all(end.exists() for end in ends))
    assert {end.read_text() for end in ends} == {str(stopped["applied_at_step"])}


def main_thread(row: dict[str, Any]) -> str:
    """Return the main thread's stack out of one rank's stacks."""
    (found,) = (stack for stack in row["stacks"].split("\n\n") if "MainThread" in stack)
    return str(found)


def test_one_job_is_controlled_from_both_of_its_hosts(tmp_path, hosts):
    """list, status, ranks, stacks, save and stop do the same from the host of rank 0 as from the other."""
    with training(tmp_path) as halves:
        halves[0].until(lambda: trains("first"))
        for host in hosts:
            (found,) = host.control("list")
            assert (found["job_id"], found["state"], found["host"]) == ("first", "live", "host-a")
            status = host.control("status")
            assert (status["world_size"], status["host"], status["status"]) == (2, "host-a", "training")
            saved = host.control("save", "--timeout=60")
            # Including the part that the other host took longer to write.
            parts = {part.name for part in Path(saved["result"]["path"]).iterdir()}
            assert saved["state"] == "finished" and parts == {"host-a-0", "host-b-1"}
            ranks = host.control("ranks")
            assert [(row["rank"], row["host"], row["state"]) for row in ranks] == [
                (0, "host-a", "answering"),
                (1, "host-b", "answering"),
            ]
            assert all(row["step"] >= saved["applied_at_step"] for row in ranks)
        (tmp_path / "hang").touch()
        for host in hosts:
            halves[0].until(lambda host=host: "in barrier" in main_thread(host.control("stacks")[0]))
            assert "time.sleep(0.01)" in main_thread(host.control("stacks")[1])
        (tmp_path / "hang").unlink()
        stop(hosts[1], tmp_path / "first")
        halves[0].until(lambda: trains("second"))
        os.kill(found["pid"], signal.SIGSTOP)  # while it does not answer, its lock proves that it lives
        try:
            assert [host.control("list")[0]["state"] for host in hosts] == ["silent", "silent"]
        finally:
            os.kill(found["pid"], signal.SIGCONT)
        stop(hosts[0], tmp_path / "second")
        assert all(half.end() == 0 for half in halves)
        assert hosts[0].control("list") == hosts[1].control("list") == []
