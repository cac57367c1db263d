from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from knode.cli.commands.tasks import INPUT_LIMIT_BYTES
from knode.errors import Code, KnodeError
from knode.home.layout import Home
from knode.mesh.statements import Role

TASK = {
    "id": "01TASK",
    "agent": "kExecutor:text",
    "state": "succeeded",
    "attempt": 1,
    "node": "12D3KooWAAAABBBB",
    "key": None,
    "result": {"words": 3},
    "error": None,
}


def last_params(daemon: Any) -> dict[str, Any]:
    return daemon.asked[-1][1]


def test_wrong_usage_is_exit_2_and_names_the_help_to_read(knode: Any) -> None:
    run = knode("task", "submit", "--nonsense", "a")
    assert (run.code, run.out) == (2, "")
    assert run.err.splitlines()[0].startswith("error: No such option: --nonsense")
    assert run.err.splitlines()[1] == "next: knode task submit --help"


@pytest.mark.parametrize("words", [[], ["peer"], ["nothing"], ["task", "submit"], ["up", "--port", "70000"]])
def test_wrong_usage_is_one_json_document_with_json(knode: Any, words: list[str]) -> None:
    run = knode(*words, "--json")
    assert (run.code, run.err) == (2, "")
    assert json.loads(run.out)["error"]["code"] == "INVALID_ARGUMENT"


def test_a_noun_without_a_verb_names_the_help_and_no_words_at_all_show_it(knode: Any) -> None:
    run = knode("peer")
    assert (run.code, run.err) == (2, "error: Missing command\nnext: knode peer --help\n")
    alone = knode()
    assert alone.code == 0
    assert "Usage: knode" in alone.out


@pytest.mark.parametrize("words", [["up", "--detach"], ["up", "--detach", "--json"]])
def test_up_makes_no_home(knode: Any, home: Home, words: list[str]) -> None:
    assert knode(*words).code == 5
    assert not home.path.exists()


@pytest.mark.parametrize(
    "words",
    [
        ["status"],
        ["down"],
        ["invite"],
        ["peer", "list"],
        ["member", "list"],
        ["agent", "list"],
        ["task", "list"],
        ["task", "submit", "kExecutor:text"],
        ["logs", "tail"],
    ],
)
def test_without_a_daemon_every_call_is_exit_3_and_names_the_command(
    knode: Any, home: Home, words: list[str]
) -> None:
    home.path.mkdir()
    run = knode(*words)
    assert (run.code, run.out) == (3, "")
    assert run.err.splitlines() == [
        f"error: no daemon runs for {home.path}",
        f"next: knode up --home {home.path}",
    ]


def test_where_there_is_no_node_the_next_step_is_init(knode: Any, home: Home) -> None:
    run = knode("status", "--json")
    assert run.code == 3
    assert json.loads(run.out)["error"]["next"] == f"knode init --home {home.path}"


@pytest.mark.parametrize(
    ("code", "exit_code"),
    [(Code.NOT_FOUND, 5), (Code.NOT_ALLOWED, 4), (Code.NO_ELIGIBLE_NODE, 6), (Code.TOO_LARGE, 1)],
)
def test_the_daemon_s_error_gives_its_exit_code_and_its_json(
    knode: Any, daemon: Any, code: Code, exit_code: int
) -> None:
    daemon.results["task.show"] = KnodeError(code, "what and why", "what next")
    run = knode("task", "show", "x", "--json")
    assert run.code == exit_code
    assert json.loads(run.out) == {
        "error": {"code": code.value, "message": "what and why", "next": "what next"}
    }
    plain = knode("task", "show", "x")
    assert (plain.code, plain.out, plain.err) == (exit_code, "", "error: what and why\nnext: what next\n")


def test_a_hostile_error_message_cannot_drive_the_terminal(knode: Any, daemon: Any) -> None:
    daemon.results["task.show"] = KnodeError(Code.AGENT_FAILED, "\x1b]0;owned\x07")
    assert knode("task", "show", "x").err == "error: \\x1b]0;owned\\x07\n"


