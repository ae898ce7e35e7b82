"""Limits: each is in docs/limits.md with the number of the code, has its tests, and keeps memory bounded."""

from __future__ import annotations

import ast
import json
import os
import re
import resource
import select
import socket
import ssl
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from forgather_control.errors import (
    CommandNotFound,
    InvalidParams,
    InvalidRequest,
    JobsDirUnusable,
    NotAuthenticated,
    TooManyCommands,
)
from forgather_control.jobs import limits as job_limits
from forgather_control.ranks import limits as rank_limits
from forgather_control.server import limits
from forgather_control.training import limits as training_limits
from forgather_control.training.options import ControlOptions
from forgather_control.wire import limits as wire_limits

from ..server.test_file_requests import Desk
from ..support.harness import ROOT, SOON, Process, Wire, job_process, needs, until
from .test_docs import table

pytestmark = pytest.mark.once

KIB = 1 << 10

# What docs/limits.md says...

FIRST_LINE = f"a first line of {limits.MAX_FIRST_LINE // KIB} KiB"
KEPT = f"{limits.MAX_REPLY_FILES}, {limits.MAX_REPLY_FILES_BYTES >> 20} MiB, {limits.REPLY_FILE_TIMEOUT / 3600:.0f} h"
WRONG = InvalidParams.code
STALE = f"{limits.REQUEST_FILE_TIMEOUT / 60:.0f} minutes old"
HELD = f"the commands wait for the next round, at most {rank_limits.READY_TIMEOUT:.0f} s in each later minute"
FROZEN = (
    "the rank trains on; control comes back with the store, but is off after "
    f"{rank_limits.STORE_TIMEOUT:.0f} s, where only some ranks carried a command out meanwhile, "
    "or where one undid a change that is kept"
)
#: The rows of its table: what is limited, the number in the code, what happens beyond it; and the tests of each, at the
#: limit and beyond it. Tests of this file are named without a module.
ROWS: dict[tuple[str, str, str], tuple[str, ...]] = {
    ("one line", f"{wire_limits.MAX_LINE // KIB} KiB", f"{InvalidRequest.code}, and the connection ends"): (
        "server.test_server.test_the_longest_line_and_one_more",
        "wire.test_jsonrpc.test_longest_line",
    ),
    (
        "nesting; requests in a batch",
        f"{wire_limits.MAX_DEPTH}; {wire_limits.MAX_BATCH}",
        f"{InvalidRequest.code}, and nothing of the line is carried out",
    ): (
        "test_what_is_too_deep_or_too_many_is_not_carried_out",
        "server.test_auth.test_the_limits_of_the_wire_hold_over_tcp",
    ),
    (
        "replies to a batch; to all unfinished batches",
        f"{limits.MAX_BATCH_REPLY >> 20} MiB; {limits.MAX_BATCHES_HELD >> 20} MiB",
        f"{TooManyCommands.code} for the rest of the batch",
    ): ("test_the_rest_of_a_batch_is_refused", "test_batches_that_wait_hold_little"),
    ("`command_id`", f"{wire_limits.MAX_COMMAND_ID} characters", f"{InvalidParams.code}"): (
        "test_the_longest_command_id_and_one_more",
    ),
    ("`reason`", f"{wire_limits.MAX_REASON:,} characters", f"{InvalidParams.code}"): (
        "test_the_longest_reason_and_one_more",
    ),
    ("unfinished commands of one name", f"{training_limits.MAX_PENDING}", f"{TooManyCommands.code}"): (
        "test_the_last_command_that_fits_and_one_more",
    ),
    (
        "records of commands",
        f"{training_limits.MAX_RECORDS}",
        f"the oldest final one is dropped ({CommandNotFound.code})",
    ): ("test_the_oldest_record_goes",),
    (
        "the value of a command of the script",
        f"{training_limits.MAX_VALUE // KIB} KiB of JSON",
        "the command has failed",
    ): ("training.test_outcomes.test_what_json_carries", "training.test_outcomes.test_what_json_does_not_carry"),
    (
        "such a value in `status`, `list_commands` and events",
        f"{training_limits.BRIEF_VALUE:,} characters",
        "`value_omitted` stands for it; `get_command` has it",
    ): ("training.test_outcomes.test_a_long_value_is_left_out_of_lists",),
    (
        "waiting requests; those by file",
        f"{limits.MAX_DEFERRED:,}; {limits.MAX_FILES_WAITING}",
        f"{TooManyCommands.code}",
    ): ("test_the_last_wait_that_fits_and_one_more", "server.test_file_requests.test_so_many_may_wait"),
    (
        "connections",
        f"{limits.MAX_CONNECTIONS:,}, and {limits.RESERVED_FILES} below `ulimit -n`",
        "one is closed: an unauthenticated one first, otherwise the one idle the longest",
    ): ("test_the_last_connection_that_fits_and_one_more", "server.test_server.test_beyond_the_limit_the_idlest_goes"),
    (
        "unread replies of a client",
        f"{limits.MAX_UNSENT // KIB} KiB",
        f"the server stops reading from it, and closes it after {limits.STALL_TIMEOUT:.0f} s without progress",
    ): (
        "server.test_server.test_ten_thousand_requests_before_the_first_reply_is_read",
        "server.test_server.test_a_reader_that_stands_still_is_dropped",
        "server.test_server.test_who_sends_and_never_reads_over_tcp_is_not_listened_to_and_then_dropped",
    ),
    (
        "unread events of a subscriber",
        f"{limits.MAX_STREAM_UNSENT // KIB} KiB",
        "the oldest events are lost, and counted in `lost`",
    ): (
        "server.test_connection.test_a_slow_reader_is_given_no_more_than_it_reads",
        "training.test_events.test_a_slow_subscriber_learns_how_many_it_lost",
    ),
    (
        "events kept for replay; `progress` and `metrics`",
        f"{training_limits.MAX_EVENTS:,}; {training_limits.MAX_SAMPLE_EVENTS}",
        "the oldest are dropped",
    ): (
        "training.test_events.test_a_late_subscriber_learns_how_many_it_lost",
        "training.test_events.test_samples_do_not_push_rare_events_out",
    ),
    (
        "unauthenticated TCP connections",
        f"{limits.MAX_UNAUTHENTICATED}; {limits.AUTH_TIMEOUT:.0f} s; {FIRST_LINE}",
        "closed, the oldest first",
    ): (
        "server.test_auth.test_beyond_the_limit_the_first_stranger_goes",
        "server.test_auth.test_half_a_line_and_silence_end_in_time",
        "server.test_auth.test_trickling_wins_no_time",
        "server.test_auth.test_the_longest_first_line_and_one_more",
        "wire.test_tls.test_first_lines_have_their_limit",
    ),
    (
        "wrong tokens",
        "1 for each connection",
        f"{NotAuthenticated.code} after {limits.AUTH_FAILURE_DELAY:.0f} s, and closed",
    ): ("server.test_auth.test_a_wrong_token_is_answered_late_and_nothing_behind_it_runs",),
    ("silence over TCP", f"{limits.IDLE_TIMEOUT / 3600:.0f} h", "closed"): (
        "server.test_server.test_who_is_silent_for_long_over_tcp_is_let_go",
    ),
    (
        "request files",
        f"{limits.MAX_FILES_TAKEN} every {limits.TICK_PERIOD:.0f} s; {STALE}",
        f"the others wait; {InvalidRequest.code}",
    ): (
        "server.test_file_requests.test_at_most_so_many_a_tick",
        "server.test_file_requests.test_stale_requests_are_refused",
    ),
    (
        "`replies/`",
        f"{KEPT}; each {limits.MAX_REPLY_FILE >> 20} MiB",
        f"the oldest are removed; {InvalidRequest.code} says that the request was carried out",
    ): (
        "server.test_file_requests.test_replies_are_kept_within_bounds",
        "server.test_file_requests.test_a_reply_too_long_says_so",
    ),
    (
        "logged names, also of one evaluation; characters of a value",
        f"{training_limits.MAX_NAMES}; {training_limits.MAX_TEXT}",
        "the oldest names are dropped; the rest is cut off",
    ): (
        "training.test_metrics.test_names_are_bounded",
        "integrations.test_loop.test_an_evaluation_with_many_metrics",
        "training.test_metrics.test_any_name",
    ),
    (
        "history of metrics; its names; points of one in an answer",
        f"1 MiB; {training_limits.MAX_NAMES}; {wire_limits.MAX_POINTS:,}",
        f"every second point is left out; the name that was not logged for the longest time is dropped; {WRONG}",
    ): (
        "training.test_metrics_history.test_memory_is_bounded",
        "training.test_metrics_history.test_names_are_bounded",
        "training.test_metrics_history.test_clients_ask_for_it",
    ),
    (
        "event log; last status of an ended job",
        f"{job_limits.MAX_EVENT_LOG >> 20} MiB; {job_limits.MAX_STATUS >> 20} MiB",
        "the older half is left out; it is not shown",
    ): (
        "jobs.test_event_log.test_a_log_is_bounded",
        "jobs.test_ended.test_what_others_could_have_written_is_not_shown",
    ),
    (
        "ended jobs in `.ended/`",
        f"{job_limits.MAX_ENDED}; {job_limits.ENDED_SECONDS / 86400:.0f} days",
        "the oldest are removed",
    ): ("jobs.test_ended.test_so_many_are_kept", "jobs.test_ended.test_for_so_long"),
    (
        "wait at the end of training for unfinished commands",
        f"`close_timeout`, {ControlOptions.close_timeout:.0f} s",
        "they have failed, and the error says what is unknown",
    ): (
        "integrations.test_loop.test_a_save_that_never_ends",
        "ranks.test_store_group.test_rank_0_waits_as_long_as_a_rank_lives",
        "training.test_controller.test_how_long_the_end_waits_for_other_ranks",
    ),
    (
        "training that is held so that its ranks agree",
        f"{rank_limits.READY_TIMEOUT:.0f} s a round; {3 * rank_limits.READY_TIMEOUT:.0f} s in the first minute",
        HELD,
    ): ("ranks.test_consensus.test_patience_and_pauses",),
    (
        "training that is held by a store that does not answer",
        f"{rank_limits.DECISION_TIMEOUT + rank_limits.GIVE_UP_TIMEOUT:.0f} s",
        FROZEN,
    ): (
        "ranks.test_store_group.test_a_store_that_answers_one_rank_no_more",
        "ranks.test_store_group.test_control_comes_back_with_a_store_that_was_frozen",
    ),
    (
        'rules of a job; characters of a condition; its "for N"',
        f"{training_limits.MAX_RULES}; {wire_limits.MAX_CONDITION}; {wire_limits.MAX_TIMES:,}",
        f"{TooManyCommands.code}; {WRONG}",
    ): ("training.test_rules.test_there_are_only_so_many", "wire.test_conditions.test_the_longest_condition"),
    (
        "recorded steps of a profile; their seconds",
        f"50; {training_limits.PROFILE_SECONDS:.0f} s",
        f"{WRONG}; it ends early, and says so",
    ): ("training.test_profiler.test_wrong_numbers_of_steps", "training.test_profiler.test_it_ends_in_time"),
    (
        "wait for the jobs directory when training starts, and when it ends",
        f"{training_limits.DISK_TIMEOUT:.0f} s each",
        "the job is found later; `cleanup` removes what is left of it",
    ): (
        "system.test_slow_disk.test_training_starts_and_ends_without_the_disk",
        "system.test_slow_disk.test_a_job_is_found_once_the_disk_answers",
    ),
    (
        "a list of jobs that the job itself makes (`list_jobs`)",
        f"{training_limits.LIST_TIMEOUT:.0f} s; {training_limits.LIST_SHARE * 100:.0f} % of one core",
        f"{JobsDirUnusable.code}; the next list comes later",
    ): ("system.test_slow_disk.test_clients_are_answered_while_the_disk_hangs",),
    ("processor time", f"{limits.CPU_SHARE * 100:.0f} % of one core", "answers come later"): (
        "server.test_server.test_a_flood_is_held_to_its_share",
    ),
}

