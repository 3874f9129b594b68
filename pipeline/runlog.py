"""What a run tells while it runs: metrics as JSON lines, and progress on the console. Rank 0 only."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TextIO, get_args

from tqdm import tqdm

from data_prep.files import write_atomic, writing

EventKind = Literal["step", "task", "evaluation", "retention", "subspace", "save", "memory"]
PLAIN_LINES = 10  # lines of progress a task leaves in a log that is no terminal


class RunLog:
    """Appends events to a run's `metrics.jsonl` and shows progress on `stream` (standard error).

    With `path` None (every rank but 0) all of it does nothing; `console` False keeps the console quiet. A
    last line torn by a kill is cut away on opening.
    """

    def __init__(self, path: Path | None, *, console: bool, stream: TextIO | None = None) -> None:
        self._path = path
        self._console = console and path is not None
        self._stream = stream or sys.stderr
        if path is not None:
            _repair(path)

    def event(self, kind: EventKind, **fields: object) -> None:
        """Append one line: `{"event": kind, "time": seconds since 1970, **fields}`.

        Fields are plain values, mappings and lists of them, or scalar tensors; what is not finite becomes
        null. Events that `truncate_after` shall be able to drop carry `task_index`.
        """
        assert kind in get_args(EventKind), f"{kind!r} is no kind of event"
        if self._path is None:
            return
        line = json.dumps(_plain({"event": kind, "time": round(time.time(), 3), **fields}), allow_nan=False)
        # One write for the whole line, so that a kill tears at most this one.
        with writing(self._path):
            descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                _write_all(descriptor, f"{line}\n".encode())
            finally:
                os.close(descriptor)

    def truncate_after(self, task_index: int) -> None:
        """Drop the events of tasks from `task_index` on: they will be trained, and told, again."""
        if self._path is None or not self._path.exists():
            return
        lines = self._path.read_bytes().splitlines(keepends=True)
        kept = [line for line in lines if _task_index(line) < task_index]
        if len(kept) < len(lines):
            write_atomic(self._path, b"".join(kept))

    def say(self, text: str) -> None:
        """One line for the reader of the console, above a progress bar that may be showing."""
        if self._console:
            tqdm.write(text, file=self._stream)
            self._stream.flush()

    @contextmanager
    def progress(self, name: str, total: int, *, unit: str = "step") -> Iterator[Progress]:
        """Progress over `total` units: a bar on a terminal, a line every tenth elsewhere."""
        bar = Progress(name, total, unit=unit, stream=self._stream if self._console else None)
        try:
            yield bar
        finally:
            bar.close()


class Progress:
    """How far a task is: units done, loss, tokens a second, time left."""

    def __init__(self, name: str, total: int, *, unit: str, stream: TextIO | None) -> None:
        self._name, self._total, self._unit, self._stream = name, max(total, 1), unit, stream
        self._done = self._tokens = 0
        self._loss: float | None = None
        self._start = time.monotonic()
        self._bar: tqdm[Any] | None = None
        if stream is not None and stream.isatty():
            # Some terminals (containers, CI) say that they are 0 x 0: tqdm would show nothing there.
            sized = 0 not in os.get_terminal_size(stream.fileno())
            columns, rows = (None, None) if sized else (100, 2)
            self._bar = tqdm(
                total=total, desc=name, unit=unit, file=stream, dynamic_ncols=sized, ncols=columns, nrows=rows
            )

    def advance(self, units: int = 1, *, loss: float | None = None, tokens: int = 0) -> None:
        """`units` more are done, with this loss, over so many tokens."""
        before, self._done = self._done, self._done + units
        self._tokens += tokens
        self._loss = loss if loss is not None else self._loss
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(self._figures()), refresh=False)
            self._bar.update(units)
        elif self._stream is not None and self._is_due(before):
            left = (time.monotonic() - self._start) * (self._total / self._done - 1)
            parts = [f"{self._unit} {self._done}/{self._total}", *self._figures(), f"{_clock(left)} left"]
            print(f"{self._name}: {', '.join(parts)}", file=self._stream, flush=True)

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()

    def _is_due(self, before: int) -> bool:
        """Whether the units just done cross a tenth of the total, or end it."""
        return self._done * PLAIN_LINES // self._total > before * PLAIN_LINES // self._total

    def _figures(self) -> list[str]:
        figures = [] if self._loss is None else [f"loss {self._loss:.4f}"]
        seconds = time.monotonic() - self._start
        if self._tokens and seconds > 0:
            figures.append(f"{self._tokens / seconds:,.0f} tokens/s")
        return figures


def _plain(value: Any) -> Any:
    """`value` as JSON can hold it: scalars of torch and numpy as numbers, what is not finite as None."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(child) for child in value]
    if hasattr(value, "item"):
        return _plain(value.item())
    return str(value)


def _repair(path: Path) -> None:
    """Cut what a kill or a power cut tore: trailing lines that are no JSON object, or have no end."""
    if not path.exists():
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        return
    with writing(path), path.open("r+b") as file:
        lines = file.read().splitlines(keepends=True)
        whole = len(lines)
        while whole and not _is_event(lines[whole - 1]):
            whole -= 1
        if whole < len(lines):
            file.truncate(sum(map(len, lines[:whole])))


def _is_event(line: bytes) -> bool:
    try:
        return line.endswith(b"\n") and isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _task_index(line: bytes) -> float:
    """The task an event belongs to; before all tasks where it names none."""
    index = json.loads(line).get("task_index") if _is_event(line) else None
    return index if isinstance(index, int) else -math.inf


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(max(seconds, 0.0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