def test_json_is_the_daemon_s_document(knode: Any, daemon: Any) -> None:
    daemon.results["task.list"] = [TASK]
    assert json.loads(knode("task", "list", "--json").out) == [TASK]
    assert knode("task", "list").out.splitlines()[1].split() == [
        *("01TASK", "-", "kExecutor:text", "succeeded", "1", "12D3KooWAAAABBBB", "-")
    ]


def test_a_submitted_task_carries_its_arguments(knode: Any, daemon: Any, tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("hello")
    daemon.results["task.submit"] = TASK
    words = ["--input", "hi", "--artifact", str(file), "--on", "pi", "--direct", "--deadline", "2.5"]
    run = knode("task", "submit", "kExecutor:text", *words)
    assert (run.code, run.out) == (0, "01TASK\n")
    assert last_params(daemon) == {
        "agent": "kExecutor:text",
        "input": "hi",
        "artifacts": [str(file)],
        "on": "pi",
        "direct": True,
        "deadline_s": 2.5,
        "outbox": True,
        "wait": False,
    }
    knode("task", "submit", "kExecutor:text", "--key", "k", "--no-outbox")
    asked = last_params(daemon)
    assert (asked["key"], asked["outbox"], asked["direct"]) == ("k", False, False)


@pytest.mark.parametrize("deadline", ["0", "-5", "nan", "inf"])
def test_a_deadline_that_does_not_lie_ahead_is_refused(knode: Any, daemon: Any, deadline: str) -> None:
    run = knode("task", "submit", "a", "--deadline", deadline, "--json")
    assert (run.code, json.loads(run.out)["error"]["code"]) == (2, "INVALID_ARGUMENT")
    assert knode("task", "submit", "a", "--deadline", "soon").code == 2
    assert daemon.asked == []


def test_a_pending_task_is_no_failure_and_says_how_to_follow_it(knode: Any, daemon: Any) -> None:
    daemon.results["task.submit"] = {**TASK, "state": "pending"}
    run = knode("task", "submit", "a")
    assert (run.code, run.out) == (0, "01TASK\n")
    assert run.err.startswith("pending: ")
    assert run.err.endswith("next: knode task watch 01TASK\n")


def test_a_role_that_is_none_is_refused_with_those_that_are(knode: Any, daemon: Any) -> None:
    run = knode("invite", "--role", "vter")
    assert run.code == 2
    assert "'--role': 'vter' is not one of 'admin', 'worker', 'voter', 'observer'" in run.err


def test_cancelling_a_pending_task_says_when_it_will_be_cancelled(knode: Any, daemon: Any) -> None:
    daemon.results["task.cancel"] = {**TASK, "state": "pending"}
    run = knode("task", "cancel", "01")
    assert run.code == 0
    assert "cancelled as soon as they take it" in run.err
    assert run.err.endswith("next: knode task watch 01TASK\n")


def test_times_of_tasks_are_read_in_local_time(
    knode: Any, daemon: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TZ", "XXX-5:30")  # half past five hours ahead of UTC
    time.tzset()
    timed = {**TASK, "submitted": 1_767_225_600_250, "deadline": None}
    daemon.results |= {"task.list": [timed], "task.show": timed, "task.cancel": timed}
    daemon.results["task.explain"] = {
        "task": timed,
        "waits_for": None,
        "given_back": None,
        "considered": [],
        "now": [],
    }
    try:
        assert "2026-01-01 05:30:00" in knode("task", "list").out
        for command in ("show", "cancel", "explain"):
            lines = [line.split(maxsplit=1) for line in knode("task", command, "01").out.splitlines()]
            assert ["submitted", "2026-01-01 05:30:00"] in lines
            assert ["deadline", "-"] in lines
        assert json.loads(knode("task", "show", "01", "--json").out) == timed
    finally:
        monkeypatch.undo()
        time.tzset()


def test_an_explanation_shows_every_node_and_effects_every_operation(knode: Any, daemon: Any) -> None:
    seen = [{"node": "pi", "score": 100, "why": None}, {"node": "nas", "score": None, "why": "its role"}]
    daemon.results["task.explain"] = {
        "task": {**TASK, "state": "queued"},
        "waits_for": "a free place",
        "given_back": None,
        "considered": [],
        "now": seen,
    }
    lines = knode("task", "explain", "01").out.splitlines()
    assert ["waits", "for", "a", "free", "place"] in [line.split() for line in lines]
    assert [line.split() for line in lines[-2:]] == [["pi", "100", "-"], ["nas", "-", "its", "role"]]
    effect = {"place": 9, "sequence": 7, "task": "01TASK", "attempt": 1, "operation": "x", "time": 0}
    daemon.results["task.effects"] = [effect]
    assert re.fullmatch(
        r"9 +(1970-01-01|1969-12-31) \d\d:\d\d:\d\d +01TASK +1 +x",
        knode("task", "effects").out.splitlines()[1],
    )
    knode("task", "effects", "01")
    assert last_params(daemon) == {"task": "01", "after": 0}
    daemon.steps["task.effects"] = [{"dropped": 8, "since": 0}, {"next": 9}]
    run = knode("task", "effects", "--after", "4", "--json", "--quiet")
    assert last_params(daemon) == {"after": 4}
    assert json.loads(run.out) == [effect]
    dropped, more = run.err.splitlines()
    assert dropped.startswith("note: the first 8 operations are dropped; kept are those since 19")
    assert more == "note: there are more: '--after 9' shows them"


def test_input_comes_from_a_file(knode: Any, daemon: Any, tmp_path: Path) -> None:
    (tmp_path / "input").write_text("größe")
    daemon.results["task.submit"] = TASK
    knode("task", "submit", "a", "--input", f"@{tmp_path / 'input'}")
    assert last_params(daemon)["input"] == "größe"


def test_input_comes_from_standard_input(process: Any, daemon: Any) -> None:
    daemon.results["task.submit"] = TASK
    with process("task", "submit", "a", "--input", "-") as run:
        assert run.communicate("from a pipe", timeout=60)[0] == "01TASK\n"
    assert last_params(daemon)["input"] == "from a pipe"


def test_input_at_the_limit_is_sent_and_one_byte_more_is_not(knode: Any, daemon: Any, tmp_path: Path) -> None:
    file = tmp_path / "input"
    daemon.results["task.submit"] = TASK
    file.write_text("x" * INPUT_LIMIT_BYTES)
    assert knode("task", "submit", "a", "--input", f"@{file}").code == 0
    file.write_text("x" * (INPUT_LIMIT_BYTES + 1))
    run = knode("task", "submit", "a", "--input", f"@{file}", "--json")
    error = json.loads(run.out)["error"]
    assert (run.code, error["code"]) == (1, "TOO_LARGE")
    assert "--artifact" in error["next"]
    assert len(daemon.asked) == 1


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--input", "@/nowhere/file"], "NOT_FOUND"),
        (["--artifact", "/nowhere/file"], "NOT_FOUND"),
        (["--artifact", "/"], "NOT_FOUND"),
        (["--input", "@/bin/true"], "INVALID_ARGUMENT"),
        (["--input", "\udcff"], "INVALID_ARGUMENT"),
    ],
)
def test_an_input_that_cannot_be_used_is_named_before_anything_is_sent(
    knode: Any, daemon: Any, words: list[str], code: str
) -> None:
    run = knode("task", "submit", "a", *words, "--json")
    assert json.loads(run.out)["error"]["code"] == code
    assert daemon.asked == []