#: Bounds that no client of a job reaches, and their tests.
INSIDE: dict[str, str] = {
    "cli.options._MAX_TOKEN": "cli.test_options",  # what the CLI reads of a token file
    "client.limits.MAX_EVENTS": "client.test_events",  # events that a client keeps while it waits for a reply
    "client.file_transport._MAX_REPLY": "client.test_file_transport",  # what a client reads of a reply
    "training.limits.MAX_STACKS": "training.test_rank_report",
    "training.limits.MAX_SUFFIX": "training.test_controller",
    "processes.stack_dump._MAX_DUMP": "processes.test_stack_dump",
    "processes.stack_dump._MAX_TEXT": "processes.test_stack_dump",
    "wire.addresses.MAX_PATH": "jobs.test_directory",
    "server.limits.MAX_NAMES_READ": "system.test_limits",
    "server.limits.MAX_FILES_SEEN": "system.test_limits",
    "wire.limits.MAX_TIMEOUT": "wire.test_methods",
    "wire.limits.MAX_RANK_TIMEOUT": "wire.test_methods",
    "wire.limits.MAX_REPLY_DEPTH": "wire.test_jsonrpc",  # what a client reads of a reply
    "jobs.limits.MAX_RECORD": "jobs.test_record",
    "jobs.limits.MAX_RANKS_FILE": "jobs.test_rank_processes",
    "jobs.limits.MAX_ASKED_AT_ONCE": "jobs.test_registry",
    "jobs.limits.MAX_ANSWER": "jobs.test_registry",
    "ranks.limits.MAX_RETRY_DELAY": "ranks.test_consensus",
    "ranks.limits.MAX_RESULTS": "ranks.test_group",
    "processes.stacks.MAX_TEXT": "processes.test_stacks",
    "processes.stacks._MAX_WORD": "processes.test_stacks",
    # What one call of an assistant may take; docs/assistants.md has them.
    "mcp.limits.MAX_WAIT": "mcp.test_tools",
    "mcp.limits.MAX_EVENTS": "mcp.test_tools",
    "mcp.limits.MAX_QUOTED": "mcp.test_tools",
}


