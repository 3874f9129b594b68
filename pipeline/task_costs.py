"""What each part of a task takes: seconds, and the most memory of a rank."""

from __future__ import annotations

import time
from collections.abc import Callable


class TaskCosts:
    """Counts from when it is made. `peak_memory`: the most bytes since it was last asked; it may be collective."""

    def __init__(self, peak_memory: Callable[[], int]) -> None:
        self.seconds: dict[str, float] = {}  # "<part>_s"
        self.peak_bytes: dict[str, int] = {}  # by part
        self._peak_memory = peak_memory
        peak_memory()  # what came before is no part of this
        self._last = time.monotonic()

    def lap(self, part: str) -> None:
        """Count the time since the last lap, and its memory, as `part`."""
        now, key = time.monotonic(), f"{part}_s"
        self.seconds[key] = round(self.seconds.get(key, 0.0) + now - self._last, 3)
        self.peak_bytes[part] = max(self.peak_bytes.get(part, 0), self._peak_memory())
        self._last = now
