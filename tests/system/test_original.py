"""Every fault that was found in Forgather's own trainer control, as a test of this package.

``FAULTS`` lists them in the order in which they were found, each with the tests that would fail if this package had
it, too. Short tests are in this file; the others are with the module that they test.
"""

from __future__ import annotations

import ast
import functools
import json
import logging

import psutil
import pytest

import forgather_control
from forgather_control import TrainingJob, errors
from forgather_control.client.target import find
from forgather_control.jobs.record import read_record
from forgather_control.processes import liveness

from ..support.harness import ROOT, SOON, Process, Wire, cli, running_loop, until

HERE = "tests/system/test_original.py"

#: Number: what the original does, and the tests that prove that this package does not.
FAULTS: dict[int, tuple[str, tuple[str, ...]]] = {
    1: (
        "cleanup deletes directories outside its own, wherever a record's job_id points",
        (
            f"{HERE}::test_cleanup_goes_by_names_that_agree",
            "tests/jobs/test_cleanup.py::test_only_a_job_directory_is_removed",
            "tests/system/test_another_user.py::test_root_cleans_up_nothing_else",
        ),
    ),
    2: (
        "an empty job_id wipes the whole jobs directory, live jobs included",
        (f"{HERE}::test_cleanup_goes_by_names_that_agree",),
    ),
    3: (
        "cleanup removes live jobs of other hosts on a shared home",
        (
            "tests/jobs/test_cleanup.py::test_what_this_host_cannot_see_is_not_removed",
            "tests/processes/test_liveness.py::test_the_order_of_evidence",
        ),
    ),
    4: (
        "it binds 0.0.0.0 without authentication",
        (
            "tests/server/test_tcp.py::test_a_job_without_a_port_has_none",
            "tests/server/test_auth.py::test_a_first_line_that_is_no_authenticate_ends_the_connection",
            "tests/system/test_network.py::test_a_port_of_loopback_cannot_be_reached_from_outside",
        ),
    ),
    5: (
        "a web page can control it with a POST of text/plain",
        (
            "tests/server/test_auth.py::test_a_first_line_that_is_no_authenticate_ends_the_connection",
            "tests/system/test_network.py::test_a_client_with_the_token_controls_it_and_others_do_nothing",
        ),
    ),
    6: (
        "the client reads any endpoint.json if the job id is a path",
        (f"{HERE}::test_a_path_is_no_job", "tests/client/test_target.py::test_a_name_that_fits_nothing_is_no_such_job"),
    ),
    7: (
        "endpoint.json is 0644, its directory 0755, and it is written in place",
        (
            "tests/jobs/test_directory.py::test_everything_is_private_from_the_first_moment",
            "tests/jobs/test_record.py::test_a_record_is_never_seen_half_written",
        ),
    ),
    8: (
        "request files are documented, written, called a success, but never read; dependencies are not declared",
        (
            "tests/server/test_file_requests.py::test_touch_from_a_shell",
            "tests/client/test_file_transport.py::test_calls_commands_and_errors",
            "tests/client/test_file_transport.py::test_what_nobody_takes_is_taken_back",
            "tests/system/test_layout.py::test_nothing_third_party_at_module_level",
            "tests/system/test_layout.py::test_third_party_inside_functions",
        ),
    ),
    9: (
        "the exit code is always 0",
        (
            "tests/cli/test_main.py::test_exit_codes_without_any_job",
            "tests/cli/test_main.py::test_exit_codes_with_jobs_that_resist",
            "tests/cli/test_main.py::test_a_command_that_fails_is_exit_code_one",
        ),
    ),
    10: (
        "success means queued; there is no id, no way to wait, no path",
        (
            "tests/client/test_api.py::test_every_wait_returns_at_its_own_moment",
            "tests/client/test_api.py::test_the_same_id_twice_is_the_same_command",
            "tests/cli/test_main.py::test_waiting_verbs_say_what_happened_and_where",
        ),
    ),
    11: (
        "commands that arrive at the last log, or after it, are lost",
        (
            f"{HERE}::test_what_comes_after_the_last_step_is_told_so",
            "tests/training/test_controller.py::test_requests_in_the_last_moment_are_answered",
            "tests/integrations/test_huggingface.py::test_a_command_too_late_is_answered",
            "tests/training/test_command_queue.py::test_race_of_submit_and_close",
        ),
    ),
    12: (
        "status always says running, and logged names overwrite its own members",
        (
            "tests/integrations/test_huggingface.py::test_status_words",
            "tests/integrations/test_huggingface.py::test_logged_names_do_not_overwrite",
            "tests/training/test_controller.py::test_logged_names_never_overwrite_ours",
            "tests/training/test_progress.py::test_a_job_that_hangs",
        ),
    ),
    13: (
        "a NaN breaks strict parsers, and a tensor among the metrics breaks every status",
        (
            "tests/training/test_controller.py::test_logged_names_never_overwrite_ours",
            "tests/training/test_metrics.py::test_tensor_values",
            "tests/training/test_metrics.py::test_value_that_fails",
            "tests/integrations/test_huggingface.py::test_a_loss_that_is_not_a_number",
        ),
    ),
    14: (
        "a reused pid makes a dead job look alive",
        (f"{HERE}::test_any_living_pid_is_not_enough", "tests/jobs/test_registry.py::test_a_reused_pid_reads_dead"),
    ),
    15: (
        "one bad file breaks the whole list",
        (
            "tests/jobs/test_registry.py::test_one_bad_record_does_not_hide_the_others",
            "tests/cli/test_main.py::test_the_list_says_every_state_in_words",
        ),
    ),
    16: (
        "a malformed request gets Python's own message, a query is queued as a command, parameters are dropped",
        (
            f"{HERE}::test_what_is_no_command_is_none",
            "tests/training/test_job_queries.py::test_no_word_of_a_fault_goes_over_the_wire",
            "tests/wire/test_methods.py::test_unknown_parameter_is_refused",
        ),
    ),
    17: (
        "the host name is the address, so that a name that cannot be resolved breaks even local control",
        (f"{HERE}::test_a_host_name_that_leads_nowhere", "tests/server/test_tcp.py::test_the_address_is_a_number"),
    ),
    18: (
        "a port is bound, closed and bound again; a failed server is one log line; a sleep is used instead of a wait",
        (
            f"{HERE}::test_a_port_that_is_published_is_open",
            "tests/server/test_listener.py::test_two_at_once_get_two_ports",
            "tests/server/test_tcp.py::test_a_taken_port_is_one_warning_and_the_job_is_controlled_by_its_socket",
        ),
    ),
    19: (
        "the documentation is wrong: control of any rank, a file that does not exist, a stop that saves",
        (
            # Our documentation is run, or compared with the code. It does not say that a stop saves if save_strategy
            # is "no", and it does say that a signal to any rank reaches all.
            "tests/system/test_docs.py::test_shell_blocks",
            "tests/system/test_docs.py::test_the_names_that_are_shown_exist",
            "tests/system/test_docs.py::test_the_table_of_verbs",
            "tests/ranks/test_store_group.py::test_any_rank_may_call",
            "tests/integrations/test_huggingface.py::test_graceful_stop_saves_as_the_strategy_says",
        ),
    ),
    20: (
        "one log call on rank 0 alone deadlocks all ranks",
        # In its plans, each rank in turn logs alone.
        (
            "tests/system/test_torchrun.py::test_all_ranks_apply_the_same_commands_at_the_same_steps",
            "tests/training/test_metrics.py::test_distributed_tensor_costs_no_collective",
        ),
    ),
    21: (
        "two broadcasts and a read from the device at every log, even without a client",
        (
            "tests/ranks/test_store_group.py::test_an_idle_step_holds_no_rank",
            "tests/training/test_metrics.py::test_reading_is_left_to_the_asker",
            "tests/integrations/test_lightning.py::test_nothing_is_read_from_the_device",
        ),
    ),
    22: (
        "commands are only received at a log, not during an evaluation; an abort waits for the next log",
        (
            f"{HERE}::test_a_loop_that_never_logs_obeys_at_its_next_step",
            "tests/integrations/test_huggingface.py::test_commands_are_accepted_at_any_time",
            "tests/integrations/test_lightning.py::test_commands_are_accepted_at_any_time",
        ),
    ),
    23: (
        "an asyncio.Queue is shared between threads, which it does not support",
        (
            "tests/training/test_command_queue.py::test_race",
            "tests/training/test_command_queue.py::test_race_for_one_id",
            "tests/training/test_command_queue.py::test_race_of_submit_and_close",
        ),
    ),
    24: (
        "the queue has no bound, equal commands are not merged, and all run at one log",
        (
            "tests/training/test_command_queue.py::test_bound_of_unfinished_commands",
            "tests/training/test_command_queue.py::test_equal_pending_commands_share_a_record",
            "tests/training/test_controller.py::test_one_save_finishes_all_that_wait_for_it",
        ),
    ),
    25: (
        "an abort still loads the best model",
        (
            "tests/integrations/test_huggingface.py::test_abort_leaves_the_disk_as_it_is",
            "tests/integrations/test_huggingface.py::test_forgather_aborts",
        ),
    ),
    26: (
        "flags are never reset, so that a second train() stops after one step",
        (
            "tests/integrations/test_huggingface.py::test_train_can_be_called_twice",
            "tests/integrations/test_huggingface.py::test_forgather_trains_twice",
            "tests/integrations/test_lightning.py::test_fit_can_be_called_twice",
        ),
    ),
    27: (
        "with Hugging Face, abort is a stop, and a hook is missing",
        (
            "tests/integrations/test_huggingface.py::test_abort_leaves_the_disk_as_it_is",
            "tests/integrations/test_huggingface.py::test_every_hook_exists",
        ),
    ),
    28: (
        "the signal handler is never installed, and does nothing",
        (
            "tests/training/test_signals.py::test_from_outside_as_a_launcher_does_it",
            "tests/training/test_adapter.py::test_a_signal_is_a_command_and_calls_who_was_there_before",
            "tests/training/test_signals.py::test_a_wrong_mapping_is_refused_when_it_is_made",
        ),
    ),
    29: (
        "a crash leaves endpoint.json, a clean end leaves an empty directory, and every end logs an error",
        (
            f"{HERE}::test_every_end_leaves_nothing_and_says_nothing",
            "tests/integrations/test_loop.py::test_the_interpreter_ends_with_a_job_open",
            "tests/integrations/test_huggingface.py::test_an_exception_and_then_nothing",
            "tests/system/test_promises.py::test_killed_it_leaves_no_riddle",
        ),
    ),
    30: (
        "no tests, no protocol version, no --json, no wait, no default job; emoji states; questions without a terminal",
        (
            "tests/system/test_mirror.py::test_module_has_its_tests",
            "tests/cli/test_main.py::test_json_prints_one_text_of_what_the_wire_said",
            "tests/client/test_api.py::test_every_wait_returns_at_its_own_moment",
            "tests/client/test_target.py::test_a_job_is_found_by_its_exact_id_or_alone",
            "tests/cli/test_main.py::test_the_list_says_every_state_in_words",
            "tests/cli/test_main.py::test_without_a_terminal_nothing_dangerous_happens_unforced",
        ),
    ),
}