def test_the_table_has_the_numbers_of_the_code():
    """Row by row, word by word: none more, none less."""
    assert table("docs/limits.md", "limit") == [list(row) for row in ROWS]


def test_every_bound_of_the_code_is_listed():
    """Each constant called MAX is in the table of limits, by its module and name in this file, or in INSIDE."""
    found = set()
    for path in (ROOT / "forgather_control").rglob("*.py"):
        module = ".".join(path.relative_to(ROOT / "forgather_control").with_suffix("").parts)
        found |= {f"{module}.{name}" for name in re.findall(r"^(_?MAX\w*): Final", path.read_text(), re.MULTILINE)}
    source = Path(__file__).read_text().partition("INSIDE: ")[0]
    modules = {"limits": "server.limits", "training_limits": "training.limits", "wire_limits": "wire.limits"}
    modules["job_limits"] = "jobs.limits"
    shown = {f"{modules[alias]}.{name}" for alias, name in re.findall(r"(\w*limits)\.(_?MAX\w+)", source)}
    assert shown <= found and found - shown == INSIDE.keys()


def test_every_limit_has_its_test():
    """The tests that the tables name exist."""
    for names in ROWS.values():
        for name in names:
            module, _, test = name.rpartition(".")
            path = ROOT / "tests" / f"{module.replace('.', '/')}.py" if module else Path(__file__)
            tree = ast.parse(path.read_text())
            assert test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, name
    for module in INSIDE.values():
        assert (ROOT / "tests" / f"{module.replace('.', '/')}.py").exists(), module


