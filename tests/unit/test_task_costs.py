"""What the parts of a task take: each part's own seconds and its own peak of memory."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from pipeline import peak_memory
from pipeline.peak_memory import peak_resident_bytes
from pipeline.task_costs import TaskCosts

RESETS = Path("/proc/self/clear_refs").exists()
SIZE = 256 * 2**20


@pytest.mark.skipif(not RESETS, reason="this system does not let a process reset its peak of memory")
def test_a_peak_is_that_since_the_last_question() -> None:
    peak_resident_bytes()
    before = peak_resident_bytes()
    block = np.ones(SIZE, dtype=np.uint8)
    del block
    assert peak_resident_bytes() > before + 0.9 * SIZE
    assert peak_resident_bytes() < before + 0.5 * SIZE, "it has been given back"


def test_without_a_reset_it_is_the_process_s_peak(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(peak_memory, "_STATUS", tmp_path / "absent")
    assert peak_resident_bytes() > 2**20


def test_each_part_has_its_own_seconds_and_peak() -> None:
    peaks = iter([900, 10, 30, 20])
    costs = TaskCosts(lambda: next(peaks))
    time.sleep(0.03)
    costs.lap("method")
    costs.lap("train")
    costs.lap("method")
    assert costs.peak_bytes == {"method": 20, "train": 30}, "what came before is no part"
    assert costs.seconds["method_s"] >= 0.03 > costs.seconds["train_s"]
