"""A process that prints how much it grows by a server: ``python grow.py torch|bare ours|minimal|http DIRECTORY``.

Bytes by the import; bytes, threads and descriptors by import and start together. It imports as little as it can
before, as what it had imported would not count.
"""

import os
import sys


def size() -> tuple[int, int, int]:
    """Return resident bytes, threads and open descriptors."""
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))


def load(server: str) -> None:
    """Import it."""
    if server == "ours":
        from forgather_control import TrainingJob

        TrainingJob("grow")
    elif server == "http":
        import asyncio

        from aiohttp import web

        assert asyncio and web
    else:
        import others

        assert others


def start(server: str, directory: str) -> object:
    """Start it; it serves as long as the returned object lives."""
    if server == "ours":
        from forgather_control import TrainingJob

        job = TrainingJob("grow", max_steps=1000)
        job.__enter__()
        job.log(loss=1.0)
        job.step(1)
        return job
    import others

    return others.SERVERS[server](directory, {"job_id": "grow", "loss": 1.0})


def main() -> None:
    kind, server, directory = sys.argv[1:]
    if kind == "torch":
        import torch

        layer = torch.nn.Linear(64, 64)
        for _ in range(3):
            layer(torch.randn(8, 64)).sum().backward()
    before = size()
    load(server)
    loaded = size()
    served = start(server, directory)
    print(loaded[0] - before[0], *(now - then for now, then in zip(size(), before)), flush=True)
    assert served
    os._exit(0)  # the threads of others have no end


if __name__ == "__main__":
    main()