# At the limit and beside it, over a real job's socket...


def request(method: str, id: Any = 1, **params: Any) -> bytes:
    return json.dumps({"jsonrpc": "2.0", "id": id, "method": method, "params": params}).encode() + b"\n"


@pytest.fixture
def job(jobs_dir: Path) -> Iterator[Path]:
    """The socket of a job that reaches no step: whatever is accepted stays so."""
    with job_process("job", step_seconds=1000 * SOON):
        yield jobs_dir / "job" / "control.sock"


@pytest.mark.parametrize("more", [-1, 0, 1])
def test_what_is_too_deep_or_too_many_is_not_carried_out(job, more):
    """One more than may be: refused as a whole, without any effect, and the connection goes on."""
    deep = b"[" * (wire_limits.MAX_DEPTH - 2 + more) + b"]" * (wire_limits.MAX_DEPTH - 2 + more)
    nested = request("abort", command_id="deep")[:-3] + b',"x":' + deep + b"}}\n"
    batch = [json.loads(request("abort", id=n, command_id=f"c{n % 50}")) for n in range(wire_limits.MAX_BATCH + more)]
    with Wire(job) as wire:
        wire.send(nested)
        # Where it may be read, it is another error: abort has no parameter of that name.
        assert wire.reply()["error"]["code"] == (InvalidRequest.code if more > 0 else InvalidParams.code)
        wire.send(json.dumps(batch).encode() + b"\n")
        reply = wire.reply()
        if more > 0:
            assert (reply["error"]["code"], reply["error"]["data"]) == (InvalidRequest.code, {"limit": 100})
        else:
            assert [answer["result"]["state"] for answer in reply] == ["accepted"] * len(batch)
        assert len(wire.call("list_commands")["result"]) == (0 if more > 0 else 50)


