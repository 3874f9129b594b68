"""Being told to stop: SIGTERM, SIGUSR1, Ctrl-C, or a launcher that has gone and can no longer tell anybody.

The DeepSpeed launcher dies of a signal without passing it on and leaves its ranks running; so every rank watches
the processes that started it.
"""

from __future__ import annotations

import os
import signal
from types import FrameType

import psutil

STOPPED_EXIT_CODE = 75  # EX_TEMPFAIL: whole, and ready to go on


class Stopped(Exception):
    """Raised where a run stops between two whole states because it was told to."""


class StopRequest:
    """Whether this rank was told to stop. Cheap to ask: once per optimizer step and evaluation batch."""

    def __init__(self) -> None:
        self._signal: int | None = None
        self._launchers = [process for process in psutil.Process().parents() if _is_launcher(process)]
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._received)

    def _received(self, number: int, frame: FrameType | None) -> None:
        if number == self._signal == signal.SIGINT:
            raise KeyboardInterrupt  # Ctrl-C a second time: somebody does not want to wait for the next whole state
        self._signal = number

    def reason(self) -> str | None:
        """Why to stop, or None."""
        if self._signal is not None:
            return f"signal {signal.Signals(self._signal).name}"
        for launcher in self._launchers:
            if not launcher.is_running() or launcher.status() == psutil.STATUS_ZOMBIE:
                return f"the launcher (process {launcher.pid}) has gone"
        return None

    def check(self) -> None:
        """Raise `Stopped` when told to stop."""
        if reason := self.reason():
            raise Stopped(reason)


def _is_launcher(process: psutil.Process) -> bool:
    """Whether a process is DeepSpeed's launcher (its front end or its per-node part) or torchrun's."""
    try:
        words = [os.path.basename(word) for word in process.cmdline()[:6]]
    except psutil.Error:
        return False
    return bool({"deepspeed", "deepspeed.launcher.launch", "torchrun"} & set(words))