def test_wait_shows_progress_on_stderr_and_the_raw_result_on_stdout(knode: Any, daemon: Any) -> None:
    daemon.steps["task.submit"] = [{"text": "reading", "fraction": 0.5, "node": "pi"}]
    daemon.results["task.submit"] = {**TASK, "result": "three words"}
    run = knode("task", "submit", "a", "--direct", "--wait")
    assert (run.code, run.out, run.err) == (0, "three words\n", "pi:  50 % reading\n")
    assert last_params(daemon)["wait"] is True
    assert knode("task", "submit", "a", "--wait", "--quiet").err == ""
    daemon.results["task.submit"] = {**TASK, "result": "three words\n"}
    assert knode("task", "submit", "a", "--direct", "--wait").out == "three words\n"


def test_a_file_that_is_a_link_goes_by_the_name_that_was_given(
    knode: Any, daemon: Any, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("content")
    (tmp_path / "link").symlink_to("file")
    daemon.results["task.submit"] = TASK
    assert knode("task", "submit", "a", "--direct", "--artifact", str(tmp_path / "link")).code == 0
    assert last_params(daemon)["artifacts"] == [str(tmp_path / "link")]


@pytest.mark.parametrize("words", [["member", "role", "pi", "king"], ["invite", "--role", "king"]])
def test_a_role_that_is_none_is_answered_with_those_that_are(
    knode: Any, daemon: Any, words: list[str]
) -> None:
    run = knode(*words)
    assert (run.code, daemon.asked) == (2, [])
    assert "king" in run.err
    assert all(f"'{role.value}'" in run.err for role in Role)


@pytest.mark.parametrize(
    ("state", "code", "exit_code"),
    [
        ("failed", "AGENT_FAILED", 1),
        ("failed", "NO_AGENT", 5),
        ("failed", "NO_ELIGIBLE_NODE", 6),
        ("cancelled", "CANCELLED", 1),
        ("expired", "OF_A_NEWER_NODE", 1),
        ("unknown", "UNKNOWN", 1),
    ],
)
def test_wait_exits_by_the_task_s_error_unless_it_succeeded(
    knode: Any, daemon: Any, state: str, code: str, exit_code: int
) -> None:
    task = {**TASK, "state": state, "result": None, "error": {"code": code, "message": "why"}, "direct": True}
    daemon.results["task.submit"] = task
    run = knode("task", "submit", "a", "--wait")
    assert (run.code, run.out) == (exit_code, "")
    assert run.err.splitlines()[0] == f"task 01TASK {state}: {code} why"
    assert json.loads(knode("task", "submit", "a", "--wait", "--json").out) == task
    daemon.results["task.submit"] = {**task, "direct": False}
    assert knode("task", "submit", "a", "--wait").code == 1


def test_an_unknown_outcome_is_explained(knode: Any, daemon: Any) -> None:
    daemon.results["task.watch"] = {
        **TASK,
        "state": "unknown",
        "error": {"code": "UNKNOWN", "message": "lost"},
    }
    run = knode("task", "watch", "01TASK")
    assert run.code == 1
    assert "submit it again only if running it twice does no harm" in run.err


def test_watch_writes_a_document_a_line(knode: Any, daemon: Any) -> None:
    step = {"text": "reading", "fraction": None, "node": "pi"}
    daemon.steps["task.watch"] = [step, step]
    daemon.results["task.watch"] = TASK
    lines = knode("task", "watch", "01TASK", "--json").out.splitlines()
    assert [json.loads(line) for line in lines] == [step, step, TASK]


def test_log_lines_are_shown_as_they_stand_or_for_people(knode: Any, daemon: Any) -> None:
    line = '{"time":"2026-01-02T03:04:05.678Z","level":"info","event":"task run","task":"01"}'
    daemon.steps["logs.tail"] = [{"line": line}, {"line": "torn \x1b["}]
    daemon.results["logs.tail"] = None
    assert knode("logs", "tail", "-n", "2", "--json").out.splitlines()[0] == line
    assert last_params(daemon) == {"lines": 2, "follow": False}
    assert knode("logs", "tail").out.splitlines() == ["03:04:05 info    task run  task=01", "torn \\x1b["]


def test_a_ping_that_nobody_answers_is_a_failure(knode: Any, daemon: Any) -> None:
    daemon.results["peer.ping"] = {
        "id": "x",
        "name": "pi",
        "link": "w",
        "address": "a",
        "rtt_ms": [],
        "lost": 4,
    }
    assert knode("peer", "ping", "pi").code == 1
    assert last_params(daemon) == {"node": "pi", "count": 4}


def test_an_invitation_s_ticket_alone_goes_to_standard_output(knode: Any, daemon: Any) -> None:
    daemon.results["invite"] = {"ticket": "knode-T", "role": "voter", "expires_at": "soon", "addresses": []}
    run = knode("invite", "--role", "voter")
    assert (run.code, run.out) == (0, "knode-T\n")
    assert "knode join knode-T" in run.err
    assert [method for method, _ in daemon.asked] == ["invite"]


def test_an_invitation_waits_when_it_is_told_to(knode: Any, daemon: Any) -> None:
    daemon.results["invite"] = {"ticket": "knode-T", "role": "worker", "expires_at": "soon", "addresses": []}
    daemon.results["invite.wait"] = {"id": "x", "name": "pi", "words": ["a", "b", "c", "d"]}
    run = knode("invite", "--wait")
    assert run.out.splitlines()[:2] == ["knode-T", "pi joined"]
    assert "a b c d" in run.out
    lines = knode("invite", "--wait", "--json").out.splitlines()
    assert [json.loads(line) for line in lines] == [daemon.results["invite"], daemon.results["invite.wait"]]


@pytest.mark.parametrize("is_direct", [True, False])
def test_ctrl_c_says_what_becomes_of_a_task_that_was_waited_for(
    process: Any, daemon: Any, is_direct: bool
) -> None:
    daemon.steps["task.submit"] = [{"task": "01TASK", "fraction": None, "text": "submitted", "node": None}]
    daemon.results["task.submit"] = ...
    with process("task", "submit", "a", "--wait", *(["--direct"] if is_direct else [])) as run:
        assert run.stderr.readline() == "submitted\n"
        run.send_signal(signal.SIGINT)
        _, said = run.communicate(timeout=60)
    assert run.returncode == 130
    if is_direct:
        assert "is cancelled" in said
    else:
        assert "the task goes on; follow it with 'knode task watch 01TASK'" in said


def test_interrupting_the_wait_leaves_the_ticket_valid(process: Any, daemon: Any) -> None:
    daemon.results["invite"] = {"ticket": "knode-T", "role": "worker", "expires_at": "soon", "addresses": []}
    daemon.results["invite.wait"] = ...
    with process("invite", "--wait") as run:
        assert daemon.waiting.wait(60)
        run.send_signal(signal.SIGINT)
        out, err = run.communicate(timeout=60)
    assert (run.returncode, out) == (0, "knode-T\n")
    assert "the ticket stays valid until soon" in err


def test_ctrl_c_is_exit_130_and_cancels_the_call(process: Any, daemon: Any) -> None:
    daemon.results["task.watch"] = ...
    with process("task", "watch", "x") as run:
        assert daemon.waiting.wait(60)
        run.send_signal(signal.SIGINT)
        out, err = run.communicate(timeout=60)
    assert (run.returncode, out, err) == (130, "", "interrupted: the task goes on\n")
    assert daemon.cancelled.wait(60)


def test_a_reader_that_goes_away_is_no_noise(process: Any, daemon: Any) -> None:
    daemon.results["task.list"] = [TASK] * 5000
    with process("task", "list") as run:
        run.stdout.readline()
        run.stdout.close()
        assert run.stderr.read() == ""
        assert run.wait(60) == 1


def test_a_ticket_of_odd_bytes_is_a_wrong_one(process: Any, tmp_path: Path) -> None:
    file = tmp_path / "ticket"
    file.write_bytes(b"knode-\xff")
    with (
        file.open() as ticket,
        process("join", "-", stdin=ticket, environment={"PYTHONIOENCODING": "utf-8:strict"}) as run,
    ):
        out, err = run.communicate(timeout=60)
    assert (run.returncode, out) == (2, "")
    assert "Traceback" not in err


RECOVERED = {
    "id": "12D3KooWAAAABBBB",
    "name": "attic",
    "revoked": [{"id": "12D3KooWCCCCDDDD", "name": "desk"}],
    "members": [
        {
            "id": "12D3KooWAAAABBBB",
            "name": "attic",
            "role": "worker",
            "state": "alive",
            "joined_at": "2026-11-22T14:48:40Z",
            "words": None,
        }
    ],
}


def test_the_recovery_key_comes_from_standard_input_and_from_no_argument(process: Any, daemon: Any) -> None:
    daemon.results["member.recover"] = RECOVERED
    words = ["member", "recover", "--revoke", "desk", "--revoke", "barn", "--undo-since", "2026-11-22"]
    with process(*words) as run:
        out, err = run.communicate("knode-recovery-00ff\n", timeout=60)
    assert run.returncode == 0, err
    assert last_params(daemon) == {
        "recovery_key": "knode-recovery-00ff\n",
        "revoke": ["desk", "barn"],
        "undo_since": "2026-11-22",
    }
    assert out.splitlines()[:2] == ["owner    attic", "revoked  desk"]
    assert "00ff" not in out + err


def test_the_recovery_key_is_no_argument(knode: Any, daemon: Any) -> None:
    assert knode("member", "recover", "knode-recovery-00ff").code == 2
    assert daemon.asked == []


def test_a_revocation_says_since_when_all_is_undone(knode: Any, daemon: Any) -> None:
    daemon.results["member.revoke"] = {"id": "12D3KooWAAAABBBB", "name": "attic", "revoked": True}
    assert knode("member", "revoke", "attic").code == 0
    assert last_params(daemon) == {"node": "attic"}
    assert knode("member", "revoke", "attic", "--undo-since", "2026-11-22T14:30").code == 0
    assert last_params(daemon) == {"node": "attic", "undo_since": "2026-11-22T14:30"}


def test_a_rotation_returns_when_the_daemon_is_back(knode: Any, daemon: Any) -> None:
    daemon.results["status"] = {"uptime_s": 0}  # as of a daemon that has just been started
    daemon.results["member.rotate"] = {"id": "12D3KooWAAAABBBB", "name": "attic", "key": "12D3KooWCCCCDDDD"}
    run = knode("member", "rotate", "--force", "--json")
    assert run.code == 0
    assert json.loads(run.out) == daemon.results["member.rotate"]
    assert ("member.rotate", {"force": True}) in daemon.asked


def test_a_wrong_ticket_makes_no_home(knode: Any, home: Home) -> None:
    run = knode("join", "not-a-ticket", "--json")
    assert (run.code, json.loads(run.out)["error"]["code"]) == (2, "INVALID_ARGUMENT")
    assert not home.path.exists()


def test_up_says_that_the_daemon_runs_already(knode: Any, daemon: Any) -> None:
    for words in (["up"], ["up", "--detach"]):
        run = knode(*words, "--json")
        document = json.loads(run.out)
        assert (run.code, document["started"], document["running"]) == (0, False, True)


def test_configuration_is_set_and_shown_with_its_source_without_a_daemon(knode: Any, home: Home) -> None:
    home.path.mkdir()
    assert knode("config", "set", "node.port", "4999").code == 0
    row = json.loads(knode("config", "get", "node.port", "--json").out)
    assert row == {"key": "node.port", "value": 4999, "source": str(home.config_user)}
    assert knode("config", "get", "node.port").out == "4999\n"
    rows = json.loads(knode("config", "list", "--json").out)
    assert {"key": "log.level", "value": "info", "source": "default"} in rows


def test_a_configuration_that_keeps_the_daemon_from_starting_can_be_mended(knode: Any, home: Home) -> None:
    home.config.mkdir(parents=True)
    home.config_user.write_text('{"node": {"port": "many"}}')
    assert knode("config", "list").code == 2
    assert knode("config", "set", "node.port", "4747").code == 0
    assert knode("config", "list").code == 0


def test_an_unknown_key_is_not_found(knode: Any) -> None:
    assert knode("config", "get", "node.prot").code == 5


def test_the_help_is_plain_where_nobody_looks_and_names_every_command() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "knode", "--help"], capture_output=True, text=True, timeout=60, check=True
    )
    for name in (
        "init",
        "up",
        "down",
        "status",
        "invite",
        "join",
        "peer",
        "member",
        "agent",
        "task",
        "config",
    ):
        assert f"│ {name} " in run.stdout
    assert "\x1b" not in run.stdout


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_standard_streams_change_nothing_but_what_is_seen(home: Home, closed: str) -> None:
    command = f'exec "{sys.executable}" -m knode --home "{home.path}" config set log.level debug {closed}'
    run = subprocess.run(["/bin/sh", "-c", command], capture_output=True, text=True, timeout=60)
    assert "Traceback" not in run.stderr
    assert (run.returncode, run.stdout) == (5, "")
    ask = f'exec "{sys.executable}" -m knode --home "{home.path}" config list {closed}'
    assert subprocess.run(["/bin/sh", "-c", ask], capture_output=True, timeout=60).returncode == 0


