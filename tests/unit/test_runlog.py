"""Metrics as JSON lines that survive a kill, and progress that stays readable."""

import io
import json
import os
import pty
import subprocess
import sys
import termios
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.errors import UserError
from pipeline.runlog import RunLog

ROOT = Path(__file__).resolve().parents[2]


def events(path):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "metrics.jsonl"


def test_an_event_is_one_line_with_its_fields(path):
    log = RunLog(path, console=False)
    log.event("step", task_index=1, loss=0.5, note="naïve\nline\u2028end", rows=[1, 2], path=Path("a"))
    log.event("save", task_index=1, stage=None)
    first, second = events(path)
    assert first.pop("time") <= second.pop("time")
    assert first == {
        "event": "step",
        "task_index": 1,
        "loss": 0.5,
        "note": "naïve\nline\u2028end",
        "rows": [1, 2],
        "path": "a",
    }
    assert second == {"event": "save", "task_index": 1, "stage": None}


def test_an_event_is_on_disk_at_once(path):
    log = RunLog(path, console=False)
    log.event("step", loss=1.0)
    assert len(events(path)) == 1
    log.event("step", loss=2.0)
    assert len(events(path)) == 2


def test_what_is_not_finite_becomes_null(path):
    values = [float("nan"), float("inf"), np.float32("nan"), torch.tensor(-float("inf")), np.float64("inf")]
    RunLog(path, console=False).event("step", loss=values[0], more={"a": values}, fine=[torch.tensor(2), np.int64(3)])
    (event,) = events(path)
    assert (event["loss"], event["more"], event["fine"]) == (None, {"a": [None] * 5}, [2, 3])


def test_an_unknown_kind_is_our_fault(path):
    with pytest.raises(AssertionError, match="no kind of event"):
        RunLog(path, console=False).event("stpe", loss=1.0)


def test_other_ranks_write_and_tell_nothing():
    stream = io.StringIO()
    log = RunLog(None, console=True, stream=stream)
    log.event("step", loss=1.0)
    log.truncate_after(1)
    log.say("quiet")
    with log.progress("task", 3) as bar:
        bar.advance(3, loss=1.0, tokens=5)
    assert stream.getvalue() == ""


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    losses=st.lists(st.floats(), min_size=1, max_size=4),
    kept=st.floats(0, 1),
    junk=st.sampled_from([b"", bytes(40), b"\xff\n", b'"no event"\n']),
)
def test_a_log_torn_anywhere_goes_on_whole(path, losses, kept, junk):
    path.unlink(missing_ok=True)
    log = RunLog(path, console=False)
    for index, loss in enumerate(losses):
        log.event("step", task_index=index, loss=loss)
    torn = path.read_bytes()[: round(kept * path.stat().st_size)]
    whole = torn[: torn.rfind(b"\n") + 1]
    path.write_bytes(torn + junk)
    RunLog(path, console=False).event("save")
    assert path.read_bytes().startswith(whole)
    assert [event["event"] for event in events(path)] == ["step"] * whole.count(b"\n") + ["save"]


def test_a_damaged_line_in_the_middle_costs_no_other(path):
    log = RunLog(path, console=False)
    log.event("step", task_index=1)
    with path.open("ab") as file:
        file.write(b"{damaged}\n")
    log.event("step", task_index=2)
    before = path.read_bytes()
    RunLog(path, console=False).truncate_after(3)
    assert path.read_bytes() == before


def test_events_of_tasks_trained_again_are_dropped(path):
    log = RunLog(path, console=False)
    log.truncate_after(1)  # nothing there yet
    log.event("evaluation", name="untrained")
    for task_index in (1, 2, 3, 2):
        log.event("step", task_index=task_index)
    log.truncate_after(2)
    log.event("step", task_index=2, again=True)
    assert [(event.get("task_index"), event.get("again")) for event in events(path)] == [
        (None, None),
        (1, None),
        (2, True),
    ]


def test_a_place_that_cannot_be_written_is_the_users_fault(tmp_path):
    (tmp_path / "run").write_text("a file where a folder belongs")
    with pytest.raises(UserError, match="cannot be written"):
        RunLog(tmp_path / "run" / "logs" / "metrics.jsonl", console=False)


# --- progress ---


@pytest.mark.parametrize(("total", "lines"), [(1, 1), (3, 3), (10, 10), (1000, 10), (25, 10)])
def test_a_log_file_gets_a_line_every_tenth(path, total, lines):
    stream = io.StringIO()
    with RunLog(path, console=True, stream=stream).progress("task 2/4 amazon", total) as bar:
        for step in range(total):
            bar.advance(loss=1.0 / (step + 1), tokens=100)
    told = stream.getvalue().splitlines()
    assert len(told) == lines
    assert told[-1].startswith(f"task 2/4 amazon: step {total}/{total}, loss {1 / total:.4f}, ")
    assert "tokens/s" in told[-1]
    assert told[-1].endswith("0:00 left")


def test_large_and_small_advances_tell_each_tenth_once(path):
    stream = io.StringIO()
    with RunLog(path, console=True, stream=stream).progress("evaluating", 100, unit="row") as bar:
        for rows in (0, 4, 32, 1, 63):
            bar.advance(rows)
    assert [line.split(",")[0] for line in stream.getvalue().splitlines()] == [
        "evaluating: row 36/100",
        "evaluating: row 100/100",
    ]


def test_progress_over_nothing_is_no_fault(path):
    stream = io.StringIO()
    with RunLog(path, console=True, stream=stream).progress("evaluating", 0) as bar:
        bar.advance(0)
    assert stream.getvalue() == ""


def test_time_left_is_extrapolated(path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("pipeline.runlog.time.monotonic", lambda: now[0])
    stream = io.StringIO()
    with RunLog(path, console=True, stream=stream).progress("task", 10) as bar:
        now[0] = 1900.0
        bar.advance(3, tokens=3600)
    assert stream.getvalue() == "task: step 3/10, 2 tokens/s, 1:10:00 left\n"


def test_a_quiet_console_still_writes_events(path):
    stream = io.StringIO()
    log = RunLog(path, console=False, stream=stream)
    log.say("quiet")
    log.event("task", task_index=1)
    with log.progress("task", 2) as bar:
        bar.advance(2)
    assert (stream.getvalue(), len(events(path))) == ("", 1)


ON_TERMINAL = """
import sys
from pathlib import Path
from pipeline.runlog import RunLog
log = RunLog(Path(sys.argv[1]), console=True)
with log.progress("task 1/4 dbpedia", 50) as bar:
    for step in range(50):
        bar.advance(loss=0.25, tokens=10)
        if step == 20:
            log.say("a line above the bar")
"""


@pytest.mark.parametrize("shape", [(0, 0), (40, 120)])
def test_a_terminal_gets_a_bar(path, shape):
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, shape)
    try:
        subprocess.run(
            [sys.executable, "-c", ON_TERMINAL, path],
            stderr=theirs,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            timeout=60,
            check=True,
        )
        os.close(theirs)
        shown = b""
        try:
            while chunk := os.read(ours, 65536):
                shown += chunk
        except OSError:  # Linux's way to say that the other end is closed
            pass
    finally:
        os.close(ours)
    last = shown.decode().split("\r")[-2:]
    assert any("task 1/4 dbpedia: 100%" in part and "50/50" in part for part in last), shown
    assert "loss 0.2500" in "".join(last)
    assert "tokens/s" in "".join(last)
    assert b"a line above the bar\r\n" in shown