@pytest.mark.parametrize("more", [-1, 0, 1])
def test_the_longest_command_id_and_one_more(job, more):
    """Characters, whatever their bytes; and nothing is queued under what is too long."""
    for letter in "xż😀":
        with Wire(job) as wire:
            reply = wire.call("save_checkpoint", {"command_id": letter * (128 + more)})
            if more > 0:
                assert reply["error"]["code"] == InvalidParams.code and wire.call("list_commands")["result"] == []
            else:
                assert reply["result"]["command_id"] == letter * (128 + more)
                wire.call("cancel_command", {"command_id": letter * (128 + more)})


@pytest.mark.parametrize("more", [-1, 0, 1])
def test_the_longest_reason_and_one_more(job, more):
    """Characters, whatever their bytes; a command with a longer reason is not queued."""
    reason = "ż" * (wire_limits.MAX_REASON + more)
    with Wire(job) as wire:
        reply = wire.call("save_checkpoint", {"reason": reason})
        if more > 0:
            assert reply["error"]["code"] == InvalidParams.code and wire.call("list_commands")["result"] == []
        else:
            assert reply["result"]["reason"] == reason


def test_the_last_command_that_fits_and_one_more(job):
    """64 of a name; the next is refused and not queued, another command is not, and one that is over makes room."""
    with Wire(job) as wire:
        for number in range(training_limits.MAX_PENDING):
            assert wire.call("save_checkpoint", {"command_id": f"{number}"})["result"]["state"] == "accepted"
        refused = wire.call("save_checkpoint", {"command_id": "one more"})["error"]
        assert (refused["code"], refused["data"]) == (TooManyCommands.code, {"limit": training_limits.MAX_PENDING})
        assert len(wire.call("list_commands")["result"]) == training_limits.MAX_PENDING
        assert wire.call("abort")["result"]["state"] == "accepted"
        wire.call("cancel_command", {"command_id": "7"})
        assert wire.call("save_checkpoint", {"command_id": "one more"})["result"]["state"] == "accepted"
        assert "error" in wire.call("save_checkpoint", {"command_id": "two more"})


def test_the_oldest_record_goes(job):
    """255, 256: all are known; 257: all but the first of those that are over."""
    with Wire(job) as wire:
        wire.call("abort", {"command_id": "open"})
        for number in range(1, training_limits.MAX_RECORDS + 1):
            wire.send(request("save_checkpoint", command_id=f"{number}"))
            wire.send(request("cancel_command", command_id=f"{number}"))
            assert [wire.reply()["result"]["state"] for _ in range(2)] == ["accepted", "cancelled"]
            if number in (training_limits.MAX_RECORDS - 2, training_limits.MAX_RECORDS - 1):
                assert len(wire.call("list_commands")["result"]) == number + 1
        known = [record["command_id"] for record in wire.call("list_commands")["result"]]
        assert known == ["open", *(f"{number}" for number in range(2, training_limits.MAX_RECORDS + 1))]
        assert wire.call("get_command", {"command_id": "1"})["error"]["code"] == CommandNotFound.code


