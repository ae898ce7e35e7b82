"""The verb ``list``: the jobs of this host or of another one, or those that have ended."""

import argparse
from collections.abc import Callable
from typing import Any

from ..client import target
from ..client.connection import Client
from ..client.limits import CALL_TIMEOUT, LIST_TIMEOUT
from ..errors import InternalError
from ..jobs import ended, registry
from ..jobs.record import jobs_dir
from . import job_table, terminal
from .exit_codes import DONE
from .terminal import complain, print_answer


def run(args: argparse.Namespace) -> int:
    """Run the verb; return its exit code."""
    complaints = _ended(args) if args.ended else _jobs(args)
    for line in complaints:
        complain(line)
    return DONE


def _jobs(args: argparse.Namespace) -> list[str]:
    """Print the jobs; return what there is to complain about."""
    complaints: list[str] = []
    if args.ssh is None and args.remote is None:
        root = jobs_dir()
        (found, left_out), place = registry.discover(root, LIST_TIMEOUT), f"in {root}"
        complaints = [f"left out {name}: {why}" for name, why in left_out.items()]
        sent: dict[int, Any] = {}
    else:
        rows, complaints = _from_ssh(args.ssh) if args.ssh is not None else (_from_port(args), [])
        found, place = [registry.Job.from_json(row) for row in rows], f"on {args.ssh}" if args.ssh else ""
        sent = {id(job): row for job, row in zip(found, rows)}
    found = job_table.ordered(found, args.sort)
    told = [sent.get(id(job)) or job.to_json() for job in found] if args.json else []
    table = job_table.job_table, found, terminal.has_colour(), place, terminal.width()
    _print(args, [job.job_id for job in found], told, *table)
    return complaints


def _from_port(args: argparse.Namespace) -> list[Any]:
    with Client(target.resolve(at=args.remote, token=args.token)) as job:
        return _rows(job.call("list_jobs"))


def _from_ssh(host: str, *words: str) -> tuple[list[Any], list[str]]:
    from ..client import ssh

    rows, complaints = ssh.list_jobs(host, CALL_TIMEOUT, *words)
    return _rows(rows), complaints


def _rows(rows: Any) -> list[Any]:
    if not isinstance(rows, list):
        raise InternalError("the other side sent no list of jobs")
    return rows


def _ended(args: argparse.Namespace) -> list[str]:
    """Print the jobs that have ended; return what there is to complain about."""
    complaints: list[str] = []
    if args.ssh is None:
        root = jobs_dir()
        found, place = ended.scan(root), f"in {root}"
    else:
        rows, complaints = _from_ssh(args.ssh, "--ended")
        found, place = [ended.EndedJob.from_json(row) for row in rows], f"on {args.ssh}"
    ids, told = list(dict.fromkeys(job.job_id for job in found)), [job.to_json() for job in found]
    _print(args, ids, told, job_table.ended_table, found, place, terminal.width())
    return complaints


def _print(args: argparse.Namespace, ids: list[str], told: list[Any], show: Callable[..., str], *table: Any) -> None:
    if not args.quiet:
        print_answer(args.json, told, show, *table)
    elif args.json or ids:
        print_answer(args.json, ids, "\n".join, ids)