@functools.cache
def names_in(path: str) -> set[str]:
    """Return the names of the tests in a file."""
    nodes = ast.parse((ROOT / path).read_text()).body
    return {node.name for node in nodes if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


@pytest.mark.parametrize("number", range(1, 31))
def test_each_fault_has_its_tests(number):
    """Each of the thirty faults has a sentence, and names tests that exist."""
    sentence, references = FAULTS[number]
    assert sentence and references and len(FAULTS) == 30
    for reference in references:
        file, _, test = reference.partition("::")
        assert test in names_in(file), reference


def test_each_test_here_is_named():
    """Each test below belongs to a fault."""
    named = {reference for _, references in FAULTS.values() for reference in references}
    here = {f"{HERE}::{name}" for name in names_in(HERE)} - {f"{HERE}::test_each_fault_has_its_tests"}
    assert here - named == {f"{HERE}::test_each_test_here_is_named"}


# Short tests...


def left_by(folder, name, **changes):
    """Write the record of a job that was killed, with some members changed."""
    folder.mkdir(parents=True)
    owner = liveness.current_process()._replace(pid=2**31 - 1)
    record = {"job_id": name, "host": owner.host, "port": None, "pid": owner.pid, "started_at": 1.0}
    (folder / "endpoint.json").write_text(json.dumps({**record, "boot_id": owner.boot_id, **changes}))


@pytest.mark.parametrize("job_id", ["", ".", "..", "../../victim", "../victim", "/", "live", "dead/../live", None, 7])
def test_cleanup_goes_by_names_that_agree(jobs_dir, job_id):
    """Faults 1 and 2: a record that names anything but its own directory removes nothing, live or dead."""
    victim = jobs_dir.parent / "victim"
    left_by(victim, "victim")
    left_by(jobs_dir / "dead", job_id)
    with running_loop("live") as run:
        until(lambda: run.steps)
        assert forgather_control.cleanup() == []
        assert (victim / "endpoint.json").exists() and (jobs_dir / "dead" / "endpoint.json").exists()
        assert [job.job_id for job in forgather_control.list_jobs()] == ["live"]
        assert forgather_control.get_job_status("live")["status"] == "training"


@pytest.mark.parametrize("name", ["..", "../victim", "../../victim", "jobs/../../victim"])
def test_a_path_is_no_job(jobs_dir, name):
    """Fault 6: a record outside the jobs directory is not read, by any path."""
    left_by(jobs_dir.parent / "victim", name)
    jobs_dir.mkdir()
    for job in (name, str(jobs_dir.parent / "victim")):
        with pytest.raises(errors.NoSuchJob):
            find(job)
        with pytest.raises(errors.NoSuchJob):
            forgather_control.abort(job)


def test_what_comes_after_the_last_step_is_told_so(jobs_dir):
    """Fault 11: commands accepted after the last step fail when training ends, and no client waits for ever."""
    with TrainingJob("job") as job, Wire(jobs_dir / "job" / "control.sock") as late:
        job.step(1)
        control = job._controller
        for name in ("save_checkpoint", "graceful_stop", "save_and_stop", "abort"):
            assert late.call(name)["result"]["state"] == "accepted"
        late.send(b'{"jsonrpc":"2.0","id":1,"method":"abort","params":{"wait":"finished"}}\n')
        late.still_answers()
        job.__exit__(None, None, None)
        told = late.reply()["result"]
        assert told["state"] == "failed" and "ended before the command could be applied" in told["error"]["message"]
        assert {record.state for record in control._queue.records()} == {"failed"}


def test_any_living_pid_is_not_enough(jobs_dir):
    """Fault 14: the pid belongs to another process now, which started later."""
    with Process("import sys; sys.stdin.read()") as other:
        began = psutil.Process(other.pid).create_time()
        left_by(jobs_dir / "job", "job", pid=other.pid, process_started_at=began - 3600, booted_at=psutil.boot_time())
        assert [job.state for job in forgather_control.list_jobs()] == ["dead"]
        assert cli("list").stdout.splitlines()[1].startswith("dead ") and cli("status", "job").returncode == 4


def test_what_is_no_command_is_none(jobs_dir):
    """Fault 16: a query is not queued, malformed requests get our messages, unknown parameters are refused."""
    with running_loop(), Wire(jobs_dir / "job" / "control.sock") as wire:
        for params in ({"wait": "finished"}, {"command_id": "mine"}, ["accepted"]):
            assert wire.call("status", params)["error"]["code"] == errors.InvalidParams.code
        for line in (b'{"command": "status"}', b"{", b'{"jsonrpc": "2.0", "method": 7, "id": 1}', b"[]", b"null"):
            wire.send(line + b"\n")
            error = wire.reply()["error"]
            assert error["code"] in (errors.ParseError.code, errors.InvalidRequest.code)
            assert not any(word in json.dumps(error) for word in ("Traceback", "Error(", "object is", ".py"))
        assert wire.call("save_checkpoint", {"data": {"keep": 3}})["error"]["code"] == errors.InvalidParams.code
        assert wire.call("list_commands")["result"] == []
        assert wire.call("save_checkpoint", {"command_id": "mine"})["result"]["command_id"] == "mine"


def test_a_host_name_that_leads_nowhere(jobs_dir, monkeypatch):
    """Fault 17: a job on a host whose name cannot be resolved is reached by socket and by port."""
    monkeypatch.setattr("socket.gethostname", lambda: "no.such.host.invalid")
    with running_loop(port=0) as run:
        until(lambda: run.steps)
        known = read_record(str(jobs_dir), "job")
        assert known.host == "no.such.host.invalid"
        assert forgather_control.get_job_status("job")["job_id"] == "job"
        with forgather_control.connect(at=f"tcp://localhost:{known.port}") as job:
            assert job.call("ping")["job_id"] == "job"


def test_a_port_that_is_published_is_open(jobs_dir):
    """Fault 18: a client that reads the record can connect at once, without a sleep."""
    for _ in range(10):
        with TrainingJob("job", port="auto"):
            known = json.loads((jobs_dir / "job" / "endpoint.json").read_text())
            with Wire((known["address"], known["port"])) as wire:
                assert wire.authenticate(known["token"])["result"]["job_id"] == "job"


def test_a_loop_that_never_logs_obeys_at_its_next_step():
    """Fault 22: a loop that never logs applies each command at its next step."""
    for command, obeyed in (("save_checkpoint", "should_save"), ("graceful_stop", "should_stop"), ("abort", "aborted")):
        with TrainingJob("job") as job:
            job.step(1)
            sent = getattr(forgather_control, command)("job")
            assert not getattr(job, obeyed)
            job.step(2)
            assert getattr(job, obeyed)
            assert forgather_control.get_command("job", sent.command_id).applied_at_step == 2


@pytest.mark.parametrize("crash", [None, RuntimeError, KeyboardInterrupt, SystemExit])
def test_every_end_leaves_nothing_and_says_nothing(jobs_dir, caplog, crash):
    """Fault 29: after a clean end and after a crash no file is left but those in .ended, and nothing is logged."""
    caplog.set_level(logging.WARNING)
    try:
        with TrainingJob("job", port=0) as job:
            with forgather_control.connect("job", timeout=SOON) as idle:
                idle.call("ping")
                job.step(1)
                if crash is not None:
                    raise crash
    except BaseException as err:
        assert type(err) is crash
    assert sorted(path.name for path in jobs_dir.iterdir()) == [".ended", ".lock"]
    assert caplog.text == ""