@pytest.fixture
def quick_job(jobs_dir: Path) -> Iterator[Path]:
    """As ``job``, and it may take a whole core to answer."""
    with Process(BUSY.replace("sleep(0.01)", "sleep(1e6)")) as process:
        assert process.line() == "ready", process.errors
        yield jobs_dir / "job" / "control.sock"


def test_the_last_wait_that_fits_and_one_more(quick_job):
    """1,023 and 1,024 wait in silence; one more is told; who hangs up makes room; the owner is answered meanwhile."""
    waits = lambda count: request("save_checkpoint", id="wait", wait="finished") * count  # noqa: E731
    with Wire(quick_job) as other:
        with Wire(quick_job) as wire:
            for count in (limits.MAX_DEFERRED - 1, 1):
                wire.send(waits(count))
                assert wire.call("ping", id="next")["id"] == "next"
            wire.send(waits(1))
            refused = wire.reply()["error"]
            assert (refused["code"], refused["data"]) == (TooManyCommands.code, {"limit": limits.MAX_DEFERRED})
            assert "error" in other.call("abort", {"wait": "finished"})
            commands = other.call("list_commands")["result"]
            assert [record["command"] for record in commands] == ["save_checkpoint"], (
                "what is refused is not carried out"
            )
            assert "result" in other.call("save_checkpoint")
        until(lambda: waits_in_silence(quick_job, waits(1)))


def waits_in_silence(path: Path, wait: bytes) -> bool:
    with Wire(path) as wire:
        wire.send(wait)
        return wire.call("ping", id="next")["id"] == "next"


def batch_of_lists(last: bytes) -> bytes:
    return json.dumps([*[json.loads(request("list_commands"))] * 99, json.loads(last)]).encode() + b"\n"


def with_records(wire: Wire) -> None:
    """Have a list of commands of 100 KiB and more."""
    for number in range(training_limits.MAX_RECORDS):
        wire.send(request("save_checkpoint", command_id=f"{number:0128}"))
        wire.send(request("cancel_command", command_id=f"{number:0128}"))
        assert [wire.reply()["result"]["state"] for _ in range(2)] == ["accepted", "cancelled"]


def test_the_rest_of_a_batch_is_refused(quick_job):
    """Beyond a megabyte of replies no more is carried out, and each is told; what wants no reply is done."""
    with Wire(quick_job) as wire:
        with_records(wire)
        wire.send(batch_of_lists(request("abort")))
        reply = wire.reply()
        done = [answer for answer in reply if "result" in answer]
        assert len(reply) == 100 and limits.MAX_BATCH_REPLY < len(json.dumps(done)) < 2 * limits.MAX_BATCH_REPLY
        assert {answer["error"]["code"] for answer in reply[len(done) :]} == {TooManyCommands.code}
        assert wire.call("list_commands")["result"][-1]["command"] == "save_checkpoint"
        wire.send(batch_of_lists(b'{"jsonrpc": "2.0", "method": "abort"}'))
        assert len(wire.reply()) == 99 and wire.call("list_commands")["result"][-1]["command"] == "abort"


def test_batches_that_wait_hold_little(quick_job):
    """A reply that waits keeps a megabyte at the most; beyond 16 of those batches are refused, single requests not."""
    few = json.dumps([json.loads(request("list_commands"))] * 8 + [json.loads(request("abort", wait="finished"))])
    with Wire(quick_job) as wire, Wire(quick_job) as owner:
        with_records(owner)
        for _ in range(limits.MAX_BATCHES_HELD // limits.MAX_BATCH_REPLY * 2):
            wire.send(few.encode() + b"\n")
        assert wire.reply()[-1]["error"]["code"] == TooManyCommands.code
        assert len(owner.call("list_commands")["result"]) == training_limits.MAX_RECORDS


def test_the_last_connection_that_fits_and_one_more(jobs_dir):
    """As many as the process has files for, but 256: one more takes the place of the one silent longest."""
    most = 12
    lower = lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (limits.RESERVED_FILES + most,) * 2)  # noqa: E731
    with job_process("job", preexec_fn=lower), ExitStack() as stack:
        path = jobs_dir / "job" / "control.sock"
        wires = []
        for count in range(1, most + 1):
            wires.append(stack.enter_context(Wire(path)))
            wires[-1].still_answers()
            if count >= most - 1:  # one less than fit, and as many as fit: nobody is closed
                for wire in wires:
                    wire.still_answers()
        stack.enter_context(Wire(path)).still_answers()
        assert wires[0].is_closed()
        for wire in wires[1:]:
            wire.still_answers()