@pytest.mark.parametrize("words", [["config", "list"], ["config", "list", "--json"], ["status", "--json"]])
def test_an_answer_that_finds_no_room_is_told_on_standard_error(home: Home, words: list[str]) -> None:
    with open("/dev/full", "w") as full:
        run = subprocess.run(
            [sys.executable, "-m", "knode", "--home", str(home.path), *words],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
        )
    assert run.returncode == 1
    assert [line.partition(":")[0] for line in run.stderr.splitlines()] == ["error", "next"]


def test_an_interrupted_simulation_ends_without_a_traceback() -> None:
    command = [sys.executable, "-m", "knode", "simulate", "--scenario", "crashes"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        assert run.stderr is not None
        while " s of " not in run.stderr.readline():
            assert run.poll() is None
        run.send_signal(signal.SIGINT)
        rest = run.communicate(timeout=60)[1]
    assert (run.returncode, "Traceback" in rest) == (130, False)


def test_starting_the_command_line_imports_nothing_heavy() -> None:
    heavy = "trio", "msgspec", "nacl", "cryptography", "structlog", "apsw", "segno", "asyncio"
    script = (
        "import sys; sys.argv = ['knode', 'status', '--home', '/nonexistent'];"
        "from knode.cli.main import main; main();"
        f"print([name for name in {heavy!r} if name in sys.modules])"
    )
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    assert run.stdout == "[]\n"


SURVEY = {
    "survivor": "attic",
    "last_index": 4711,
    "committed_index": 4700,
    "missing": ["desk", "barn"],
    "leaderless_since": "2026-11-22T14:48:40Z",
    "founds": False,
    "more": [{"name": "shed", "last_index": 4800}],
    "owner": True,
}
LEDGER = {
    "ledger": "3f9a02c41b77" + "0" * 52,
    "number": 1,
    "begun_on": "attic",
    "begun_at": "2026-11-22T14:48:49Z",
    "index": 4711,
    "owner": True,
}


def test_nothing_is_begun_anew_before_somebody_agrees_to_what_may_be_lost(knode: Any, daemon: Any) -> None:
    daemon.results["member.survey"] = SURVEY
    run = knode("member", "recover", "--lost-majority", "--no-input")
    assert run.code == 2
    assert "away: desk, barn; nobody leads the cell since 2026-11-22T14:48:40Z" in run.err
    assert "attic has: 4711 entries, 4700 of them known to be agreed on" in run.err
    assert "shed is here and has more (4800 entries)" in run.err
    assert "--yes" in run.err
    assert [method for method, _ in daemon.asked] == ["member.survey"]


def test_with_the_owner_s_key_no_other_is_asked_for(knode: Any, daemon: Any) -> None:
    daemon.results |= {"member.survey": SURVEY, "member.survive": LEDGER}
    run = knode("member", "recover", "--lost-majority", "--revoke", "barn", "--force", "--yes", "--json")
    assert run.code == 0
    assert json.loads(run.out) == LEDGER
    assert daemon.asked == [
        ("member.survey", {"revoke": ["barn"]}),
        ("member.survive", {"revoke": ["barn"], "force": True}),
    ]


def test_without_the_owner_s_key_the_recovery_key_is_read(process: Any, daemon: Any) -> None:
    daemon.results |= {"member.ledger": LEDGER | {"owner": False}, "member.keep": LEDGER}
    with process("member", "recover", "--keep", "3f9a02c4", "--yes") as run:
        out, err = run.communicate("knode-recovery-00ff\n", timeout=60)
    assert run.returncode == 0, err
    assert last_params(daemon) == {"ledger": LEDGER["ledger"], "recovery_key": "knode-recovery-00ff\n"}
    assert "What was done in the other since then is lost" in err
    assert "begun_on" in out
    assert "00ff" not in out + err


@pytest.mark.parametrize("words", [["--keep", "3f"], ["--undo-since", "2026-11-22"]])
def test_one_recovery_at_a_time(knode: Any, daemon: Any, words: list[str]) -> None:
    assert knode("member", "recover", "--lost-majority", *words).code == 2
    assert daemon.asked == []
