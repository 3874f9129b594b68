"""The processes of a sweep: some at once, each with its own log, stopped together and never left behind."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import psutil

from data_prep.errors import UserError
from data_prep.files import writing
from pipeline.stopping import STOPPED_EXIT_CODE

# A launcher dies of the signal itself, and so does a run that had no time yet to prepare for it.
STOPPED_EXIT_CODES = (STOPPED_EXIT_CODE, -signal.SIGTERM, 128 + signal.SIGTERM)
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
POLL_S = 0.1
STOP_WAIT_S = 120.0  # how long ranks whose launcher has gone may take to stop by themselves


@dataclass(frozen=True)
class Job:
    """One run: its name on the console, its command, the file its output goes to."""

    name: str
    command: list[str]
    log: Path


@dataclass(frozen=True)
class Outcome:
    """How a job's process ended (a negative exit code: by that signal), and how long it took."""

    exit_code: int
    seconds: float

    @property
    def was_stopped(self) -> bool:
        """Whether the run was told to stop and can go on."""
        return self.exit_code in STOPPED_EXIT_CODES


@dataclass
class _Running:
    place: int
    process: subprocess.Popen[bytes]
    start: float
    left_behind: float | None = None  # since when the process is gone while some of its group live on


class _Signals:
    """Counts the signals that ask the sweep to stop."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.count += 1

    @contextmanager
    def caught(self) -> Iterator[None]:
        """While inside, stop signals are counted and do nothing else; what nohup ignores stays ignored."""
        heeded = [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        before = {number: signal.signal(number, self) for number in heeded}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def run_jobs(jobs: Sequence[Job], *, at_once: int) -> tuple[list[Outcome | None], bool]:
    """Run all jobs, `at_once` at a time; each one's outcome (None: never started), and whether a signal came.

    A stop signal is passed on to the jobs, all their ranks included, as SIGTERM, and the jobs are waited for;
    a second one kills them. Whatever happens, no process of a job is left when this returns.
    """
    outcomes: list[Outcome | None] = [None] * len(jobs)
    names = [f"[{place + 1}/{len(jobs)}] {job.name}" for place, job in enumerate(jobs)]
    waiting = list(range(len(jobs)))[::-1]
    running: list[_Running] = []
    signals, told = _Signals(), 0
    with signals.caught():
        try:
            while running or (waiting and not signals.count):
                while waiting and len(running) < at_once and not signals.count:
                    place = waiting.pop()
                    print(f"{names[place]}: starts; log {jobs[place].log}", flush=True)
                    try:
                        running.append(_start(place, jobs[place], at_once))
                    except (UserError, OSError) as error:
                        print(f"{names[place]}: {error}", flush=True)
                        outcomes[place] = Outcome(2, 0.0)
                time.sleep(POLL_S)
                if signals.count > told:
                    told = signals.count
                    _signal_all(running, signal.SIGTERM if told == 1 else signal.SIGKILL)
                for job in [job for job in running if _has_ended(job)]:
                    running.remove(job)
                    ended = Outcome(job.process.returncode, time.monotonic() - job.start)
                    outcomes[job.place] = ended
                    print(f"{names[job.place]}: {_words(ended)}", flush=True)
        finally:
            _signal_all(running, signal.SIGKILL)
    return outcomes, signals.count > 0


def _start(place: int, job: Job, at_once: int) -> _Running:
    """Start a job in a session of its own: a Ctrl-C on the terminal reaches it through the sweep alone."""
    command, environment = list(job.command), dict(os.environ)
    environment.setdefault("PYTHONUNBUFFERED", "1")  # a log is worth reading while the run goes on
    if at_once > 1:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // at_once)))
        if Path(command[0]).name == "deepspeed" and not any("master_port" in word for word in command):
            command.insert(1, f"--master_port={_free_port()}")  # its default is one port for all
    with writing(job.log):
        job.log.parent.mkdir(parents=True, exist_ok=True)
        with job.log.open("ab") as log:
            log.write(f"$ {shlex.join(command)}\n".encode())
            log.flush()
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )
    return _Running(place, process, time.monotonic())


def _has_ended(job: _Running) -> bool:
    """Whether the job's process is gone, and with it the ranks that outlive a launcher for a while."""
    if job.process.poll() is None:
        return False
    if not _members(job.process.pid):
        return True
    now = time.monotonic()
    job.left_behind = job.left_behind or now
    if now - job.left_behind > STOP_WAIT_S:
        _signal_all([job], signal.SIGKILL)
    return False


def _signal_all(running: Sequence[_Running], number: signal.Signals) -> None:
    """Signal each job's whole process group: the deepspeed launcher tells its ranks nothing."""
    for job in running:
        with suppress(ProcessLookupError):
            os.killpg(job.process.pid, number)


def _members(group: int) -> list[int]:
    """The living processes of a process group."""
    members = []
    for process in psutil.process_iter(["status"]):
        try:
            if process.info["status"] != psutil.STATUS_ZOMBIE and os.getpgid(process.pid) == group:
                members.append(process.pid)
        except ProcessLookupError:
            continue
    return members


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _words(outcome: Outcome) -> str:
    failed = f"failed with exit code {outcome.exit_code}"
    how = "ended" if outcome.exit_code == 0 else "stopped" if outcome.was_stopped else failed
    return f"{how} after {outcome.seconds:.0f} s"