def test_what_is_no_request_hides_none(tmp_path, monkeypatch):
    """Names that ask nothing are no part of the thousand that a tick looks at, however many are left lying there."""
    monkeypatch.setattr(limits, "MAX_FILES_SEEN", 3)
    desk = Desk(tmp_path)
    for number in range(500):
        (tmp_path / "requests" / f"left-over-{number}.tmp").touch()
    for number in range(4):
        desk.ask(f"{number}.json", f"m{number}")
    for asked in (3, 4):
        desk.tick()
        assert len(desk.asked) == asked


# Memory, threads and descriptors of a real job...


#: A job that may take a whole core to answer, and looks after its files often: sooner at its bounds.
BUSY = """
import sys, time
from forgather_control import TrainingJob
from forgather_control.server import limits, limits
limits.CPU_SHARE, limits.TICK_PERIOD = 1.0, 0.05
tls = dict(zip(("certfile", "keyfile"), sys.argv[1:]))
with TrainingJob(job_id="job", max_steps=10**9, port=0, **tls) as job:
    print("ready", flush=True)
    for step in range(1, 10**9):
        time.sleep(0.01)
        job.step(step)
"""


class Facts(NamedTuple):
    """What the operating system says of a process; ``peak`` and ``now`` in MiB of resident memory."""

    peak: float
    now: float
    threads: int
    files: int

    @classmethod
    def of(cls, pid: int) -> Facts:
        status = dict(re.findall(r"^(\w+):\s+(\d+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE))
        kib = [int(status[name]) / KIB for name in ("VmHWM", "VmRSS")]
        return cls(*kib, int(status["Threads"]), len(os.listdir(f"/proc/{pid}/fd")))


class Target:
    """A busy job, its owner, and who attacks it.

    Args:
        process: the job's.
        home: its directory.
        stack: closes the attackers.
    """

    def __init__(self, process: Process, home: Path, stack: ExitStack) -> None:
        self.pid, self.home, self.stack = process.pid, home, stack
        self.record = json.loads((home / "endpoint.json").read_text())
        self.owner = stack.enter_context(Wire(home / "control.sock"))
        self.owner.still_answers()

    def connect(self, count: int, family: int = socket.AF_UNIX) -> list[socket.socket]:
        """So many new connections."""
        socks = [self.stack.enter_context(socket.socket(family)) for _ in range(count)]
        for sock in socks:
            sock.connect(("127.0.0.1", self.record["port"]) if family == socket.AF_INET else self.record["socket"])
            sock.setblocking(False)
        return socks

    def stuff(self, socks: list[socket.socket], data: bytes, rounds: int = 3) -> int:
        """Send to all what they take, until nobody takes any more; how many bytes they took.

        Args:
            rounds: so many lines of each are answered before they are tried again, as the owner has one a round.
        """
        left = dict.fromkeys(socks, memoryview(data))
        while True:
            before = sum(map(len, left.values()))
            for _ in range(rounds):
                self.owner.still_answers()
            for sock, rest in left.items():
                try:
                    left[sock] = rest[sock.send(rest) :] if rest else rest
                except (BlockingIOError, BrokenPipeError, ConnectionResetError):
                    pass
            if sum(map(len, left.values())) == before:
                return len(data) * len(socks) - before


def idle(target: Target) -> None:
    """1,000 that say nothing."""
    before = Facts.of(target.pid).files
    target.connect(1000)
    until(lambda: Facts.of(target.pid).files == before + 1000)


def half_lines(target: Target) -> None:
    """100 that send a line of 64 KiB but its end."""
    target.stuff(target.connect(100), b" " * wire_limits.MAX_LINE)


def deaf(target: Target) -> None:
    """100 that send 10,000 requests and read no reply."""
    lines = request("rpc.discover") * 10_000
    taken = target.stuff(target.connect(100), lines, rounds=100)
    assert taken < 100 * len(lines) / 2, "they are no longer listened to"


def pipeline(target: Target) -> None:
    """10,000 requests of one that reads no reply before it has to."""
    (sock,) = target.connect(1)
    left, lines = memoryview(request("ping") * 10_000), 0
    while lines < 10_000:
        readable, writable, _ = select.select([sock], [sock] if left else [], [], SOON)
        if writable:
            left = left[sock.send(left) :]
        elif readable:
            lines += sock.recv(65536).count(b"\n")


def waits(target: Target) -> None:
    """10,000 that wait for what will not come: 1,024 do, the others are told."""
    (sock,) = target.connect(1)
    sock.settimeout(SOON)
    lines = b"".join(request("save_checkpoint", n, wait="finished", command_id=f"{n % 60}") for n in range(100))
    waiting = 10_000
    with Wire(sock) as wire:
        for _ in range(100):
            wire.send(lines + request("ping", "next"))
            while (reply := wire.reply())["id"] != "next":
                assert reply["error"]["code"] == TooManyCommands.code
                waiting -= 1
    assert waiting == limits.MAX_DEFERRED


def letters(target: Target, count: int = limits.MAX_FILES_SEEN + 100) -> None:
    """More requests by file than are looked at at once; ten thousand are in test_files."""
    box = target.home / "requests"
    for number in range(count):
        (box / f".{number}").write_bytes(request("rpc.discover"))
    for number in range(count):
        (box / f".{number}").rename(box / f"{number}.json")
    until(lambda: len(os.listdir(target.home / "replies")) >= 2 * limits.MAX_FILES_TAKEN)


def strangers(target: Target) -> None:
    """200 over TCP that say the first half of a TLS handshake, and never the second."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    hello = ssl.MemoryBIO()
    with pytest.raises(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), hello).do_handshake()
    before, first = Facts.of(target.pid).files, hello.read()
    for sock in target.connect(200, socket.AF_INET):
        sock.send(first)
    until(lambda: Facts.of(target.pid).files == before + limits.MAX_UNAUTHENTICATED)
    target.owner.still_answers()


def bombs(target: Target) -> None:
    """20 with batches too large, nesting too deep, and lines that are all names, numbers or strings."""
    shapes = (b"[", b"1,", b'{"a":', b'"a",', b"1", b"{},", b'[{"a":0,"b":[]},"\\u017c",')
    lines = b"".join(b"[" + shape * ((wire_limits.MAX_LINE - 1) // len(shape)) + b"\n" for shape in shapes)
    assert target.stuff(target.connect(20), lines) == 20 * len(lines)


@needs("openssl")
@pytest.mark.parametrize(
    ("attack", "most"),
    [(idle, 5), (half_lines, 20), (deaf, 64), (pipeline, 5), (waits, 10), (letters, 10), (strangers, 20), (bombs, 20)],
    ids=lambda value: getattr(value, "__name__", f"{value} MiB"),
)
def test_memory_is_bounded(jobs_dir: Path, pem: Any, attack: Callable[[Target], None], most: int) -> None:
    """So many MiB more at the most, no thread more, training goes on; and every descriptor comes back."""
    with Process(BUSY, *((pem.cert, pem.key) if attack is strangers else ())) as process, ExitStack() as all_others:
        assert process.line() == "ready", process.errors
        with Wire(jobs_dir / "job" / "control.sock") as owner:
            owner.still_answers()
            before = Facts.of(process.pid)
            with all_others:
                attack(Target(process, jobs_dir / "job", all_others))
                owner.still_answers()
                during = Facts.of(process.pid)
            until(lambda: Facts.of(process.pid).files == before.files)
            step = owner.call("status")["result"]["global_step"]
            until(lambda: owner.call("status")["result"]["global_step"] > step)
            after = Facts.of(process.pid)
        print(f"\n{attack.__name__}: {before.now:.1f} MiB before,", end=" ")
        print(f"{during.peak - before.now:+.1f} at the peak, {after.now - before.now:+.1f} after;", end=" ")
        print(f"descriptors {before.files}, {during.files}, {after.files};", end=" ")
        print(f"threads {before.threads}, {during.threads}, {after.threads}")
        assert (during.threads, after.threads) == (before.threads, before.threads)
        assert during.peak - before.now < most
